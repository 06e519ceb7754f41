"""Options of the command line: one set for safety and utility, a file of options, the version."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from typer.testing import CliRunner
from zoo.tiny import make_llava

from care_lens import __version__, cli
from care_lens.cli.asked import Asked
from care_lens.core import Example, UnsafeMargin
from care_lens.data import Study
from care_lens.evaluation import GenerationSettings, SubstringRefusalJudge
from care_lens.evaluation.generate import generate_all
from care_lens.evaluation.store import GenerationStore
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import GenerationOptionError
from care_lens.pipeline import RunSettings
from care_lens.pipeline.generating import generating
from care_lens.pipeline.needs import NeedsError


def invoke(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "300"})


@pytest.fixture
def study():
    rows = [Example(f"p {i}", id=str(i), harmful=i % 2 == 0, channel="ab"[i % 2]) for i in range(20)]
    made = {"judge": SubstringRefusalJudge(), "outcome": UnsafeMargin(comply=(1,), refuse=(2,)), "refusal": "no"}
    return Study.from_examples(rows, name="s", plain="a", **made)


@pytest.fixture
def asked(monkeypatch, study):
    """The settings, model and study that `run` is called with."""
    held = {}

    def run(lvlm, study, out, *, model, settings):
        held.update(settings=settings, model=model, study=study, out=out)
        raise NeedsError("stop here")

    monkeypatch.setattr("care_lens.pipeline.run", run)
    lvlm = SimpleNamespace(hf_model=torch.nn.Linear(1, 1))  # how large it is says in how many processes it answers
    monkeypatch.setattr(cli.loading, "load", lambda *_: (lvlm, study))
    return held


def test_the_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.strip() == f"care-lens {__version__}"


def test_settings_of_generation_epsilons_and_ranks_reach_the_run(asked, tmp_path):
    words = (
        "--sample",
        "--temperature",
        0.7,
        "--top-p",
        0.9,
        "--top-k",
        40,
        "--min-new-tokens",
        2,
        "--max-new-tokens",
        9,
        "--system",
        "be kind",
    )
    result = invoke("run", "--out", tmp_path, *words, "--epsilons", "0.05,0.1", "--ranks", "0,4", "--depths", "1")
    assert "stop here" in result.output
    settings = asked["settings"]
    assert settings.generation == GenerationSettings(
        max_new_tokens=9, min_new_tokens=2, do_sample=True, temperature=0.7, top_p=0.9, top_k=40, system="be kind"
    )
    assert (settings.epsilons, settings.reader_ranks) == ((0.05, 0.1), (0, 4))
    told = settings.to_dict()
    assert (
        settings.reader_depths == (1,) and "reader_depths" not in told
    )  # as in the records of runs that read one block
    assert told["temperature"] == 0.7 and told["system"] == "be kind"
    told = settings.asked(asked["study"])
    assert {e.system for some in told.suites["test"].values() for e in some} == {"be kind"}


def test_records_of_runs_without_them_are_as_before():
    """So that a folder of an earlier version goes on."""
    told = RunSettings().to_dict()
    later = {"do_sample", "temperature", "top_p", "top_k", "system", "min_new_tokens", "learn_limit", "rivals"}
    assert not later & {*told} and len(told) == len(RunSettings.names()) - len(later)
    assert RunSettings(rivals=()).to_dict()["rivals"] == []
    assert "do_sample" in RunSettings(do_sample=False).to_dict()
    with pytest.raises(GenerationOptionError, match="temperature must be above 0"):
        RunSettings(temperature=0)


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_file_of_options_stands_behind_the_command_line(form, asked, tmp_path):
    path = tmp_path / f"options.{form}"
    held = {"out": str(tmp_path / "out"), "max-new-tokens": 7, "epsilons": [0.03, 0.2], "sample": True, "seed": 5}
    path.write_text(yaml.safe_dump(held) if form == "yaml" else json.dumps(held))
    assert "stop here" in invoke("run", "--config", path, "--seed", 6).output
    settings = asked["settings"]
    assert (settings.seed, settings.max_new_tokens, settings.epsilons, settings.do_sample) == (6, 7, (0.03, 0.2), True)
    assert asked["out"] == tmp_path / "out"
    path.write_text(json.dumps({"greedy": True, "out": str(tmp_path / "out")}))  # which is yaml too
    invoke("run", "--config", path)
    assert asked["settings"].do_sample is False


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epsilons", "much"), "--epsilons must be numbers with commas"),
        (("--epsilons", "0,0.1"), "--epsilons must be above 0"),
        (("--ranks", "-1"), "--ranks must be 0 or more"),
        (("--depths", "0"), "--depths must be 1 or more"),
        (("--temperature", "0"), "temperature must be above 0"),
        (("--top-p", "2"), "top_p must be in (0, 1]"),
        (("--max-new-tokens", 2, "--min-new-tokens", 3), "max_new_tokens must be min_new_tokens or more"),
        (("--quantization", "3bit"), "--quantization must be 4bit or 8bit"),
        (("--revision", "main"), "--revision and --quantization go with a model of your own"),
        (("--config", "gone.yaml"), "--config must be a yaml or json file"),
        (("--config", "LIST"), "--config must hold names and values"),
        (("--config", "UNKNOWN"), "must name options of the command"),
        (("--config", "BROKEN"), "--config must be a yaml or json file"),
    ],
)
def test_wrong_options_are_told_in_a_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in (("LIST", "[1]"), ("UNKNOWN", "sed: 1"), ("BROKEN", "a: [")):
        (tmp_path / name).write_text(text)
    result = invoke("run", *words)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.replace("│", " ").split()), result.output


def test_commands_of_one_process_refuse_several(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in ("run", "diagnose", "fit"):
        result = invoke(verb)
        assert result.exit_code == 2 and "must run in one process, got 2" in " ".join(result.output.split())


def test_what_generates_goes_by_the_settings_of_the_run_and_the_model_is_left_as_it_was():
    examples = [Example(f"what is {word}", id=word) for word in ("red", "blue", "first")]
    settings = RunSettings(do_sample=True, temperature=2.0, max_new_tokens=3).generation
    with HookedLVLM.from_hf(*make_llava()) as lvlm:
        before, plain = lvlm.hf_model.generation_config, lvlm.generation_settings()
        store = GenerationStore()
        with generating(lvlm, settings):
            assert lvlm.generation_settings(max_new_tokens=3)["temperature"] == 2.0
            # as each step of a run calls it, with the length alone
            generate_all(lvlm, examples, store=store, max_new_tokens=3, progress=False)
        assert lvlm.hf_model.generation_config is before and lvlm.generation_settings() == plain
    (held,) = [value["generation"] for value in store.settings.values()]
    assert held["do_sample"] is True and held["temperature"] == 2.0 and held["max_new_tokens"] == 3


@pytest.mark.parametrize(
    ("asked", "parameters", "expected"), [(None, 10, 3), (5, 10, 5), (None, 10**9, 1), (2, 10**9, 2)]
)
def test_small_models_answer_in_a_process_a_core(monkeypatch, asked, parameters, expected):
    from care_lens.cli import asked as options
    from care_lens.core.forked import workers

    monkeypatch.setattr(options, "_cores", lambda: 3)
    lvlm = SimpleNamespace(hf_model=SimpleNamespace(parameters=lambda: [SimpleNamespace(numel=lambda: parameters)]))
    with options.Asked(workers=asked).answering(lvlm):
        assert workers() == expected
    monkeypatch.setattr(options, "_cores", lambda: 64)
    with options.Asked().answering(SimpleNamespace(hf_model=torch.nn.Linear(1, 1))):
        assert workers() == 8


@pytest.mark.parametrize(
    ("written", "typed", "size"),
    [
        ("short: true", (), "short"), ("short: true", ("--size", "compact"), "compact"), ("size: compact", (), "compact"),
        ("size: compact", ("--short",), "short"), ("size: short", ("--size", "full"), "full"), ("seed: 1", (), "full"),
    ],
)  # fmt: skip
def test_a_size_on_the_command_line_goes_before_that_of_the_file(written, typed, size, tmp_path, monkeypatch):
    path = tmp_path / "asked.yaml"
    path.write_text(written)
    seen = []

    def stops(asked):
        seen.append(asked.asked_size)
        raise NeedsError("stop here")

    monkeypatch.setattr(Asked, "load", stops)
    invoke("run", "--config", path, *typed)
    assert seen == [size]
