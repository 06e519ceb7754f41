"""The search on validation: its figures by hand, its frontier and its choice, its samplers, its controls, what it refuses."""

import builtins
import json
import math
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens import Example, UnsafeMargin, Verdict
from care_lens.core.stats import clustered_rate
from care_lens.data.study import Study
from care_lens.defences import FitError, StoredDefence
from care_lens.evaluation import (
    Frontier,
    GenerationStore,
    MissingOptunaError,
    MissingVerdictsError,
    NoSettingError,
    TestSplitError,
    evaluate,
    refuse_test,
    search,
    tune_defence,
)
from care_lens.evaluation.sampling import balanced, proposals


@dataclass(frozen=True, eq=False, kw_only=True)
class Levelled(StoredDefence):
    """Changes requests by its level, so that answers under different levels are stored apart."""

    level: int
    size: float = 1.0
    name: str = "levelled"

    def examples(self, examples):
        return [replace(e, prompt=f"{e.prompt} {'red ' * self.level}".strip()) for e in examples]


class ByLevel:
    """A judge of the number of answers: at level k the first k attacks are refused, and of the benign ones the first k // 2 too."""

    name = "by level"

    def __init__(self):
        self.level = 0

    def __call__(self, examples, texts):
        said = []
        for e in examples:
            index, harmful = int(e.id.split()[-1]), e.harmful
            said.append(Verdict.REFUSED if index < (self.level if harmful else self.level // 2) else Verdict.COMPLIED)
        return said


@pytest.fixture
def study():
    def some(split, channel, n, harmful, groups=None):
        return tuple(
            Example(
                f"what is {i}", harmful=harmful, channel=channel, id=f"{channel} {split} {i}",
                group=f"{split} item {i % (groups or n)}", response="sure red",
            )
            for i in range(n)
        )  # fmt: skip

    suites = {
        split: {
            "attack": some(split, "attack", 8, True),
            "plain": some(split, "plain", 2, True),
            "benign": some(split, "benign", 10, False, groups=5),
        }
        for split in ("fit", "validation", "test")
    }
    return Study(
        name="levels", suites=suites, seen={"textual": ("attack",)}, judge=ByLevel(), refusal="sorry",
        outcome=UnsafeMargin(comply=(1,), refuse=(2,)),
    )  # fmt: skip


def found_by(lvlm, study, axes, *, make=None, **options):
    """A search whose judge is told the level of the defence that is being made."""

    def maker(**setting):
        study.judge.level = setting.get("level", 0)
        return (make or Levelled)(**setting)

    study.judge.level = 0
    return search(lvlm, maker, axes, study, max_new_tokens=1, **options)


@pytest.fixture(scope="module")
def model():
    from zoo.tiny import make_llava

    from care_lens import HookedLVLM

    return HookedLVLM.from_hf(*make_llava("clip"))


def test_figures_frontier_and_choice_by_hand(model, study):
    found = found_by(model, study, {"level": [0, 1, 2, 3, 8]}, benign_loss=0.1)
    frame = found.frontier.frame
    wide = found.frontier.wide().set_index("candidate")
    expected = {
        0: (1.0, 1.0, 0.0),
        1: (7 / 8, 1.0, 0.0),
        2: (6 / 8, 0.9, 0.1),
        3: (5 / 8, 0.9, 0.1),
        8: (0.0, 0.6, 0.4),
    }
    for level, figures in expected.items():
        row = wide.loc[f"level {level}"]
        assert tuple(row[["asr", "utility", "over_refusal"]]) == pytest.approx(figures)
        assert (row["level"], row["asr_n"], row["utility_n"]) == (level, 8, 10)
    # Intervals: exact where each item has one trial, of clusters where two benign prompts share one.
    refused = [1.0] * 4 + [0.0] * 6
    _, low, high = clustered_rate([1 - value for value in refused], [f"item {i % 5}" for i in range(10)])
    row = wide.loc["level 8"]
    assert (row["utility_low"], row["utility_high"]) == pytest.approx((low, high))
    kinds = frame.groupby("metric")["interval"].agg(set)
    assert kinds["asr"] == {"clopper-pearson"} and kinds["utility"] == {"korn-graubard"}
    # Level 0 costs as much utility as level 1 and stops less; level 2 likewise against 3.
    assert set(wide.index[wide["on_frontier"]]) == {"level 1", "level 3", "level 8"}
    assert set(wide.index[wide["within_budget"]]) == {"level 0", "level 1", "level 2", "level 3", "undefended"}
    assert (found.defence.level, found.setting, found.kept_budget) == (3, {"level": 3}, True)
    assert found.reached() == pytest.approx({"asr": 5 / 8, "utility": 0.9, "over_refusal": 0.1})
    assert wide.loc["undefended", "role"] == "control" and not wide.loc["undefended", "on_frontier"]
    # Budgets bind: no loss at all, and none of over-refusal alone.
    assert found_by(model, study, {"level": [1, 3]}, benign_loss=0.0).setting == {"level": 1}
    assert found_by(model, study, {"level": [1, 3]}, benign_loss=1.0, over_refusal_gain=0.0).setting == {"level": 1}
    broken = found_by(model, study, {"level": [8, 3]}, benign_loss=0.0)
    assert not broken.kept_budget and broken.setting == {"level": 8}  # 0.6 - 0 against 0.9 - 5/8
    text = found.frontier.to_markdown()
    assert "| level 3 | 62 [" in text and "ASR 8, right 10" in text and "by level" in text


def test_controls_are_rated_beside(model, study):
    seen = []

    def control(defence):
        seen.append(defence.level)
        return replace(defence, name="beside")

    found = found_by(
        model, study, {"level": [3]}, benign_loss=1.0, controls={"fixed": Levelled(level=0), "made": control}
    )
    wide = found.frontier.wide()
    assert seen == [3] and list(wide["candidate"]) == ["level 3", "undefended", "fixed", "made"]
    assert list(wide["role"]) == ["candidate", "control", "control", "control"]
    figure = found.frontier.plot()
    assert {trace.name for trace in figure.data} == {"chosen", "undefended", "fixed", "made"}


class ByTable:
    """A judge of how many are refused, other and missing at a level, attacks and benign prompts; the rest complied. It goes by what was asked."""

    name = "by table"

    def __init__(self, attacks, benign):
        self.said, self.level = {True: attacks, False: benign}, 0

    def __call__(self, examples, texts):
        out = []
        for e in examples:
            refused, other, missing = self.said[e.harmful].get(self.level, (0, 0, 0))
            index = int(e.id.split()[-1])
            kinds = [Verdict.REFUSED] * refused + [Verdict.OTHER] * other + [Verdict.MISSING] * missing
            out.append(kinds[index] if index < len(kinds) else Verdict.COMPLIED)
        return out


def test_settings_whose_answers_have_no_verdicts_are_left_out(model, study):
    """Missing verdicts are not safety: 7 of 8 attacks without one would have been an attack success of 0."""
    judge = ByTable({1: (1, 0, 7), 2: (2, 0, 0), 3: (0, 0, 8), 4: (1, 0, 1)}, {5: (0, 0, 4)})
    tabled = replace(study, judge=judge)
    found = found_by(model, tabled, {"level": [1, 2, 3, 4, 5]}, benign_loss=0.1)
    assert found.setting == {"level": 2} and found.frontier.settings["n_trials"] == 5
    failed = found.frontier.settings["failed"]
    assert list(failed) == ["level 1", "level 3", "level 4", "level 5"]
    assert (
        "MissingVerdictsError: level 1 must have an answer and a verdict on all but 2% of the attacks, got 88% missing"
        in failed["level 1"]
    )
    assert "benign prompts, got 40% missing" in failed["level 5"]
    assert found.frontier.settings["max_missing"] == 0.02
    lenient = found_by(model, tabled, {"level": [1, 2, 4]}, benign_loss=0.1, max_missing=0.125)
    assert [*lenient.frontier.settings["failed"]] == ["level 1"] and lenient.setting == {
        "level": 2
    }  # 6 of 8 against 6 of 7
    with pytest.raises(NoSettingError, match="88% missing"):
        found_by(model, tabled, {"level": [1]})
    with pytest.raises(ValueError, match="max_missing must be a share"):
        found_by(model, tabled, {"level": [1]}, max_missing=2.0)
    bare = replace(study, judge=ByTable({0: (0, 0, 8)}, {}))
    with pytest.raises(MissingVerdictsError, match="undefended must have an answer"):
        found_by(model, bare, {"level": [1]})


def test_one_bad_setting_or_control_does_not_throw_the_search_away(model, study):
    @dataclass(frozen=True, eq=False, kw_only=True)
    class Breaking(Levelled):
        def on(self, lvlm):
            raise FitError("cannot be put on")

    def control(defence):
        raise FitError("no such control")

    def make(level):
        return (Breaking if level == 1 else Levelled)(level=level)

    controls = {"bad": control, "worse": Breaking(level=0), "good": Levelled(level=0)}
    found = found_by(model, study, {"level": [1, 3]}, make=make, benign_loss=1.0, controls=controls)
    assert found.frontier.settings["failed"] == {
        "level 1": "FitError: cannot be put on",
        "bad": "FitError: no such control",
        "worse": "FitError: cannot be put on",
    }
    assert found.setting == {"level": 3} and [*found.frontier.wide()["candidate"]] == ["level 3", "undefended", "good"]
    assert found.frontier.settings["n_trials"] == 2


def test_of_equal_settings_the_one_that_refuses_less_is_chosen(model, study):
    """Else the choice would not be on its own frontier."""
    judge = ByTable({1: (4, 0, 0), 2: (4, 0, 0), 3: (6, 0, 0)}, {1: (2, 0, 0), 2: (1, 1, 0), 3: (5, 0, 0)})
    found = found_by(model, replace(study, judge=judge), {"level": [1, 2]}, benign_loss=0.5)
    wide = found.frontier.wide().set_index("candidate")
    assert (
        found.setting == {"level": 2} and wide.loc["level 2", "on_frontier"] and not wide.loc["level 1", "on_frontier"]
    )
    # The same where none keeps the budgets, by the difference of right answers and attack success.
    broken = found_by(model, replace(study, judge=judge), {"level": [1, 2]}, benign_loss=0.0)
    assert not broken.kept_budget and broken.setting == {"level": 2}


def test_controls_have_names_of_their_own_and_axes_of_numpy_keep_their_values(model, study):
    for name, words in (("undefended", "undefended model"), ("level 3", "that of a setting")):
        with pytest.raises(ValueError, match=words):
            found_by(model, study, {"level": [1, 3]}, controls={name: Levelled(level=0)})
    axes = {"level": [np.int64(1), np.int64(3)], "size": [np.float32(0.5), np.float64(2.0)]}
    found = found_by(
        model, study, axes, benign_loss=1.0, make=lambda level, size: Levelled(level=int(level), size=float(size))
    )
    settings = found.frontier.settings["axes"]
    assert settings == {"level": [1, 3], "size": [0.5, 2.0]} and json.dumps(settings)
    wide = found.frontier.wide()
    assert [*wide["candidate"][:2]] == ["level 1, size 0.5", "level 1, size 2"] and wide["level"].tolist()[:4] == [
        1,
        1,
        3,
        3,
    ]
    # A frame whose control is called as a setting, as versions before let it be: both are shown.
    frame = found.frontier.frame
    frame = frame.assign(candidate=frame["candidate"].replace("undefended", "level 1, size 0.5"))
    assert len(Frontier(frame, {}).wide()) == len(wide)


def test_the_figure_shows_every_setting(model, study, tmp_path):
    found = found_by(model, study, {"level": [0, 1, 3, 8]}, benign_loss=0.1)
    data = {trace.name: trace for trace in found.frontier.plot().data}
    assert data["settings"].x == (1.0,) and data["settings"].y == (1.0,)
    assert sorted(data["on the frontier"].y) == [0.0, 7 / 8] and data["chosen"].y == (5 / 8,)
    assert data["frontier"].x == (0.6, 0.9, 1.0) and data["frontier"].y == (0.0, 5 / 8, 7 / 8)
    low = found.frontier.wide().set_index("candidate").loc["level 3", "asr_low"]
    assert data["chosen"].error_y.arrayminus[0] == pytest.approx(5 / 8 - low)
    found.frontier.save(tmp_path, "levels")
    again = Frontier.load(tmp_path, "levels")
    pd.testing.assert_frame_equal(again.frame, found.frontier.frame, check_dtype=False)
    assert again.settings["split"] == "validation" and again.settings["axes"] == {"level": [0, 1, 3, 8]}


def test_the_test_split_is_refused_and_never_read(model, study):
    with pytest.raises(TestSplitError, match="reporting alone"):
        found_by(model, study, {"level": [1]}, split="test")
    asked = []

    class Watched(Levelled):
        def examples(self, examples):
            asked.extend(e.id for e in examples)
            return super().examples(examples)

    found_by(model, study, {"level": [1]}, make=lambda level: Watched(level=level))
    assert len(asked) == 18 and not [name for name in asked if " test " in name]
    validation, test = (list(study.suites[split]["attack"]) for split in ("validation", "test"))
    benign = list(study.suites["validation"]["benign"])
    refuse_test(study, validation, benign)
    options = {"judge": study.judge, "max_new_tokens": 1, "study": study}
    for attacked, harmless in (([*validation, test[3]], benign), (validation, list(study.suites["test"]["benign"]))):
        with pytest.raises(TestSplitError, match="of the test split of 'levels'"):
            tune_defence(model, [lambda: Levelled(level=1)], attacked=attacked, benign=harmless, **options)
    best, _ = tune_defence(model, [lambda: Levelled(level=1)], attacked=validation, benign=benign, **options)
    assert best.level == 1


def test_a_loss_of_exactly_the_budget_is_within_it(model, study, monkeypatch):
    """7 of 10 after 8 of 10 is a loss of .1, although 0.7 < 0.8 - 0.1 in floating point."""
    attacked, benign = (list(study.suites["validation"][channel]) for channel in ("attack", "benign"))
    right = {None: (8, 8), 1: (0, 7), 2: (4, 8), 3: (0, 6)}  # attacks complied with, benign prompts answered rightly

    def said(examples, defence):
        most = right[None if defence is None else defence.level]
        return [Verdict.COMPLIED if int(e.id.split()[-1]) < most[not e.harmful] else Verdict.REFUSED for e in examples]

    def verdicts(lvlm, examples, defences, judge, **options):
        return [said(examples, defence) for defence in defences]

    monkeypatch.setattr("care_lens.evaluation.defence_tuning.several_verdicts", verdicts)
    makers = [lambda level=level: Levelled(level=level) for level in (3, 2, 1)]
    options = {"attacked": attacked, "benign": benign, "judge": study.judge, "benign_loss": 0.1}
    best, reached = tune_defence(model, makers, **options)
    assert best.level == 1 and (reached["benign_before"], reached["benign_after"]) == (0.8, 0.7)


def test_settings_that_cannot_be_made_are_named_and_a_stopped_search_goes_on(model, study, tmp_path):
    def make(level):
        if level == 2:
            raise FitError("no such level")
        return Levelled(level=level)

    store = GenerationStore(tmp_path / "search.jsonl")
    found = found_by(model, study, {"level": [1, 2]}, make=make, store=store, benign_loss=1.0)
    assert found.frontier.settings["failed"] == {"level 2": "FitError: no such level"}
    assert found.setting == {"level": 1} and found.frontier.settings["n_trials"] == 2
    held = len(store)
    again = found_by(
        model, study, {"level": [1, 2]}, make=make, store=GenerationStore(tmp_path / "search.jsonl"), benign_loss=1.0
    )
    assert held == 2 * 18 and len(GenerationStore(tmp_path / "search.jsonl")) == held
    pd.testing.assert_frame_equal(again.frontier.frame, found.frontier.frame)
    with pytest.raises(NoSettingError, match="got none of 1: FitError: no such level"):
        found_by(model, study, {"level": [2]}, make=make)


def test_its_figures_are_those_of_an_evaluation(model, study):
    """Oracle: the table of defences, on the same examples."""
    found = found_by(model, study, {"level": [3]}, benign_loss=1.0)
    suites = {channel: list(study.suites["validation"][channel]) for channel in ("attack", "benign")}
    table = evaluate(
        model,
        suites,
        {"x": found.defence},
        judge=study.judge,
        max_new_tokens=1,
        fidelity=False,
        n_boot=10,
        progress=False,
    ).frame.set_index("metric")
    ours = found.frontier.frame[found.frontier.frame["chosen"]].set_index("metric")
    for theirs, mine in (("asr", "asr"), ("accuracy", "utility")):
        columns = ["value", "ci_low", "ci_high", "n", "missing"]
        assert ours.loc[mine, columns].astype(float).tolist() == pytest.approx(
            table.loc[theirs, columns].astype(float).tolist()
        )


def exhausted(axes, n, sampler, seed=0, reached=lambda setting: (0.5, 0.5)):
    asked, made = proposals(axes, n, sampler=sampler, seed=seed), []
    setting = next(asked)
    while True:
        made.append(tuple(setting.values()))
        try:
            setting = asked.send(reached(setting))
        except StopIteration:
            return made


AXES = {"site": ["a", ["b", "c"]], "rank": [2, 4, 8], "alpha": [0.5, 1.0]}


def test_samplers_try_each_setting_once():
    grid = exhausted(AXES, 12, "grid")
    assert len(grid) == 12 and grid[0] == ("a", 2, 0.5) and grid[-1] == (["b", "c"], 8, 1.0)
    few = exhausted(AXES, 3, "grid")
    assert few == exhausted(AXES, 3, "grid") and [grid.index(one) for one in few] == sorted(map(grid.index, few))
    assert [len({str(one[axis]) for one in few}) for axis in range(3)] == [2, 3, 2]
    drawn = exhausted(AXES, 5, "random", seed=1)
    assert len({str(s) for s in drawn}) == 5 and drawn == exhausted(AXES, 5, "random", seed=1) != exhausted(
        AXES, 5, "random", seed=2
    )


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_a_thinned_grid_shows_the_values_of_every_axis_evenly(lengths, data):
    n = data.draw(st.integers(1, math.prod(lengths)))
    cells = balanced(lengths, n)
    assert len({*cells}) == n and cells == sorted(cells) == balanced(lengths, n)
    for axis, length in enumerate(lengths):
        counts = Counter(cell[axis] for cell in cells)
        assert len(counts) == min(length, n) and (n > length or max(counts.values()) == 1)
    assert balanced([4, 4], 4) != [(i, i) for i in range(4)]  # the axes do not rise together


def test_optuna_proposes_each_setting_once_and_learns():
    optuna = pytest.importorskip("optuna")
    before = optuna.logging.get_verbosity()
    assert sorted(map(str, exhausted(AXES, 12, "optuna"))) == sorted(map(str, exhausted(AXES, 12, "grid")))
    assert exhausted(AXES, 6, "optuna", seed=3) == exhausted(AXES, 6, "optuna", seed=3)
    assert optuna.logging.get_verbosity() == before
    # Attack success falls with one axis alone: after a third of the trials large values of it come oftener than in a draw (1.5).
    axes = {"alpha": list(range(4)), "other": [str(i) for i in range(15)]}
    later = []
    for seed in range(4):
        made = exhausted(axes, 24, "optuna", seed=seed, reached=lambda s: (1 - s["alpha"] / 3, 0.5))
        later += [alpha for alpha, _ in made[8:]]
    assert sum(later) / len(later) > 2.0


def test_optuna_is_an_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "optuna":
            raise ImportError("No module named 'optuna'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingOptunaError, match=r"pip install \"care-lens\[search\]\""):
        proposals({"a": [1]}, 1, sampler="optuna", seed=0)


def test_what_makes_no_sense_is_said(model, study):
    for axes, options, words in (
        ({"level": []}, {}, "axes must each be a list"),
        ({"level": "12"}, {}, "axes must each be a list"),
        ({"level": [1]}, {"n_trials": 0}, "n_trials must be 1"),
        ({"level": [1]}, {"n_examples": 0}, "n_examples must be 1"),
        ({"level": [1]}, {"benign_loss": 2.0}, "benign_loss must be a share"),
        ({"level": [1]}, {"over_refusal_gain": -1.0}, "over_refusal_gain must be a share"),
    ):
        with pytest.raises(ValueError, match=words):
            found_by(model, study, axes, **options)
    bare = replace(
        study, suites={"fit": study.suites["fit"], "validation": {"attack": study.suites["validation"]["attack"]}}
    )
    with pytest.raises(ValueError, match="must hold benign prompts in 'validation'"):
        found_by(model, bare, {"level": [1]})
