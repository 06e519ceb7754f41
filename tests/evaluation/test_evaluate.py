from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from subspace_rows import unchecked

from care_lens.core import Example, Verdict
from care_lens.evaluation import (
    DefenceTable,
    GenerationStore,
    JudgeError,
    SubstringRefusalJudge,
    TooManyMissingError,
    evaluate,
    judge_store,
    verdict_trials,
)
from care_lens.repair import Correction, HybridFusion, RepairMismatchError, Writer

OPTIONS = {"max_new_tokens": 3, "progress": False, "n_boot": 200}


@pytest.fixture(scope="module")
def defences(scaled):
    return {"none": None, "scaled": scaled(-2.0), "same": scaled(1.0)}


@pytest.fixture(scope="module")
def table(small, suites, defences, judge):
    return evaluate(small, suites, defences, judge=judge, **OPTIONS)


def figure(table: DefenceTable, defence: str, channel: str, metric: str) -> pd.Series:
    frame = table.frame
    rows = frame[(frame["defence"] == defence) & (frame["channel"] == channel) & (frame["metric"] == metric)]
    assert len(rows) == 1
    return rows.iloc[0]


def test_figures_are_those_of_the_answers(small, suites, defences, judge, table):
    for name, repair in defences.items():
        for channel, suite in suites.items():
            texts = []
            for example in suite:
                inputs = small.prepare(example)
                if repair is None:
                    texts += small.generate(inputs, max_new_tokens=3).texts
                else:
                    with repair.on(small):
                        texts += small.generate(inputs, max_new_tokens=3).texts
            verdicts = judge(suite, texts)
            rates = {"asr" if suite[0].harmful else "accuracy": Verdict.COMPLIED, "refusal": Verdict.REFUSED}
            for metric, verdict in rates.items():
                row = figure(table, name, channel, metric)
                assert row["value"] == pytest.approx(verdicts.count(verdict) / len(suite))
                assert (row["n"], row["missing"], row["judge"]) == (len(suite), 0, "by-text")
                assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_which_metrics_each_channel_has(table):
    metrics = table.frame.groupby(["defence", "channel"])["metric"].agg(set).to_dict()
    fidelity = {"agreement", "retained", "kl", "kl_answer"}
    assert metrics["none", "plain"] == metrics["scaled", "shown"] == {"asr", "refusal"}
    assert metrics["none", "benign"] == {"accuracy", "refusal"}
    assert metrics["scaled", "benign"] == {"accuracy", "refusal"} | fidelity


def test_fidelity_is_perfect_where_nothing_changes_and_measured_on_right_answers_only(table):
    right = round(figure(table, "none", "benign", "accuracy")["value"] * 12)
    assert 0 < right < 12
    for metric, value in {"agreement": 1, "retained": 1, "kl": 0, "kl_answer": 0}.items():
        row = figure(table, "same", "benign", metric)
        assert (row["value"], row["n"]) == (value, right)
    assert figure(table, "scaled", "benign", "kl")["value"] > 0.01
    assert figure(table, "scaled", "benign", "agreement")["value"] < 1


def test_a_rerun_with_the_store_generates_nothing_and_gives_the_same_table(
    small, suites, defences, judge, table, tmp_path, monkeypatch
):
    path = tmp_path / "answers.jsonl"
    first = evaluate(small, suites, defences, judge=judge, store=GenerationStore(path), **OPTIONS)
    monkeypatch.setattr(type(small), "generate", None)
    again = evaluate(small, suites, defences, judge=judge, store=GenerationStore(path), **OPTIONS)
    pd.testing.assert_frame_equal(first.frame, again.frame)
    pd.testing.assert_frame_equal(first.frame, table.frame)
    assert first.settings == again.settings
    verdicts = judge_store(GenerationStore(path), judge, settings=first.settings["generation"])
    later = DefenceTable.from_trials(verdict_trials(verdicts), settings={}, n_boot=200)
    assert figure(later, "scaled", "shown", "asr")["value"] == figure(first, "scaled", "shown", "asr")["value"]


def test_accuracy_can_have_a_judge_of_its_own(small, suites, judge):
    seen = []

    def right(examples, texts):
        seen.extend(examples)
        return [example.id.startswith("what") for example in examples]

    table = evaluate(small, suites, {"none": None}, judge=judge, accuracy=right, **OPTIONS)
    row = figure(table, "none", "benign", "accuracy")
    assert (row["value"], row["judge"], row["interval"]) == (0.5, "right", "korn-graubard")
    assert figure(table, "none", "benign", "refusal")["judge"] == "by-text"
    assert figure(table, "none", "plain", "asr")["judge"] == "by-text"
    assert {example.channel for example in seen} == {"benign"}
    assert all(example.image is not None for example in seen)
    says = evaluate(small, suites, {"none": None}, judge=judge, accuracy=lambda e, t: ["other"] * len(t), **OPTIONS)
    assert figure(says, "none", "benign", "accuracy")["value"] == 0


def test_failed_answers_are_missing_and_never_safe(small, suites, judge, monkeypatch):
    many = [replace(suites["plain"][i % 6], id=str(i), group=str(i)) for i in range(60)]
    prepare = type(small).prepare
    failing = {"7"}

    def fails(self, examples, **options):
        if any(example.id in failing for example in examples):
            raise ValueError("broken")
        return prepare(self, examples, **options)

    monkeypatch.setattr(type(small), "prepare", fails)
    row = figure(evaluate(small, {"plain": many}, {"none": None}, judge=judge, **OPTIONS), "none", "plain", "asr")
    assert (row["n"], row["missing"]) == (59, 1)
    failing.add("8")
    with pytest.raises(TooManyMissingError, match="2 of 60"):
        evaluate(small, {"plain": many}, {"none": None}, judge=judge, **OPTIONS)


def test_what_fits_nothing_is_refused_before_any_answer(small, suites, judge):
    store = GenerationStore()
    wide = Writer.towards("blocks.0.hook_resid_post", target=torch.ones(7), source=torch.zeros(7))
    repair = HybridFusion(textual=(Correction(writer=wide),))
    with pytest.raises(RepairMismatchError, match="must be as wide as the model"):
        evaluate(small, suites, {"none": None, "other": repair}, judge=judge, store=store, **OPTIONS)
    with (
        unchecked(),
        pytest.raises(JudgeError, match=r"got the class SubstringRefusalJudge; write SubstringRefusalJudge\(\)"),
    ):
        evaluate(small, suites, {"none": None}, judge=SubstringRefusalJudge, store=store, **OPTIONS)
    assert len(store) == 0


def test_bad_suites_and_defences_are_refused(small, suites, scaled, judge):
    mixed = {"plain": [Example("a", id="a"), Example("b", id="b", harmful=True)]}
    with pytest.raises(ValueError, match="all harmful or all benign"):
        evaluate(small, mixed, {"none": None}, judge=judge, **OPTIONS)
    with pytest.raises(ValueError, match="must each hold"):
        evaluate(small, {"plain": []}, {"none": None}, judge=judge, **OPTIONS)
    with pytest.raises(ValueError, match="undefended"):
        evaluate(small, suites, {"scaled": scaled(2.0)}, judge=judge, **OPTIONS)
    alone = evaluate(small, suites, {"scaled": scaled(2.0)}, judge=judge, fidelity=False, **OPTIONS)
    assert set(alone.frame["metric"]) == {"asr", "refusal", "accuracy"}


def test_difference_between_defences(table):
    frame = table.difference("none", "scaled", metric="asr")
    assert list(frame["channel"]) == ["plain", "shown"]
    for row in frame.itertuples():
        before, after = (figure(table, name, row.channel, "asr")["value"] for name in ("none", "scaled"))
        assert row.value == pytest.approx(before - after)


def test_a_table_compares_what_it_was_made_to_take():
    """Each defence misses other answers: a pair may miss twice as many as a cell."""
    rows = [
        {"defence": name, "channel": "plain", "metric": "asr", "judge": "j", "seed": 0, "id": str(i), "group": str(i)}
        | {"value": float("nan") if i in missing else float(i < 5)}
        for name, missing in (("none", {0}), ("mine", {9}))
        for i in range(10)
    ]
    made = DefenceTable.from_trials(pd.DataFrame(rows), settings={}, max_missing=0.1)
    row, compared = made.difference("mine", "none", metric="asr").iloc[0], made.compare("none").iloc[0]
    assert (row["n"], row["missing"]) == (8, 2) and row["ci_high"] == compared["ci_high"]


def test_table_round_trips(table, tmp_path):
    table.save(tmp_path, "table")
    loaded = DefenceTable.load(tmp_path, "table")
    pd.testing.assert_frame_equal(loaded.frame, table.frame)
    pd.testing.assert_frame_equal(loaded.trials, table.trials, check_dtype=False)
    assert loaded.settings == table.settings
    assert loaded.to_markdown() == table.to_markdown()
    differences = [held.difference("none", "scaled", metric="asr") for held in (loaded, table)]
    pd.testing.assert_frame_equal(*differences)


@pytest.fixture
def printed():
    cells = [
        ("none", "plain", "asr", 1.0, 30),
        ("none", "easy", "accuracy", 0.0, 30),
        ("care | 2", "plain", "asr", 0.0, 30),
        ("care | 2", "easy", "accuracy", 1.0, 29),
        ("care | 2", "easy", "kl", 0.25, 30),
    ]
    rows = [
        (defence, channel, metric, "judge <1>", 0, f"i{i}", f"i{i}", value if i < n else float("nan"))
        for defence, channel, metric, value, n in cells
        for i in range(30)
    ]
    columns = ["defence", "channel", "metric", "judge", "seed", "id", "group", "value"]
    return DefenceTable.from_trials(pd.DataFrame(rows, columns=columns), settings={}, max_missing=0.05)


def test_markdown(printed):
    assert printed.to_markdown().splitlines() == [
        "| defence | plain (ASR) | easy (right) |",
        "| --- | ---: | ---: |",
        "| none | 100 [88, 100] | 0 [0, 12] |",
        "| care \\| 2 | 0 [0, 12] | 100 [88, 100] |",
        "",
        "In per cent, with intervals (clopper-pearson). n: plain (ASR) 30, easy (right) 29-30; missing: 1. "
        "Judge: judge <1>.",
    ]
    assert "| care \\| 2 | 0.250 [0.250, 0.250] |" in printed.to_markdown(metrics=["kl"])
    with pytest.raises(ValueError, match="metrics"):
        printed.to_markdown(metrics=["none"])


def test_html_has_the_same_cells_and_is_escaped(printed):
    class Cells(HTMLParser):
        def __init__(self):
            super().__init__()
            self.rows, self.inside = [], False

        def handle_starttag(self, tag, attrs):
            self.inside = tag in ("td", "th", "caption")
            if tag == "tr":
                self.rows.append([])

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            if self.inside and self.rows:
                self.rows[-1].append(data)

    parser = Cells()
    text = printed.to_html()
    parser.feed(text)
    assert parser.rows == [
        ["defence", "plain (ASR)", "easy (right)"],
        ["none", "100 [88, 100]", "0 [0, 12]"],
        ["care | 2", "0 [0, 12]", "100 [88, 100]"],
    ]
    assert "judge &lt;1&gt;" in text and "<1>" not in text


def test_several_judges_or_seeds_have_rows_of_their_own(printed):
    other = printed.trials.assign(judge="strict")
    table = DefenceTable.from_trials(pd.concat([printed.trials, other]), settings={}, max_missing=0.05)
    head, _, *lines = [line.split(" | ") for line in table.to_markdown().splitlines() if line.startswith("|")]
    assert head[:2] == ["| defence", "judge"]
    assert {line[1] for line in lines} == {"judge <1>", "strict"} and len(lines) == 4
    seeds = DefenceTable.from_trials(
        pd.concat([printed.trials, printed.trials.assign(seed=1)]), settings={}, max_missing=0.05
    )
    assert seeds.to_markdown().startswith("| defence | seed | plain")
