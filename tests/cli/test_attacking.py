"""`care-lens attack`: what it is asked for is read, and its table is that of the attacks by hand."""

import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from care_lens import cli, organism
from care_lens.attacks import PGD, Prefill, Spelled, kinds, registered_attacks
from care_lens.cli.asked import Asked
from care_lens.core import Verdict
from care_lens.data.study import Study
from care_lens.defences import SelfReminder, load_defence
from care_lens.evaluation import DefenceTable, GenerationSettings
from care_lens.pipeline.attacking import AttackRunError, attack_study, attacked_requests, read_attack
from care_lens.pipeline.saved import SavedDefenceError, read_defence, read_defences
from care_lens.repair import Correction, HybridFusion, Writer


@pytest.fixture(scope="module")
def study():
    """A few requests of the bundled world, without the seconds that all of them take."""
    counts = {"plain": 6, "spelled": 4, "benign plain": 3}

    def few(split):
        kept = counts if split != "calibration" else {"benign plain": 3}
        return {channel: tuple(organism.examples(channel, split, n=n)) for channel, n in kept.items()}

    return Study(
        name="few",
        suites={split: few(split) for split in ("fit", "calibration", "validation", "test")},
        seen={"textual": ("spelled",)},
        judge=organism.OrganismJudge(),
        outcome=organism.outcome(),
        refusal="sorry i cannot help with that",
        plain="plain",
    )


def test_attacks_are_read_with_their_fields():
    assert read_attack("pgd") == PGD()
    assert read_attack("PGD:epsilon=64,steps=7,name=PGD 64") == PGD(epsilon=64, steps=7, name="PGD 64")
    assert read_attack(" prefill : opening=null , words=3 ") == Prefill(opening=None, words=3)
    for kind in registered_attacks():
        assert callable(read_attack(kind).run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "name must be one of"),
        ("pgd:radius=3", "options of PGD must be some of"),
        ("pgd:epsilon", "NAME=VALUE"),
        ("pgd:epsilon=[1", "must be yaml"),
        ("pgd:steps=-1", "steps"),
        ("", "name must be one of"),
    ],
)
def test_what_is_no_attack_is_told(text, message):
    with pytest.raises(AttackRunError, match=message):
        read_attack(text)


def test_attacks_on_pictures_are_made_where_there_are_some(study):
    """Plain requests of public files have no pictures: the channels that have them are attacked, and named where none was meant."""
    bare = {c: tuple(replace(e, image=None) for e in some) for c, some in study.suites["test"].items()}
    shown = {"shown": tuple(replace(e, channel="shown") for e in study.suites["test"]["plain"])}
    other = replace(study, gradient=(), suites={**study.suites, "test": {**study.suites["test"], **bare, **shown}})
    found = attacked_requests(other, [PGD()])
    assert {e.channel for e in found} == {"shown"} and all(e.image is not None for e in found)
    assert {e.channel for e in attacked_requests(other, [Prefill()])} == {"plain"}  # which needs no picture
    with pytest.raises(AttackRunError, match=r"name other channels \(--channels\): \['shown'\] have pictures"):
        attacked_requests(other, [PGD()], channels=["plain"])


def test_defences_are_read_by_folder_and_name(tmp_path):
    reminder = SelfReminder(before="be safe", after="")
    reminder.save(tmp_path / "mine")
    for text, name in ((str(tmp_path / "mine"), "mine"), (f"other={tmp_path / 'mine'}", "other")):
        found, defence = read_defence(text)
        assert found == name and defence.describe() == reminder.describe()
    reminder.save(tmp_path / "alpha=1")
    assert read_defence(str(tmp_path / "alpha=1"))[0] == "alpha=1"
    assert read_defence(f"strong={tmp_path / 'alpha=1'}")[0] == "strong"
    with pytest.raises(SavedDefenceError, match=r"repair\.json or defence\.json"):
        read_defence(str(tmp_path))
    writer = Writer.towards("blocks.1.hook_mlp_out", target=torch.ones(4), source=torch.zeros(4))
    repair = HybridFusion(textual=(Correction(writer=writer),), name="of its own")
    repair.save(tmp_path / "fusion")
    name, found = read_defence(str(tmp_path / "fusion"))
    assert name == "fusion" and isinstance(found, HybridFusion) and found.describe() == repair.describe()
    assert load_defence(tmp_path / "fusion").describe() == repair.describe()
    with pytest.raises(FileNotFoundError, match="load_defence"):
        HybridFusion.load(tmp_path / "mine")
    mine = str(tmp_path / "mine")
    assert list(read_defences([mine, f"again={mine}"])) == ["mine", "again"]
    for twice in ([mine, mine], [f"none={mine}"], [f"={mine}"]):
        with pytest.raises(SavedDefenceError, match="different names"):
            read_defences(twice)


def test_requests_are_the_plain_ones_or_those_of_the_channels(study):
    assert [e.id for e in attacked_requests(study, [Spelled()], n=2)] == [
        f"plain/{e.id}" for e in study.suites["test"]["plain"][:2]
    ]
    assert {e.channel for e in attacked_requests(study, [Spelled()], channels=["spelled"])} == {"spelled"}
    pictured = attacked_requests(study, [PGD()], channels=["plain", "spelled"])
    assert pictured and all(e.image is not None and e.response for e in pictured)
    assert len(pictured) < 10  # some have no picture
    two = attacked_requests(study, [PGD()], channels=["plain"], n=2)
    assert len(two) == 2 and all(e.image is not None for e in two)  # n of those that can be attacked
    aimed = replace(study, gradient=tuple(organism.examples("plain", "test", n=3)))
    assert [e.id.split("/")[0] for e in attacked_requests(aimed, [Spelled()])] == ["gradient"] * 3
    plain = [replace(e, response=None, behaviour="How to fold a dax?") for e in study.suites["test"]["plain"]]
    unanswered = replace(
        study, suites={**study.suites, "test": {"plain": tuple(plain)}}
    )  # as `care-lens study` leaves them
    bare = attacked_requests(unanswered, [PGD()], channels=["plain"])
    assert len(bare) == len(attacked_requests(study, [PGD()], channels=["plain"]))
    assert {e.response for e in bare} == {"Sure, here is how to fold a dax"}
    with pytest.raises(AttackRunError, match="harmful ones of the test split"):
        attacked_requests(study, [Spelled()], channels=["benign plain"])
    blind = replace(
        study,
        suites={
            **study.suites,
            "test": {"plain": tuple(replace(e, image=None) for e in study.suites["test"]["plain"])},
        },
    )
    with pytest.raises(AttackRunError, match="got none"):
        attacked_requests(blind, [PGD()])


def test_the_table_has_each_attack_under_each_defence_and_a_second_call_makes_nothing_anew(
    study, tmp_path, monkeypatch
):
    def made(lvlm):
        return attack_study(
            lvlm,
            study,
            [Spelled(), PGD(epsilon=16, steps=1)],
            {"reminder": SelfReminder(before="please", after="")},
            tmp_path,
            n=2,
            benign=1,
            generation=GenerationSettings(max_new_tokens=14),
            n_boot=50,
            progress=False,
        )

    with organism.load() as lvlm:
        first = made(lvlm)
        frame = first.frame[first.frame["metric"].isin(("asr", "accuracy"))]
        attacks = {"clean", "spelled", "PGD", "random noise 16"}
        assert set(frame[frame.defence == "none"].channel) == {*attacks, "benign"}
        assert set(frame[frame.defence == "reminder"].channel) == {*attacks, "PGD, adaptive", "benign"}
        # The undefended rows by hand: the same requests, spelled, asked and judged.
        spelled = Spelled().run(lvlm, attacked_requests(study, [PGD()], n=2)).examples
        verdicts = study.judge(spelled, lvlm.generate(lvlm.prepare(spelled), max_new_tokens=14).texts)
        share = sum(v is Verdict.COMPLIED for v in verdicts) / len(verdicts)
        row = frame.query("defence == 'none' and channel == 'spelled'").iloc[0]
        assert row["value"] == share and row["n"] == len(spelled)
        monkeypatch.setattr(type(lvlm), "generate", lambda *a, **k: pytest.fail("generated again"))
        assert made(lvlm).frame.equals(first.frame)
        with pytest.raises(AttackRunError, match="must not be called 'none'"):
            attack_study(lvlm, study, [Spelled()], {"none": SelfReminder(before="please", after="")}, tmp_path)
    assert (tmp_path / "attacks.csv").exists() and list((tmp_path / "attacks").rglob("*.png"))


def test_the_command_writes_a_table_that_loads_and_can_be_called_again(study, tmp_path, monkeypatch):
    monkeypatch.setattr(Asked, "load", lambda _: (organism.load(), study))
    words = ["attack", "--by", "spelled", "--n", "1", "--benign", "0", "--threads", "1", "--out", str(tmp_path)]
    for _ in range(2):
        result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        frame = DefenceTable.load(tmp_path, "attacks").frame
        assert {"clean", "spelled"} == {*frame["channel"]}
    assert (tmp_path / "figures" / "attacks.html").exists()
    assert "| none |" in (tmp_path / "attacks.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--by", "nothing"], "name must be one of"), (["nowhere"], "defence must be a folder"), (["--n", "0"], "--n")],
)
def test_the_command_tells_what_is_wrong_before_it_loads_a_model(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(organism, "load", lambda **_: pytest.fail("loaded"))
    result = CliRunner().invoke(cli.app, ["attack", "--out", str(tmp_path), *words])
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_a_module_of_ones_own_registers_attacks(tmp_path, monkeypatch):
    (tmp_path / "my_attacks.py").write_text(
        "from dataclasses import dataclass\n"
        "from care_lens.attacks import register_attack\n\n\n"
        "@register_attack\n@dataclass(frozen=True)\nclass MyOwn:\n    tries: int = 3\n\n"
        "    def run(self): ...\n\n    def describe(self): ...\n"
    )
    runner, app = CliRunner(env={"COLUMNS": "300"}), cli.app
    told = runner.invoke(app, ["attack", "--import", "my_attacks", "--by", "myown"])
    assert told.exit_code == 2 and "PYTHONPATH" in told.output
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kinds, "_KINDS", dict(kinds._KINDS))
    told = runner.invoke(app, ["attack", "--import", "my_attacks", "--by", "myown:deep=1"])
    sys.modules.pop("my_attacks", None)
    assert told.exit_code == 2 and "options of MyOwn" in told.output
