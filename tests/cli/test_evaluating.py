"""The command ``evaluate``: saved repairs and defences on the test split, against tables made by hand."""

import pytest
from typer.testing import CliRunner

from care_lens import cli, organism
from care_lens.cli.asked import Asked
from care_lens.core import Verdict
from care_lens.data import Study
from care_lens.defences import SelfReminder
from care_lens.evaluation import DefenceTable


@pytest.fixture(scope="module")
def study():
    def few(split):
        counts = {"plain": 3, "benign plain": 3} if split != "calibration" else {"benign plain": 3}
        return {channel: tuple(organism.examples(channel, split, n=n)) for channel, n in counts.items()}

    return Study(
        name="few",
        suites={split: few(split) for split in ("fit", "calibration", "validation", "test")},
        seen={"textual": ("plain",)},
        judge=organism.OrganismJudge(),
        outcome=organism.outcome(),
        refusal="sorry i cannot help with that",
        plain="plain",
    )


def test_each_defence_is_a_row_and_one_that_is_added_costs_its_own_answers(study, tmp_path, monkeypatch):
    reminders = {"first": SelfReminder(before="please", after=""), "second": SelfReminder(before="", after="please")}
    for name, reminder in reminders.items():
        reminder.save(tmp_path / name)
    monkeypatch.setattr(Asked, "load", lambda _: (organism.load(), study))
    asked: list[str] = []
    generate = organism.load().__class__.generate
    monkeypatch.setattr(
        organism.load().__class__,
        "generate",
        lambda self, inputs, *a, **k: asked.append("once") or generate(self, inputs, *a, **k),
    )

    def called(*defences):
        asked.clear()
        words = ["evaluate", *defences, "--threads", "1", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return DefenceTable.load(tmp_path / "out", "evaluate").frame, len(asked)

    frame, first = called(str(tmp_path / "first"))
    assert set(frame["defence"]) == {"none", "first"}
    more, second = called(str(tmp_path / "first"), f"other={tmp_path / 'second'}")
    assert list(dict.fromkeys(more["defence"])) == ["none", "first", "other"] and 0 < second < first
    written = (tmp_path / "out" / "evaluate.md").read_text()
    assert all(f"| {name} |" in written for name in ("none", "first", "other"))
    with organism.load() as lvlm:
        for name, reminder in {"none": None, "first": reminders["first"], "other": reminders["second"]}.items():
            plain = list(study.suites["test"]["plain"])
            given = plain if reminder is None else reminder.examples(plain)
            texts = lvlm.generate(lvlm.prepare(given), max_new_tokens=14).texts
            share = sum(v is Verdict.COMPLIED for v in study.judge(plain, texts)) / len(plain)
            row = more[(more.defence == name) & (more.channel == "plain") & (more.metric == "asr")].iloc[0]
            assert row["value"] == share and row["n"] == len(plain)


def test_what_is_wrong_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(organism, "load", lambda **_: pytest.fail("loaded"))
    SelfReminder(before="please", after="").save(tmp_path / "mine")
    mine = str(tmp_path / "mine")
    for words, message in (
        ([], "Missing argument"),
        ([mine, mine], "different names"),
        ([f"none={mine}"], "different names"),
        ([mine, str(tmp_path)], "defence must be a folder"),
    ):
        result = CliRunner().invoke(cli.app, ["evaluate", *words, "--out", str(tmp_path)], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
