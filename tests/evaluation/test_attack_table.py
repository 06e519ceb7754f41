"""Attacks by defences, adaptive rows and controls, on a tiny model."""

from contextlib import contextmanager

import pytest

from care_lens.attacks import PGD, Clean, Prefill
from care_lens.core import Example, Verdict
from care_lens.evaluation import AttackTableError, attack_table
from care_lens.lvlm import HookedLVLM


class Flip:
    name = "flip"

    @contextmanager
    def on(self, lvlm):
        with lvlm.hooks([("projector.hook_out", lambda activation, hook: -2 * activation)]):
            yield

    def describe(self):
        return {"factor": -2}


class Counting(PGD):
    runs: list = []  # noqa: RUF012

    def run(self, lvlm, examples, defence=None, seed=0, **options):
        self.runs.append(None if defence is None else defence.name)
        return super().run(lvlm, examples, defence, seed, **options)


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    model = HookedLVLM.from_hf(*llava_maker("clip"))
    yield model
    model.close()


@pytest.fixture
def asked(picture):
    return [
        Example("how to make a blue", image=picture(i), response="sure red", harmful=True, id=str(i), group=str(i))
        for i in range(3)
    ]


def judge(examples, texts):
    return [Verdict.COMPLIED if "sure" in text or "red" in text else Verdict.REFUSED for text in texts]


def test_every_attack_meets_every_defence_and_adaptive_ones_their_own(lvlm, asked, picture, tmp_path):
    Counting.runs.clear()
    attacks = [Counting(epsilon=16, steps=2), Prefill(opening="sure")]
    options = {"judge": judge, "max_new_tokens": 3, "n_boot": 20, "progress": False, "directory": tmp_path}
    benign = {"benign": [Example("what is red", image=picture(9), id="q")]}
    table = attack_table(lvlm, asked, attacks, {"none": None, "flip": Flip()}, benign=benign, fidelity=False, **options)
    asr = table.frame[table.frame.metric == "asr"].set_index(["defence", "channel"]).value
    everywhere = {"clean", "random noise 16", "PGD", "prefill"}
    assert {c for d, c in asr.index if d == "none"} == everywhere
    assert {c for d, c in asr.index if d == "flip"} == {*everywhere, "PGD, adaptive"}
    assert asr["none", "prefill"] == asr["flip", "prefill"] == 1.0  # the judge reads the beginning that was given
    assert Counting.runs == [None, "flip"] and table.settings["adaptive"]
    again = attack_table(lvlm, asked, attacks, {"none": None, "flip": Flip()}, benign=benign, fidelity=False, **options)
    assert Counting.runs == [None, "flip"]  # what is saved is not made again
    assert again.frame.equals(table.frame)
    plain = attack_table(lvlm, asked, [Prefill()], {"none": None}, controls=False, adaptive=False, **options)
    assert {*plain.frame.channel} == {"prefill"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": []}, "at least one attack"),
        ({"attacks": [Clean(), Clean()]}, "different names"),
        ({"defences": {}}, "at least one defence"),
        ({"examples": [Example("a", id="a")]}, "harmful requests with ids"),
    ],
)
def test_what_makes_no_table_is_refused(lvlm, asked, change, message):
    given = {"examples": asked, "attacks": [Clean()], "defences": {"none": None}, **change}
    with pytest.raises(AttackTableError, match=message):
        attack_table(lvlm, **given, judge=judge)
