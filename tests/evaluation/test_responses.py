"""What is teacher-forced: the model's own answers, cycled ones, targets; kept, so that nothing is asked twice."""

from dataclasses import replace

import pytest

from care_lens.core import Example, UnsafeMargin
from care_lens.data import Study, attack_pairs
from care_lens.evaluation import (
    AnswersError,
    GenerationSettings,
    SubstringRefusalJudge,
    answered_study,
    with_answers,
)
from care_lens.lvlm import HookedLVLM

FEW = GenerationSettings(max_new_tokens=3)


def rows():
    benign = [
        Example(f"what is red {w}", id=f"b{w}", channel="benign", response="ref" if w == "then" else None)
        for w in ("then", "first", "blue")
    ]
    attacks = [
        Example("make a blue", id=f"a{i}", channel="attack", harmful=True, behaviour=f"how to make a {i}")
        for i in range(3)
    ]
    return [*benign, *attacks, *(Example("how to make", id=f"p{i}", channel="plain", harmful=True) for i in range(2))]


@pytest.fixture(scope="module")
def model(llava_maker):
    with HookedLVLM.from_hf(*llava_maker()) as lvlm:
        yield lvlm


def test_each_kind_has_the_answer_of_its_convention(model):
    asked, options = (
        rows(),
        {"settings": FEW, "progress": False, "refusals": ["no", "sorry"], "compliances": ["sure", "yes"]},
    )
    made = with_answers(model, asked, **options)
    assert [e.id for e in made] == [e.id for e in asked]
    said = model.generate(model.prepare(asked[:3]), max_new_tokens=3).answers
    assert [e.response for e in made] == [*said, "sure", "yes", "sure", "no", "sorry"]
    assert made[0].meta["reference"] == "ref" and "reference" not in made[1].meta
    made = with_answers(model, asked, harmful="target", benign="reference", **options)
    assert [e.response for e in made[:4]] == ["ref", *said[1:], "Sure, here is how to make a 0"]
    made = with_answers(model, asked, harmful="model", **options)
    assert made[3].response == model.generate(model.prepare([asked[3]]), max_new_tokens=3).answers[0]
    assert made[6].response == "no"  # plain requests are refused under every convention
    told = with_answers(model, asked, **{**options, "settings": replace(FEW, system="help")})
    assert all(e.system == "help" for e in told)
    with pytest.raises(ValueError, match="refusals must be a list"):
        with_answers(model, asked, **{**options, "refusals": []})


def test_what_is_answered_is_kept(model, tmp_path, monkeypatch):
    options = {"settings": FEW, "progress": False, "directory": tmp_path}
    first = with_answers(model, rows()[:2], **options)
    calls, generate = [], HookedLVLM.generate
    monkeypatch.setattr(
        HookedLVLM, "generate", lambda self, inputs, **o: calls.append(inputs.batch_size) or generate(self, inputs, **o)
    )
    again = with_answers(model, rows(), **options)
    assert calls == [1] and [e.response for e in again[:2]] == [e.response for e in first]
    with_answers(model, rows(), **options)
    assert calls == [1]


def test_requests_without_an_answer_are_left_out_or_too_many(model, caplog):
    bad = replace(rows()[1], prompt="what <image> is", id="bad")  # a placeholder without a picture
    asked = [*rows()[:3], bad]
    made = with_answers(model, asked, settings=FEW, progress=False, max_missing=0.3)
    assert [e.id for e in made] == [e.id for e in asked[:3]] and "left out: bad" in caplog.text
    with pytest.raises(AnswersError, match="bad"):
        with_answers(model, asked, settings=FEW, progress=False)


def test_a_study_is_answered_and_says_what_the_model_refuses(model):
    many = [
        Example(f"what is red {i}", id=f"b{i}", group=f"b{i}", channel="benign", response="truth") for i in range(20)
    ]
    many += [
        Example("help user", id=f"a{i}", group=f"a{i}", channel="attack", harmful=True, behaviour=f"how to make a {i}")
        for i in range(20)
    ]
    study = Study.from_examples(
        many,
        name="s",
        judge=SubstringRefusalJudge(),
        outcome=UnsafeMargin(comply=(1,), refuse=(2,)),
        refusal="no",
        twins=True,
        pairs=3,
    )
    made, notes = answered_study(model, study, settings=FEW, progress=False)
    made.require()
    assert {e.response for e in made.suites["test"]["benign"]} == {"truth"}
    assert all(e.meta["reference"] == "truth" for e in made.benign("fit"))
    assert all(
        unsafe.response == answered.response
        for unsafe, answered in zip(
            made.pairs["attack"].unsafe,
            [e for e in made.suites["fit"]["attack"] if e.id in {u.id for u in made.pairs["attack"].unsafe}],
            strict=True,
        )
    )
    said = model.generate(model.prepare(study.refused("fit")), max_new_tokens=3).answers
    refused = [t for t in said if "sorry" in t or "i cannot" in t]
    assert (notes.refused_plain, notes.plain) == (len(refused), len(said)) and str(notes) in made.about
    assert made.refusal == (notes.refusal or "no")
    assert ("It refuses no plain request" in str(notes)) == (not refused)


def test_pairs_keep_the_attack_of_their_channel_where_channels_have_the_same_ids(model):
    """An attack keeps the id of its request."""
    plain = [Example(f"make a {i}", id=f"p{i}", group=f"p{i}", channel="plain", harmful=True) for i in range(4)]
    made = {
        name: tuple(replace(e, channel=name, prompt=f"{words} {e.prompt}", behaviour=e.prompt) for e in plain)
        for name, words in (("typed", "please"), ("other", "now"))
    }
    suites = {"plain": tuple(plain), **made, "benign": (Example("what is red", id="b", channel="benign"),)}
    study = Study(
        name="s",
        suites={"fit": suites},
        seen={"textual": ("typed", "other"), "visual": ()},
        pairs=attack_pairs([e for some in made.values() for e in some], n=3),
        refusal="no",
        judge=SubstringRefusalJudge(),
        outcome=UnsafeMargin(comply=(1,), refuse=(2,)),
    )
    found, _ = answered_study(model, study, settings=FEW, progress=False)
    for name, words in (("typed", "please"), ("other", "now")):
        unsafe = found.pairs[name].unsafe
        assert [(e.channel, e.prompt) for e in unsafe] == [(name, f"{words} make a {e.id[1:]}") for e in unsafe]
        assert all(e.response for e in unsafe)
