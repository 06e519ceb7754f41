"""What every defence must do, whatever it is: batches, padding, generation, switches, hooks that go, files."""

import dataclasses

import pandas as pd
import pytest
import torch

from care_lens.core import Defence, Repair, Site
from care_lens.core.blocks import UnusedBlockWarning
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
    RefusalDirection,
    SafeSteer,
    SecondLook,
    SelfReminder,
    ShiftDC,
    WrongModelError,
    load_defence,
)
from care_lens.defences.folding import added_vector_part
from care_lens.repair import HybridFusion

SITE = Site("language", 2, "hook_resid_post")


def detector(lvlm, kinds):
    """A detector whose threshold lies between the scores of the requests, so that some rows are flagged."""
    made = HiddenDetect(layers=(0, 2), refusal_tokens=(60, 70), refusal_ids=(60, 61, 62, 2), threshold=0.0, width=24)
    scores = made.scores(lvlm, [*kinds["malicious"], *kinds["benign"]])
    return dataclasses.replace(made, threshold=float(scores.median()))


def direction(lvlm, kinds):
    """A refusal direction, whose data filter and choice have tests of their own."""
    rows = MeanDifference.fit(lvlm, refused=kinds["refused"], complied=kinds["benign"], layer=1)
    table = pd.DataFrame([{"position": -1, "layer": 2, "bypass": 0.5, "induce": 0.5, "kl": 0.01, "kept": True}])
    return RefusalDirection(direction=rows.vector, layer=2, position=-1, candidates=table)


FITS = {
    "refusal direction": direction,
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
        m, attacked=k["pictures"], clean=k["clean"], layer=1, patch=16, n_masks=24, target="okay for", question="what is it",
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
    "refusal direction": {"coefficient": 0.0},
    "hiddendetect": {"threshold": float("inf")},
    "coca": {"prefix": ""},
    "published care": {"alpha_visual": 0.0, "alpha_textual": 0.0},
}


@pytest.fixture(scope="module")
def made(world_model, kinds):
    """Every defence, fitted."""
    return {name: fit(world_model, kinds) for name, fit in FITS.items()}


def logits_of(lvlm, defence, examples, responses=True, side="left"):
    with torch.no_grad(), defence.on(lvlm):
        inputs = lvlm.prepare(defence.examples(examples), responses=responses, padding_side=side)
        return lvlm(inputs), inputs


@pytest.mark.parametrize("name", FITS)
def test_a_batch_is_its_rows_and_the_cache_gives_the_same_tokens(world_model, made, requests, name):
    defence = made[name]
    plain, _ = logits_of(world_model, NoDefence(), requests)
    alone = [logits_of(world_model, defence, [example]) for example in requests]
    moved = 0.0
    for side in ("left", "right"):
        together, inputs = logits_of(world_model, defence, requests, side=side)
        assert bool(inputs.spans.padding.any()), "the batch must be padded"
        for row, (expected, single) in enumerate(alone):
            kept = ~inputs.spans.padding[row]
            rows = expected[0, ~single.spans.padding[0]]
            torch.testing.assert_close(together[row, kept], rows, atol=2e-3, rtol=2e-3)
            if side == "left":
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
        assert world_model.acting() == [repair_fingerprint(defence)]
        world_model.run_with_hooks(world_model.prepare(requests), fwd_hooks=[("blocks.3.hook_resid_post", fail)])
    assert world_model.acting() == before == []
    defence.save(tmp_path)
    for again in (load_defence(tmp_path), type(defence).load(tmp_path)):
        assert repair_fingerprint(again) == repair_fingerprint(defence)
        assert again.describe() == defence.describe()


@torch.no_grad()
@pytest.mark.parametrize("name", FITS)
def test_the_plan_is_what_the_hooks_do(world_model, made, requests, name):
    """Edits are at the sites and tokens that the plan names, and nowhere else; a defence has as many parts as it edits."""
    defence = made[name]
    plan = defence.explain()
    inputs = world_model.prepare(requests, responses=True)
    moved: dict[str, torch.Tensor] = {}

    def watched(site, fn):
        def hook_fn(activation, hook):
            edited = fn(activation, hook=hook)
            if edited is not None:
                moved[site] = (edited != activation).any(dim=-1) | moved.get(
                    site, torch.zeros(activation.shape[:2]).bool()
                )
            return edited

        return site, hook_fn

    defence.check(world_model)
    world_model.run_with_hooks(
        inputs, fwd_hooks=[watched(str(site), fn) for site, fn in defence.fwd_hooks(inputs, world_model)]
    )
    moved.pop("embed.hook_in", None)
    allowed: dict[str, torch.Tensor] = {}
    for part in plan.parts:
        mask = torch.zeros_like(inputs.spans.padding)
        for span in (part.positions,) if isinstance(part.positions, str) else part.positions:
            mask |= inputs.spans.mask(span)
        allowed[str(part.site)] = mask | allowed.get(str(part.site), False)
    assert {site for site, mask in moved.items() if bool(mask.any())} == {*allowed}
    for site, mask in allowed.items():
        assert not bool((moved[site] & ~mask).any())
        part = next(part for part in plan.parts if str(part.site) == site)
        assert bool((moved[site] & inputs.spans.response).any()) == (part.acts_on in ("both", "answer"))
    sites = defence.widths()
    assert all(part.width == sites[part.site] for part in plan.parts if isinstance(part.site, Site))
    for text in (str(plan), repr(defence)):
        assert defence.name in text and "tensor(" not in text
    assert len(str(plan).splitlines()) <= 25 and len(repr(defence).splitlines()) <= 8
    assert "<table" in plan._repr_html_() and "<table" in defence._repr_html_()


@torch.no_grad()
@pytest.mark.parametrize("name", ["coca", "shiftdc", "published care", "hiddendetect"])
def test_the_plan_counts_the_forward_passes(world_model, made, requests, name):
    defence = made[name]
    passes = [0]
    handle = world_model.first_block.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    counts = []
    try:
        for acting in (NoDefence(), defence):
            passes[0] = 0
            with acting.on(world_model):
                world_model.generate(world_model.prepare(requests), max_new_tokens=4, min_new_tokens=4)
            counts.append(passes[0])
    finally:
        handle.remove()
    request, token = (
        sum(getattr(part, f"extra_per_{of}") for part in defence.explain().parts) for of in ("request", "token")
    )
    extra = counts[1] - counts[0]
    assert counts[0] * token <= extra <= request + counts[0] * token
    assert (extra == 0) == (request + token == 0) and (extra > 0) == (name in ("coca", "shiftdc"))


def test_defences_that_rewrite_requests_say_so():
    for defence, said in ((SelfReminder(), "before and after the request"), (SecondLook(), "136 per request at most")):
        text = str(defence.explain())
        assert "in the request" in text and said in text
        assert len(repr(defence).splitlines()) == 2 and repr(defence).startswith(
            f"{type(defence).__name__}: {defence.name}"
        )
    assert "none per" not in str(SelfReminder().explain()) and "forward passes: none" in str(SelfReminder().explain())
    assert repr(NoDefence()) == "NoDefence: none"


def test_another_models_width_is_refused(made, lvlm):
    for name, defence in made.items():
        if name != "coca":  # it has no tensors of a width
            with pytest.raises((WrongModelError, ValueError), match=r"must be as wide as|has no site"):
                defence.check(lvlm)


def test_numbers_that_break_every_answer_are_refused(made):
    """A model of which every answer is broken would look like one that answers no attack."""
    tried = 0
    for defence in made.values():
        for field in dataclasses.fields(defence):
            if isinstance(getattr(defence, field.name), float):
                with pytest.raises(ValueError, match=f"{field.name} must be"):
                    dataclasses.replace(defence, **{field.name: float("nan")})
                tried += field.name == "alpha"
        if hasattr(defence, "alpha"):
            with pytest.raises(ValueError, match="alpha must be a finite number, got inf"):
                dataclasses.replace(defence, alpha=float("inf"))
    assert tried >= 8, "every one that has a strength"


def test_folders_that_hold_no_defence_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a folder with defence.json or repair.json.*; it has neither"):
        load_defence(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must be a folder with repair.json.*; it is no folder"):
        HybridFusion.load(tmp_path / "gone")


def test_reminder_and_second_look_are_defences_too(tmp_path):
    for defence in (SelfReminder(before="a", after=""), SecondLook(answer_tokens=7), NoDefence()):
        assert isinstance(defence, Defence) and isinstance(defence, Repair)
        defence.save(tmp_path / defence.name)
        assert load_defence(tmp_path / defence.name).describe() == defence.describe()


@torch.no_grad()
def test_a_refusal_stands_whole_behind_a_begun_answer(world_model, requests):
    """Rows with begun answers of different lengths, generated and in one pass over the whole answer."""
    begun = [
        dataclasses.replace(e, prefill=p) for e, p in zip(requests, ("sure first", None, "the", "sure"), strict=True)
    ]
    defence = HiddenDetect.always(world_model, refusal="sorry i cannot help")
    refusal = torch.tensor(defence.refusal_ids)
    with defence.on(world_model):
        made = world_model.generate(world_model.prepare(begun), max_new_tokens=len(refusal))
        assert torch.equal(made.new_tokens, refusal.expand(len(begun), -1))
        forced = [dataclasses.replace(e, response="sorry i cannot help") for e in begun]
        inputs = world_model.prepare(forced, responses=True)
        chosen = world_model(inputs).argmax(dim=-1)
    for row, own in enumerate(inputs.spans.response & ~inputs.spans.prefill):
        at = own.nonzero()[:, 0]
        assert chosen[row, at - 1].tolist() == refusal.tolist() == inputs.input_ids[row, at].tolist()


@torch.no_grad()
@pytest.mark.parametrize("given", [None, "sure", "sure first"])
def test_steps_count_the_tokens_of_a_begun_answer(world_model, made, requests, given):
    """Three steps are three tokens: the last one of the prompt, and two of the answer, given or not."""
    defence = dataclasses.replace(made["safesteer"], steps=3, alpha=50.0)
    inputs = world_model.prepare([dataclasses.replace(e, prefill=given) for e in requests])
    edited: list[torch.Tensor] = []

    def watched(site, fn):
        def hook_fn(activation, hook):
            out = fn(activation, hook=hook)
            if out is not None:
                edited.append((out != activation).any(dim=-1).sum(dim=1))
            return out

        return site, hook_fn

    hooks = [watched(str(site), fn) for site, fn in defence.fwd_hooks(inputs, world_model)]
    world_model.generate(inputs, max_new_tokens=6, min_new_tokens=6, fwd_hooks=hooks)
    assert torch.stack(edited).sum(dim=0).tolist() == [3] * len(requests)


@torch.no_grad()
@pytest.mark.parametrize("name", ["coca", "shiftdc"])  # those that prepare the batch anew
def test_generation_does_not_see_the_examples_responses(world_model, made, requests, name):
    """A begun answer, in a batch of examples that have responses: what is generated is what it would be without them."""
    begun = [dataclasses.replace(e, prefill="sure", response="sure first then") for e in requests]
    bare = [dataclasses.replace(e, response=None) for e in begun]
    with made[name].on(world_model):
        with_, without = (
            world_model.generate(world_model.prepare(rows), max_new_tokens=4, output_logits=True)
            for rows in (begun, bare)
        )
    assert torch.equal(with_.new_tokens, without.new_tokens)


def test_a_defence_that_is_put_on_without_a_block_says_so(world_model, made):
    """None of them has done anything then."""
    for defence in (*(one for one in made.values() if not isinstance(one, SelfReminder)), SecondLook()):
        with pytest.warns(UnusedBlockWarning, match=r"defence\.on\(lvlm\) was made and not entered"):
            defence.on(world_model)
    assert world_model.acting() == []


def test_a_vector_that_is_added_in_the_vision_tower_is_no_part_of_the_language_model():
    for component in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out"):
        part = added_vector_part("x", Site("vision", 1, component), torch.ones(4))
        assert part.edit is None and "language tower" in part.reason and part.site.tower == "vision"
    assert added_vector_part("x", SITE, torch.ones(4)).site == Site("language", 2, "hook_mlp_out")
