"""What every defence must do, whatever it is: batches, padding, generation, switches, hooks that go, files."""

import dataclasses

import pytest
import torch

from care_lens.core import Defence, Repair, Site
from care_lens.core.identity import repair_fingerprint
from care_lens.defences import (
    ASTRA,
    CAA,
    CAST,
    LEACE,
    ActAdd,
    AlphaSteer,
    CoCA,
    HiddenDetect,
    HookDefence,
    MeanAblation,
    MeanDifference,
    NoDefence,
    PublishedCARE,
    SafeSteer,
    SecondLook,
    SelfReminder,
    ShiftDC,
    WrongModelError,
    load_defence,
)

SITE = Site("language", 2, "hook_resid_post")


def detector(lvlm, kinds):
    """A detector whose threshold lies between the scores of the requests, so that some rows are flagged."""
    made = HiddenDetect(layers=(0, 2), refusal_tokens=(60, 70), refusal_ids=(60, 61, 62, 2), threshold=0.0, width=24)
    scores = made.scores(lvlm, [*kinds["malicious"], *kinds["benign"]])
    return dataclasses.replace(made, threshold=float(scores.median()))


FITS = {
    "mean difference": lambda m, k: MeanDifference.fit(m, refused=k["refused"], complied=k["malicious"], layer=1),
    "caa": lambda m, k: CAA.fit(m, malicious=k["malicious"], refusal="sorry i cannot help", layer=1, alpha=0.5),
    "actadd": lambda m, k: ActAdd.fit(m, towards="sorry i cannot", away="the first letters are", layer=1),
    "leace": lambda m, k: LEACE.fit(m, benign=k["benign"], malicious=k["malicious"], sites=[SITE, "blocks.1.hook_mlp_out"]),
    "mean ablation": lambda m, k: MeanAblation.fit(m, benign=k["benign"], sites=[SITE]),
    "alphasteer": lambda m, k: AlphaSteer.fit(
        m, benign=k["benign"], malicious=k["malicious"], refused=k["refused"], layers=[1, 2], alpha=400.0
    ),
    "cast": lambda m, k: CAST.fit(
        m, benign=k["benign"], malicious=k["malicious"], refused=k["refused"], condition_layer=1, layers=[1, 2]
    ),
    "safesteer": lambda m, k: SafeSteer.fit(m, benign=k["benign"], malicious=k["malicious"], layer=1, prefix="not the"),
    "astra": lambda m, k: ASTRA.fit(
        m, attacked=k["pictures"], clean=k["clean"], layer=1, patch=16, n_masks=24, target="sorry i", question="what is it",
        answer_tokens=4,
    ),
    "shiftdc": lambda m, k: ShiftDC.fit(
        m, unsafe=k["refused"], safe=k["benign"], layers=[1, 2], caption_prompt="what is it", caption_tokens=3
    ),
    "coca": lambda m, k: CoCA.fit(m, prefix="not the first", alpha=2.0),
    "hiddendetect": detector,
    "published care": lambda m, k: PublishedCARE.fit(
        m, benign=k["benign"], malicious=k["malicious"], refusals=["sorry i cannot help"], layers=[1, 2], rank=3, progress=False
    ),
}  # fmt: skip

OFF = {
    "hiddendetect": {"threshold": float("inf")},
    "coca": {"prefix": ""},
    "published care": {"alpha_visual": 0.0, "alpha_textual": 0.0},
}


@pytest.fixture(scope="module")
def made(world_model, kinds):
    """Every defence, fitted."""
    return {name: fit(world_model, kinds) for name, fit in FITS.items()}


def logits_of(lvlm, defence, examples, responses=True):
    with torch.no_grad(), defence.on(lvlm):
        inputs = lvlm.prepare(defence.examples(examples), responses=responses)
        return lvlm(inputs), inputs


@pytest.mark.parametrize("name", FITS)
def test_a_batch_is_its_rows_and_the_cache_gives_the_same_tokens(world_model, made, requests, name):
    defence = made[name]
    together, inputs = logits_of(world_model, defence, requests)
    assert bool(inputs.spans.padding.any()), "the batch must be padded"
    plain, _ = logits_of(world_model, NoDefence(), requests)
    moved = 0.0
    for row, example in enumerate(requests):
        alone, single = logits_of(world_model, defence, [example])
        kept = ~inputs.spans.padding[row]
        torch.testing.assert_close(together[row, kept], alone[0, ~single.spans.padding[0]], atol=2e-3, rtol=2e-3)
        moved = max(moved, float((together[row, kept] - plain[row, kept]).abs().max()))
    assert moved > 1e-2, "a defence that changes nothing shows nothing"
    # Generation with a cache: the greedy tokens are those of the teacher-forced run on them.
    with defence.on(world_model):
        asked = world_model.prepare(requests)
        answers = world_model.generate(asked, max_new_tokens=4, min_new_tokens=4)
        texts = world_model.tokenizer.batch_decode(answers.new_tokens)
        one = world_model.generate(world_model.prepare(requests[2]), max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(one.new_tokens[0], answers.new_tokens[2])
    forced = [dataclasses.replace(e, response=text) for e, text in zip(requests, texts, strict=True)]
    logits, inputs = logits_of(world_model, defence, forced)
    end = world_model.hf_model.generation_config.eos_token_id
    for row in range(len(requests)):
        last = inputs.spans.last_index()[row]
        step = logits[row, last : last + 4].clone()
        step[:, end] = -torch.inf
        assert torch.equal(inputs.input_ids[row, last + 1 : last + 5], answers.new_tokens[row])
        assert torch.equal(step.argmax(-1), answers.new_tokens[row])


@pytest.mark.parametrize("name", FITS)
def test_off_is_the_model_itself_to_the_bit(world_model, made, requests, name):
    off = dataclasses.replace(made[name], **OFF.get(name, {"alpha": 0.0}))
    plain, inputs = logits_of(world_model, NoDefence(), requests)
    assert torch.equal(logits_of(world_model, off, requests)[0], plain)
    asked = world_model.prepare(requests[:2])
    expected = world_model.generate(asked, max_new_tokens=3).sequences
    with off.on(world_model):
        assert torch.equal(world_model.generate(asked, max_new_tokens=3).sequences, expected)
    assert off.fwd_hooks(inputs) == []


@pytest.mark.parametrize("name", FITS)
def test_hooks_are_gone_after_an_exception_and_files_hold_the_same_defence(world_model, made, requests, tmp_path, name):
    defence = made[name]
    assert isinstance(defence, Defence) and isinstance(defence, Repair) and isinstance(defence, HookDefence)
    before = world_model.acting()

    def fail(activation, hook):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), torch.no_grad(), defence.on(world_model):
        world_model.run_with_hooks(world_model.prepare(requests), fwd_hooks=[("blocks.3.hook_resid_post", fail)])
    assert world_model.acting() == before == []
    defence.save(tmp_path)
    for again in (load_defence(tmp_path), type(defence).load(tmp_path)):
        assert repair_fingerprint(again) == repair_fingerprint(defence)
        assert again.describe() == defence.describe()


def test_another_models_width_is_refused(made, lvlm):
    for name, defence in made.items():
        if name != "coca":  # it has no tensors of a width
            with pytest.raises((WrongModelError, ValueError), match=r"must be as wide as|has no site"):
                defence.check(lvlm)


def test_reminder_and_second_look_are_defences_too(tmp_path):
    for defence in (SelfReminder(before="a", after=""), SecondLook(answer_tokens=7), NoDefence()):
        assert isinstance(defence, Defence) and isinstance(defence, Repair)
        defence.save(tmp_path / defence.name)
        assert load_defence(tmp_path / defence.name).describe() == defence.describe()
