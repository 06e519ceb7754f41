"""A repair on a plain model against the same repair on a bridge, in every family; and what comes and goes with it."""

import copy
import gc
import pickle
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from specimens import SPECIMENS
from torch import nn

from care_lens.core import Example, Site
from care_lens.core.errors import CareLensError
from care_lens.core.identity import held_fingerprint
from care_lens.core.spans import TokenSpans
from care_lens.defences import CoCA, HookDefence, SelfReminder
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.attached import acquire, release
from care_lens.lvlm.errors import GenerationOptionError, HookError, ThreadError
from care_lens.lvlm.families import LLAVA, register_family
from care_lens.lvlm.marker import answer_marker
from care_lens.lvlm.raw import raw_inputs
from care_lens.repair import (
    AlwaysOpen,
    AttachError,
    ConformalGate,
    Correction,
    HybridFusion,
    LinearReader,
    MaxReader,
    NoRepair,
    RepairMismatchError,
    Writer,
    attach,
)
from care_lens.subspace import ModelIdentity

NEW = 5
HALF_OPEN = ConformalGate(threshold=0.0, epsilon=0.1, n=9, width=20.0)
CLOSED = ConformalGate(threshold=1e9, epsilon=0.1, n=9)


def bump(activation):
    generator = torch.Generator().manual_seed(activation.numel())
    return 0.9 * activation + 0.3 * torch.randn(activation.shape, generator=generator).to(activation)


def make_repair(width, *, gate=HALF_OPEN, alpha=1.0, strength=4.0, **options):
    """Pictures are edited at an MLP's output and behind a whole block, words behind a gate that reads attention and answers."""
    generator = torch.Generator().manual_seed(0)
    toward, away, direction = torch.randn(3, width, generator=generator)

    def writer(name, sign):
        return Writer.towards(Site.parse(name), target=sign * strength * toward, source=sign * away, alpha=alpha)

    def reader(name):
        return LinearReader(
            site=Site.parse(name), direction=direction, centre=toward, positions=("last", "generated"), scale=3.0
        )

    read = MaxReader(readers=(reader("blocks.0.hook_attn_out"), reader("blocks.1.hook_resid_mid")))
    return HybridFusion(
        visual=(
            Correction(writer=writer("blocks.0.hook_mlp_out", 1)),
            Correction(writer=writer("blocks.1.hook_resid_post", 1)),
        ),
        textual=(Correction(writer=writer("blocks.2.hook_resid_pre", -1), reader=read, gate=gate),),
        rule="modality",
        **options,
    )


def rows(picture):
    return [
        Example("what is in the picture", image=picture(0, (32, 32))),
        Example("how to make a blue"),
        Example("red", image=picture(1, (56, 28))),
    ]


def begun_rows(picture):
    return [
        replace(example, prefill=begin, response=f"{begin or ''} blue".strip())
        for example, begin in zip(rows(picture), ("sure red", "how to make", None), strict=True)
    ]


def as_one_prompt(spans):
    return TokenSpans.from_masks(
        image=spans.image, padding=spans.padding, response=torch.zeros_like(spans.response), grids=spans.grids
    )


def hooks_on(model):
    """What there is on a model that another one of its kind has not: torch hooks and attributes of its own."""
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(module.__dict__))
        for name, module in model.named_modules()
    }


@pytest.fixture(scope="module", params=SPECIMENS)
def both(request, picture):
    """What the plain model with repairs attached computes, then what the same weights compute on a bridge."""
    model, processor = SPECIMENS[request.param].make()
    lvlm = acquire(model, processor)
    batches = [lvlm.prepare(rows(picture), padding_side=side) for side in ("left", "right")]
    begun = lvlm.prepare(begun_rows(picture))
    answered = lvlm.prepare(begun_rows(picture), responses=True, padding_side="right")
    marker = answer_marker(processor, lvlm.family)
    sites = [site for site in lvlm.sites() if lvlm.site_info(site).editable]
    width = lvlm.width("blocks.0.hook_resid_post")
    repairs = {
        "open": make_repair(width),
        "alpha 0": make_repair(width, alpha=0.0, gate=AlwaysOpen()),
        "closed": replace(make_repair(width, gate=CLOSED), visual=()),
    }
    release(lvlm)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id}

    @torch.no_grad()
    def runs():
        forward = [model(**inputs.model_kwargs()).logits for inputs in batches]
        forward.append(model.generate(**batches[0].generate_kwargs(), **options))
        return [*forward, model(**answered.model_kwargs()).logits, model.generate(**begun.generate_kwargs(), **options)]

    plain = runs()
    before = hooks_on(model)
    found = {}
    for name, repair in repairs.items():
        with repair.attach(model, processor):
            found[name] = runs()
    with NoRepair().attach(model, processor):
        found["none"] = runs()
    after = hooks_on(model)
    handle = NoRepair().attach(model, processor)
    with torch.no_grad():
        everything = [(site, lambda a, hook: bump(a)) for site in sites]
        at_sites = handle.lvlm.run_with_cache(batches[0], sites=sites, fwd_hooks=everything)
        idle = handle.lvlm.run_with_hooks(batches[1], fwd_hooks=[(site, lambda a, hook: a) for site in sites])
    handle.remove()
    bridge = HookedLVLM.from_hf(model, processor)
    return SimpleNamespace(**locals())


@torch.no_grad()
def test_attached_is_token_for_token_what_the_bridge_gives(both):
    with both.repairs["open"].on(both.bridge):
        logits = [both.bridge(inputs) for inputs in both.batches]
        tokens = both.bridge.generate(both.batches[0], max_new_tokens=NEW).sequences
    for inputs, ours, theirs, plain in zip(both.batches, both.found["open"], logits, both.plain, strict=False):
        real = inputs.attention_mask.bool()
        assert torch.equal(ours[real], theirs[real])
        assert float((ours - plain)[real].abs().max()) > 1e-2
    assert torch.equal(both.found["open"][2], tokens)


@torch.no_grad()
def test_answers_that_are_begun_or_given_are_told_by_the_chat_template(both):
    """The processor's ids alone, without labels: prefills and responses are what ``prepare`` says they are."""
    if not both.marker.end:
        assert both.bridge.family.prompt is not None  # no chat template, so that everything is prompt
        return
    with both.repairs["open"].on(both.bridge):
        logits = both.bridge(both.answered)
        tokens = both.bridge.generate(both.begun, max_new_tokens=NEW).sequences
    real = both.answered.attention_mask.bool()
    assert torch.equal(both.found["open"][3][real], logits[real])
    assert torch.equal(both.found["open"][4], tokens)
    told = raw_inputs(
        both.begun.generate_kwargs(), config=both.bridge.hf_model.config, family=both.bridge.family,
        marker=both.marker, generating=True,
    ).spans  # fmt: skip
    assert torch.equal(told.prefill, both.begun.spans.prefill) and bool(told.prefill.any(1)[:2].all())
    # It matters: read as prompt, the same tokens have other logits.
    with both.repairs["open"].on(both.bridge):
        as_prompt = both.bridge(replace(both.answered, spans=as_one_prompt(both.answered.spans)))
    assert float((as_prompt - logits)[real].abs().max()) > 1e-3


def test_what_does_nothing_changes_no_bit(both):
    for name in ("alpha 0", "closed", "none"):
        assert all(torch.equal(ours, plain) for ours, plain in zip(both.found[name], both.plain, strict=True)), name
    assert torch.equal(both.idle, both.plain[1])


@torch.no_grad()
def test_every_site_is_the_bridges_with_all_of_them_edited_at_once(both):
    assert {str(s) for s in both.bridge.sites() if both.bridge.site_info(s).editable and "pattern" not in str(s)} == {
        str(s) for s in both.sites
    }
    logits, cache = both.bridge.run_with_cache(both.batches[0], sites=both.sites, fwd_hooks=both.everything)
    real = both.batches[0].attention_mask.bool()
    assert bool(logits[real].isfinite().all()) and torch.equal(both.at_sites[0][real], logits[real])
    for site in both.sites:
        ours, theirs = both.at_sites[1][str(site)], cache[str(site)]
        assert ours.shape == theirs.shape
        assert torch.equal(ours[real], theirs[real]) if site.tower == "language" else torch.equal(ours, theirs), site


def test_nothing_stays_behind(both):
    assert both.after == both.before


@pytest.fixture
def plain(llava_maker):
    return llava_maker("clip")


@pytest.fixture
def batch(plain, picture):
    lvlm = acquire(*plain)
    made = lvlm.prepare(rows(picture)).generate_kwargs()
    release(lvlm)
    return made


OPTIONS = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def test_a_handle_removes_its_own_in_any_order(plain, batch):
    model, processor = plain
    width = model.config.text_config.hidden_size
    first, second = make_repair(width), make_repair(width, strength=-3.0, gate=AlwaysOpen())

    def tokens():
        return model.generate(**batch, **OPTIONS).tolist()

    def logits():
        with torch.no_grad():
            return model(**batch).logits

    bare, untouched = logits(), hooks_on(model)
    one = first.attach(model, processor)
    only_first = logits()
    two = attach(second, model, processor)
    together = logits()
    one.remove()
    only_second = logits()
    assert one.active is False and two.active and "removed" in repr(one) and two.model is model
    one.remove()
    assert torch.equal(logits(), only_second), "removing twice takes nothing of another's"
    with pytest.raises(AttachError, match="call attach again"), one:
        pass
    with two:
        assert torch.equal(logits(), only_second)
    assert torch.equal(logits(), bare) and hooks_on(model) == untouched
    with second.attach(model, processor):
        assert torch.equal(logits(), only_second)
        with first.attach(model, processor):
            assert not torch.equal(logits(), only_second)
    different = [bare, only_first, together, only_second]
    assert not any(torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert isinstance(tokens(), list) and hooks_on(model) == untouched


def test_a_repair_stays_without_its_handle_and_goes_with_its_model(llava_maker, plain, batch):
    model, processor = plain
    repair = make_repair(model.config.text_config.hidden_size)
    with torch.no_grad():
        with repair.attach(model, processor):
            expected = model(**batch).logits
        repair.attach(model, processor)
        gc.collect()
        assert torch.equal(model(**batch).logits, expected)
    other, its_processor = llava_maker("siglip")
    repair.attach(other, its_processor)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None


def test_after_exceptions_nothing_remains(plain, batch):
    model, processor = plain
    width = model.config.text_config.hidden_size
    model.generate(**batch, **OPTIONS)  # Hugging Face puts hooks of its own on a model when it runs for the first time
    untouched = hooks_on(model)
    beyond = Writer.towards("blocks.99.hook_mlp_out", target=torch.ones(width), source=torch.zeros(width))
    far = HybridFusion(visual=(Correction(writer=beyond),))

    class Broken(HookDefence):
        name = "broken"

        def describe(self):
            return {"name": self.name}

        def edits(self, batch):
            def fail(activation):
                raise RuntimeError("in the middle")

            return [batch.edit("blocks.1.hook_mlp_out", fail)]

    with pytest.raises(RuntimeError, match="in the middle"), Broken().attach(model, processor):
        model.generate(**batch, **OPTIONS)
    for refused, match in (
        (make_repair(width + 1), "as wide as the model"),
        (replace(make_repair(width), model=ModelIdentity("another/model", architecture="Other")), "another model"),
    ):
        with pytest.raises(RepairMismatchError, match=match):
            refused.attach(model, processor)
    with pytest.raises(ValueError, match="the language tower has layers 0 to"):
        attach(far, model, processor)
    assert hooks_on(model) == untouched


def in_thread(function):
    """What a function returns, or the error it raises, in a thread of its own."""
    found = []

    def work():
        try:
            found.append(function())
        except CareLensError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def test_threads_go_by_the_rule_of_hooks(plain, batch):
    model, processor = plain
    width = model.config.text_config.hidden_size
    repair, other = make_repair(width), make_repair(width, strength=-3.0, gate=AlwaysOpen())

    def run():
        with torch.no_grad():
            return model(**batch).logits

    def other_here():
        with other.attach(model, processor):
            return run()

    bare, alone = run(), other_here()
    with repair.attach(model, processor) as handle:
        repaired = run()
        assert isinstance(in_thread(run), ThreadError)
        assert torch.equal(in_thread(handle.carry(run)), repaired)
        assert torch.equal(in_thread(other_here), alone), "a thread that attaches its own has its own alone"
        assert torch.equal(run(), repaired)
    assert not torch.equal(repaired, bare) and not torch.equal(alone, bare)
    assert torch.equal(in_thread(run), bare)


def test_for_every_thread(plain, batch):
    model, processor = plain
    repair = make_repair(model.config.text_config.hidden_size)

    def run():
        with torch.no_grad():
            return model(**batch).logits

    bare, found = run(), []
    with repair.attach(model, processor, every_thread=True) as handle:
        repaired = run()
        workers = [threading.Thread(target=lambda: found.append(run())) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert len(found) == 3 and all(torch.equal(logits, repaired) for logits in found)
    assert not torch.equal(repaired, bare) and not handle.active
    assert torch.equal(in_thread(run), bare), "removed in this thread, gone in all"


def test_what_a_repair_cannot_know_is_refused(plain, batch):
    model, processor = plain
    repair = make_repair(model.config.text_config.hidden_size)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        cached = model(**batch, use_cache=True).past_key_values
    right = batch["attention_mask"].flip(1)
    with repair.attach(model, processor):
        for options, error, match in (
            ({"num_beams": 2}, GenerationOptionError, "num_beams must be 1"),
            ({"prompt_lookup_num_tokens": 2}, GenerationOptionError, "prompt_lookup"),
            ({"assistant_model": model}, GenerationOptionError, "assistant_model"),
            ({"penalty_alpha": 0.6, "top_k": 4}, GenerationOptionError, "penalty_alpha"),
            ({"dola_layers": "high"}, GenerationOptionError, "dola_layers"),
            ({"custom_generate": lambda *args, **kwargs: None}, GenerationOptionError, "custom_generate"),
            ({"use_cache": False}, GenerationOptionError, "use_cache"),
            ({"guidance_scale": 2.0}, GenerationOptionError, "guidance_scale"),
            ({"cache_implementation": "paged"}, HookError, "paged"),
            ({"past_key_values": cached}, HookError, "past_key_values must be empty"),
            ({"attention_mask": right}, HookError, "padding_side = 'left'"),
            ({"pixel_values": None}, HookError, "places of pictures without the pictures"),
        ):
            with pytest.raises(error, match=match):
                model.generate(**{**batch, **OPTIONS, **options})
        for call, match in (
            (lambda: model(inputs_embeds=embeds), "input_ids"),
            (lambda: model.generate(inputs_embeds=embeds, **OPTIONS), "input_ids"),
            (lambda: model.model.language_model(inputs_embeds=embeds), "without its tokens"),
            (lambda: model.generate_batch([[1, 2, 3]]), "packs the tokens of several requests"),
        ):
            with pytest.raises(HookError, match=match):
                call()
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match="remove the repair first"):
                copied(model)
    assert copy.deepcopy(model) is not model


def test_models_that_cannot_be_hooked_are_refused(plain, llava_maker, picture):
    model, processor = plain
    repair = make_repair(model.config.text_config.hidden_size)
    other, its_processor = llava_maker("siglip")
    wrapped = HookedLVLM.from_hf(other, its_processor)
    with pytest.raises(HookError, match="in a bridge"):
        repair.attach(other, its_processor)
    assert wrapped.unwrap() is other
    with pytest.raises(ValueError, match="processor must be the model's processor"):
        repair.attach(model, its_processor.tokenizer)
    with pytest.raises(ValueError, match="model must be one of"):
        repair.attach(nn.Linear(2, 2), processor)
    with pytest.raises(HookError, match="must not be compiled"):
        repair.attach(torch.compile(model), processor)
    with pytest.raises(AttachError, match="rewrites requests"):
        SelfReminder().attach(model, processor)
    with repair.attach(model, processor) as handle:
        with pytest.raises(HookError, match="must be called on a model in a bridge"):
            handle.lvlm.bind(handle.lvlm.prepare(rows(picture)))
        with (
            pytest.raises(HookError, match="attention patterns exist only inside"),
            handle.lvlm.hooks([("blocks.0.attn.hook_pattern", lambda a, hook: a)]),
        ):
            pass
        with pytest.raises(ValueError, match="must not have a repair attached"):
            HookedLVLM.from_hf(model, processor)


def test_a_family_that_does_not_say_where_its_modules_are_is_refused(llava_maker):
    model, processor = llava_maker("clip")
    repair = make_repair(model.config.text_config.hidden_size)
    moved = replace(LLAVA.language, plain=replace(LLAVA.language.plain, blocks="model.elsewhere.layers"))
    for language, match in (
        (replace(LLAVA.language, plain=None), "must say where its language tower is"),
        (moved, "must have a module 'model.elsewhere.layers'"),
    ):
        register_family(replace(LLAVA, language=language))
        try:
            with pytest.raises(HookError, match=match):
                repair.attach(model, processor)
        finally:
            register_family(LLAVA)
    repair.attach(model, processor).remove()


@torch.no_grad()
def test_a_loop_of_ones_own_sampling_and_copies_are_repaired(plain, batch, picture):
    model, processor = plain
    repair = make_repair(model.config.text_config.hidden_size)
    sampled = {**OPTIONS, "do_sample": True, "num_return_sequences": 2}
    with repair.attach(model, processor) as handle:
        inputs = handle.lvlm.prepare(rows(picture))
        torch.manual_seed(3)
        found = model.generate(**batch, **sampled)
        torch.manual_seed(3)
        assert torch.equal(
            handle.lvlm.generate(inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=2).sequences, found
        )
        expected = handle.lvlm.generate(inputs, max_new_tokens=3, min_new_tokens=3).new_tokens
        output, tokens, mask = (
            model(**batch, position_ids=inputs.position_ids, use_cache=True),
            [],
            batch["attention_mask"],
        )
        places = inputs.position_ids[:, -1:]
        for _ in range(3):
            scores = output.logits[:, -1].clone()
            scores[:, processor.tokenizer.eos_token_id] = -torch.inf
            tokens.append(scores.argmax(-1, keepdim=True))
            mask, places = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), places + 1
            output = model(
                tokens[-1],
                attention_mask=mask,
                position_ids=places,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        assert torch.equal(torch.cat(tokens, dim=1), expected)


@torch.no_grad()
def test_weights_that_lie_elsewhere_and_other_attention_are_no_matter(plain, batch):
    """Accelerate puts its own forward on each module to bring weights and activations together, as with a device_map."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, processor = plain
    repair = make_repair(model.config.text_config.hidden_size)
    with repair.attach(model, processor):
        expected = model(**batch).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    with repair.attach(model, processor):
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**batch, **OPTIONS), model.generate(**batch, **OPTIONS))
    remove_hook_from_submodules(model)
    model.set_attn_implementation("sdpa")
    real = batch["attention_mask"].bool()
    with repair.attach(model, processor):
        torch.testing.assert_close(model(**batch).logits[real], expected[real], rtol=1e-3, atol=1e-3)
    assert model.config.text_config._attn_implementation == "sdpa"


@torch.no_grad()
def test_other_defences_attach(plain, batch, picture):
    model, processor = plain
    bare = model(**batch).logits

    class Push(HookDefence):
        name = "push"

        def describe(self):
            return {"name": self.name}

        def edits(self, batch):
            return [batch.edit("blocks.1.hook_resid_mid", lambda h: 2 * h, positions="image")]

    with Push().attach(model, processor) as handle:
        inputs = handle.lvlm.prepare(rows(picture))
        pushed = model(**inputs.model_kwargs()).logits
    with CoCA(prefix="i cannot").attach(model, processor) as handle:
        calibrated = handle.lvlm(inputs)
        with pytest.raises(ValueError, match="which examples they are of"):
            model(**batch)
    bridge = HookedLVLM.from_hf(model, processor)
    with Push().on(bridge):
        real = inputs.attention_mask.bool()
        assert torch.equal(bridge(inputs)[real], pushed[real]) and not torch.equal(pushed, bare)
    with CoCA(prefix="i cannot").on(bridge):
        assert torch.equal(bridge(inputs)[real], calibrated[real])


def test_a_repair_made_for_these_very_weights_attaches_to_them(plain):
    model, processor = plain
    repair = replace(make_repair(model.config.text_config.hidden_size), model=ModelIdentity.from_model(model))
    repair.attach(model, processor).remove()
    bridge = HookedLVLM.from_hf(model, processor)
    assert ModelIdentity.from_model(bridge.hf_model) == repair.model
    older = replace(repair, model=replace(repair.model, fingerprint=held_fingerprint(bridge.hf_model)))
    for fits in (repair, older):
        with fits.on(bridge):
            pass
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    for other in (repair, older):
        with pytest.raises(RepairMismatchError, match="another model"):
            other.check(bridge)
