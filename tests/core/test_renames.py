"""One word for each idea in all public functions, and earlier names that still work and say what they are called now."""

import inspect
import re
import sys
import warnings
from dataclasses import replace
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import pytest

import care_lens
from care_lens.capture import capture
from care_lens.core import renames
from care_lens.core.renames import renamed

OTHER_WORDS = {
    "sites": {"site_list", "hook_points", "names_filter", "modules_at"},
    "positions": {"select", "span", "token_positions", "tokens_at"},
    "examples": {"dataset", "data_list", "inputs_list"},
    "checkpoint": {"resume", "resume_dir", "ckpt", "checkpoint_dir", "cache_dir"},
    "directory": {"folder", "save_dir", "out_dir", "output_dir"},
    "n_boot": {"n_bootstrap", "bootstrap", "n_resamples", "boots", "resamples"},
    "n_permutations": {"n_perm", "permutations"},
    "batch_size": {"bs", "batchsize"},
    "seed": {"random_state", "random_seed"},
    "progress": {"verbose", "quiet", "show_progress"},
    "confidence": {"confidence_level", "ci", "level"},
    "significance": {"p_level", "alpha_level", "sig"},
}
KINDS = {"n_boot": "int", "batch_size": "int", "seed": "int", "progress": "bool", "n_permutations": "int"}
"""What an option is wherever it has that name and a default; None stands for what the model or the settings say."""


def public():
    """Functions and methods that the rooms export, by name."""
    for room in iter_modules(care_lens.__path__):
        module = import_module(f"care_lens.{room.name}")
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not getattr(value, "__module__", "").startswith("care_lens"):
                continue
            if inspect.isfunction(value):
                yield f"{room.name}.{name}", value
            elif inspect.isclass(value):
                for method, member in vars(value).items():
                    call = getattr(member, "__func__", member)
                    if inspect.isfunction(call) and (not method.startswith("_") or method == "__init__"):
                        yield f"{room.name}.{name}.{method}", call


def test_options_have_one_word_and_one_type_everywhere():
    calls = dict(public())
    assert len(calls) > 500
    del calls["subspace.random_isometry"]  # its span is one of vectors
    wrong = []
    for name, call in calls.items():
        for parameter in inspect.signature(call).parameters.values():
            wrong += [
                f"{name}({parameter.name}=) is {right}"
                for right, others in OTHER_WORDS.items()
                if parameter.name in others
            ]
            hint = str(getattr(parameter.annotation, "__name__", parameter.annotation)).removesuffix(" | None")
            given = parameter.default not in (parameter.empty, None)
            if given and hint != KINDS.get(parameter.name, hint):
                wrong.append(f"{name}({parameter.name}: {hint}) is {KINDS[parameter.name]}")
            if parameter.name == "checkpoint" and (
                parameter.default is not None or "None" not in str(parameter.annotation)
            ):
                wrong.append(f"{name}({parameter.name}: {hint}) has no default None")
    assert not wrong, "\n".join(wrong)


def test_an_earlier_name_works_and_says_what_it_is_called_now(lvlm):
    from care_lens import organism

    rows, site = organism.examples("plain", "fit", n=2), "blocks.0.hook_mlp_out"
    with pytest.warns(FutureWarning, match="select of capture is called positions now") as told:
        held = capture(lvlm, rows, [site], select=("last",), progress=False)  # pyright: ignore[reportCallIssue]
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        now = capture(lvlm, rows, [site], positions=("last",), progress=False)
    assert held.rows(site, "last").equal(now.rows(site, "last"))
    with pytest.warns(FutureWarning, match="called positions"):
        assert held.has(site, select="last").all()
    with pytest.raises(TypeError, match="give positions alone"):
        capture(lvlm, rows, [site], select=("last",), positions=("last",), progress=False)


def test_signatures_show_the_present_name():
    @renamed(old="new")
    def call(new: int = 3) -> int:
        return new

    assert list(inspect.signature(call).parameters) == ["new"]
    with pytest.warns(FutureWarning, match="old of call is called new"):
        assert call(old=5) == 5
    assert call() == 3 and call(4) == 4


def test_a_probability_of_a_false_find_is_called_significance_everywhere():
    """``confidence`` is that of intervals, ``alpha`` the strength of a write."""
    from care_lens.evaluation import paper_table, rank
    from care_lens.mediation import localise
    from care_lens.subspace import PermutationRank

    with pytest.warns(FutureWarning, match="level of PermutationRank is called significance now") as told:
        rule = PermutationRank(draws=39, level=0.1)  # pyright: ignore[reportCallIssue]
    assert told[0].filename == __file__
    assert rule == PermutationRank(39, 0.1) and [*inspect.signature(PermutationRank).parameters] == [
        "draws",
        "significance",
    ]
    with pytest.warns(FutureWarning, match="level of PermutationRank is called significance now"):
        assert rule.level == 0.1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(FutureWarning, match="level of PermutationRank is called significance now") as told:
        assert replace(rule, level=0.2) == PermutationRank(39, 0.2)  # pyright: ignore[reportCallIssue]
    assert told[0].filename == __file__ and replace(rule, significance=0.2) == PermutationRank(39, 0.2)
    with pytest.raises(TypeError, match="got significance and level"):
        PermutationRank(significance=0.1, level=0.2)  # pyright: ignore[reportCallIssue]
    for call, new in ((rank, "significance"), (paper_table, "significance"), (localise, "n_spans")):
        assert new in inspect.signature(call).parameters
    with (
        pytest.warns(FutureWarning, match="alpha of rank is called significance"),
        pytest.raises(ValueError, match="significance must be"),
    ):
        rank(None, metric="asr", alpha=2.0)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("module", "old", "home", "new"),
    [
        ("mediation", "NothingToLocalise", "mediation", "NothingToLocaliseError"),
        ("evaluation", "TooManyMissing", "evaluation", "TooManyMissingError"),
        ("defences", "NoRefusalDirection", "defences", "NoRefusalDirectionError"),
        ("baselines", "NoRefusalDirection", "defences", "NoRefusalDirectionError"),
        ("baselines", "RefusalDirection", "defences", "RefusalDirection"),
        ("pipeline", "NoCandidate", "evaluation", "NoCandidateError"),
        ("pipeline.choose", "NoCandidate", "evaluation", "NoCandidateError"),
        ("pipeline.choose", "Fitted", "repair", "FittedReaders"),
        ("pipeline.choose", "offline", "repair", "captured_scores"),
        ("pipeline.choose", "assemble", "repair", "assemble"),
        ("pipeline.choose", "reader_plans", "repair", "reader_plans"),
        ("pipeline.learn", "FitRows", "repair", "FitRows"),
        ("pipeline.learn", "token_rows", "repair", "token_rows"),
        ("pipeline.learn", "study_rows", "repair", "study_rows"),
        ("pipeline.learn", "SPAN", "repair.printed", "SPAN"),
        ("pipeline.place", "reader_layers", "mediation", "reader_layers"),
        ("mediation.frames", "tidy", "core.details", "tidy"),
        ("mediation", "Replay", "lvlm", "Replay"),
        ("mediation.replay", "Replay", "lvlm", "Replay"),
        ("mediation.replay", "Edit", "lvlm", "Edit"),
    ],
)
def test_earlier_names_are_still_imported_with_a_warning(module, old, home, new):
    with pytest.warns(FutureWarning, match=f"{old} is care_lens.* now") as told:
        exec(f"from care_lens.{module} import {old} as found", scope := {"__name__": "a_notebook"})
    assert scope["found"] is getattr(import_module(f"care_lens.{home}"), new)
    # Importing asks twice; a warning of one line is shown once.
    assert {(one.filename, one.lineno) for one in told} == {("<string>", 1)}
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from care_lens.{module} import nothing", {"__name__": "a_notebook"})


def test_an_earlier_name_imported_in_a_function_is_told_at_its_line_and_not_at_the_callers(monkeypatch):
    """``from package import name`` asks the package twice, once out of the import system. The module is loaded as users have it, without the checks of the tests."""
    spec = spec_from_file_location("care_lens.core.renames_of_users", renames.__file__)
    of_users = module_from_spec(spec)
    spec.loader.exec_module(of_users)
    package = ModuleType("a_package")
    package.__path__ = []
    package.__getattr__ = of_users.moved("a_package", {"Old": "care_lens.core.Site"})
    monkeypatch.setitem(sys.modules, "a_package", package)
    exec(compile("def mine():\n    from a_package import Old", "mine.py", "exec"), scope := {})
    with pytest.warns(FutureWarning, match="Old is care_lens.core.Site now") as told:
        scope["mine"]()
    assert {(one.filename, one.lineno) for one in told} == {("mine.py", 2)}


def test_the_package_does_not_use_its_earlier_names():
    """Nor do its tests, benchmarks and pages, which are what readers copy."""
    root = Path(care_lens.__file__).parents[1]
    files = [p for room in ("care_lens", "benchmarks", "tutorials", "docs") for p in (root / room).rglob("*.py")]
    former = re.compile(
        r"\b(NothingToLocalise|TooManyMissing|NoRefusalDirection|NoCandidate)\b|from care_lens\.(baselines|mediation\.frames|mediation\.replay|mediation\.separability|pipeline\.place)\b"
    )
    used = [
        f"{path.relative_to(root)}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if former.search(line) and '": "care_lens.' not in line
    ]
    assert not used, "\n".join(used)
