"""Ways into a wrapped model other than ours, in every family: Hugging Face's calls under a repair, its state dict, the way back."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from test_every_family import SPECIMENS

from care_lens.core import Example, Site
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import HookError
from care_lens.repair import ConformalGate, Correction, EnergyReader, HybridFusion, Writer
from care_lens.subspace import SafetySubspace

SITE = "blocks.0.hook_resid_post"
NEW = 4


def make_repair(lvlm):
    """Other edits at pictures than at words, and those at words behind a gate that is half open after the last prompt token."""
    width, generator = lvlm.width(SITE), torch.Generator().manual_seed(0)
    benign, malicious = torch.randn(2, 60, width, generator=generator)
    subspace = SafetySubspace.fit(benign, malicious * 3 + 1, rank=2, site=Site.parse(SITE))
    toward, away = torch.randn(2, width, generator=generator)
    visual = Correction(writer=Writer.towards(SITE, target=5 * toward, source=away))
    textual = Correction(
        writer=Writer.towards(SITE, target=5 * away, source=toward),
        reader=EnergyReader.from_subspace(subspace, positions="last"),
        gate=ConformalGate(threshold=0.0, epsilon=0.1, n=9, width=100.0),
    )
    return HybridFusion(visual=(visual,), textual=(textual,), rule="modality")


@pytest.fixture(scope="module", params=SPECIMENS)
def made(request, picture):
    """A model with its state dict and logits from before it was wrapped, a batch, and a repair."""
    model, processor = SPECIMENS[request.param].make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    lvlm = HookedLVLM.from_hf(model, processor)
    rows = [
        Example("what is in the picture", image=picture(0, (32, 32))),
        Example("how to make a blue"),
        Example("red", image=picture(1, (56, 28))),
    ]
    return lvlm, lvlm.prepare(rows), make_repair(lvlm), before, attention


def test_hugging_faces_calls_are_repaired_as_ours_are(made):
    lvlm, inputs, repair, *_ = made
    raw = inputs.generate_kwargs()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": lvlm.tokenizer.pad_token_id}
    with torch.no_grad():
        bare, bare_tokens = lvlm.hf_model(**inputs.model_kwargs()).logits, lvlm.hf_model.generate(**raw, **options)
        with repair.on(lvlm):
            ours, tokens = lvlm(inputs), lvlm.generate(inputs, max_new_tokens=NEW).sequences
            assert torch.equal(lvlm.hf_model(**inputs.model_kwargs()).logits, ours)
            kwargs = inputs.model_kwargs()
            assert torch.equal(lvlm.bridge(kwargs.pop("input_ids"), **kwargs), ours)
            assert torch.equal(lvlm.hf_model.generate(**raw, **options), tokens)
            several = {**options, "do_sample": True, "num_return_sequences": 2}
            torch.manual_seed(3)
            ours_sampled = lvlm.generate(inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=2).sequences
            alone = inputs.rows([1])
            torch.manual_seed(3)
            ours_alone = lvlm.generate(alone, max_new_tokens=NEW, do_sample=True, num_return_sequences=2).sequences
            torch.manual_seed(3)
            assert torch.equal(lvlm.hf_model.generate(**alone.generate_kwargs(), **several), ours_alone)
            assert len(ours_sampled) == 2 * inputs.batch_size
            with pytest.raises(ValueError, match="num_beams must be 1"):
                lvlm.hf_model.generate(**raw, **options, num_beams=2)
    real = inputs.attention_mask.bool()
    assert float((ours - bare)[real].abs().max()) > 1e-3
    assert torch.equal(lvlm.hf_model.generate(**raw, **options), bare_tokens)


@torch.no_grad()
def test_a_loop_of_ones_own_with_a_cache_is_repaired(made):
    lvlm, inputs, repair, *_ = made
    if inputs.own_positions:
        pytest.skip("in plain Hugging Face too, only generate makes the positions of a step of this family")
    alone = inputs.rows([0])
    with repair.on(lvlm):
        expected = lvlm.generate(alone, max_new_tokens=3, min_new_tokens=3).new_tokens
        output, found = lvlm.hf_model(**alone.generate_kwargs(), use_cache=True), []
        mask, start = alone.attention_mask, alone.input_ids.shape[1]
        for step in range(3):
            scores = output.logits[:, -1].clone()
            scores[:, lvlm.tokenizer.eos_token_id] = -torch.inf
            found.append(scores.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            kwargs = {"input_ids": found[-1], "attention_mask": mask, "past_key_values": output.past_key_values}
            if not alone.own_positions:
                kwargs["position_ids"] = torch.full((1, 1), start + step + alone.first_position)
            output = lvlm.hf_model(**kwargs, use_cache=True)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_state_dicts_have_plain_names_while_wrapped(made, tmp_path):
    lvlm, inputs, _, before, _ = made
    model = lvlm.hf_model
    now = model.state_dict()
    assert list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in now)
    clean = lvlm(inputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    assert not torch.equal(lvlm(inputs), clean)
    assert str(model.load_state_dict(before)) == "<All keys matched successfully>"
    assert torch.equal(lvlm(inputs), clean)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(again.eval()(**inputs.model_kwargs()).logits, clean)


def test_copies_of_a_wrapped_model_are_refused(made):
    lvlm, inputs, *_ = made
    _, cache = lvlm.run_with_cache(inputs, sites=SITE)
    for thing in (lvlm, lvlm.hf_model, lvlm.bind(inputs)):
        for copied in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match=r"must not be pickled or copied.*save_pretrained"):
                copied(thing)
    with pytest.raises(TypeError, match="safetensors"):
        pickle.dumps(cache)
    twin = copy.deepcopy(cache)
    assert twin.model is cache.model and torch.equal(twin[SITE], cache[SITE])
    assert twin[SITE].data_ptr() != cache[SITE].data_ptr()


def test_gradient_checkpointing_is_refused_under_hooks(made):
    lvlm, inputs, repair, *_ = made
    model = lvlm.hf_model
    hooks = [(SITE, lambda activation, hook: 2 * activation)]

    def gradient(**given):
        model.zero_grad()
        lvlm.run_with_hooks(inputs, fwd_hooks=given.get("fwd_hooks", ()))[:, -1].logsumexp(-1).sum().backward()
        return model.get_input_embeddings().weight.grad.clone()

    expected, hooked = gradient(), gradient(fwd_hooks=hooks)
    assert not torch.allclose(expected, hooked)
    model.gradient_checkpointing_enable()
    assert torch.equal(gradient(fwd_hooks=hooks), hooked), "in evaluation mode nothing is computed again"
    training = {module: module.training for module in model.modules()}
    model.train()
    try:
        for run in (
            lambda: lvlm.run_with_hooks(inputs, fwd_hooks=hooks),
            lambda: lvlm.run_with_cache(inputs, sites=SITE),
            lambda: model(**inputs.model_kwargs()),
        ):
            with (
                pytest.raises(HookError, match="gradient_checkpointing_disable"),
                repair.on(lvlm),
            ):
                run()
        with pytest.raises(HookError, match="gradient_checkpointing_disable"), lvlm.hooks(hooks):
            lvlm(inputs)
        model.gradient_checkpointing_disable()
    finally:
        for module, mode in training.items():
            module.training = mode
        model.gradient_checkpointing_disable()
        model.zero_grad()
    torch.testing.assert_close(gradient(), expected)


@torch.no_grad()
def test_unwrapping_gives_the_plain_model_back(made):
    """The last test of each family: its model is unwrapped."""
    lvlm, inputs, repair, before, attention = made
    clean, kwargs = lvlm(inputs), inputs.model_kwargs()
    model = lvlm.unwrap()
    assert list(model.state_dict()) == list(before)
    assert not [name for name, _ in model.named_modules() if "_original_component" in name]
    assert [
        c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)
    ] == attention
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(model(**kwargs).logits[real], clean[real], rtol=1e-3, atol=1e-3)
    model.set_attn_implementation("eager")
    assert torch.equal(model(**kwargs).logits, clean)
    copied = copy.deepcopy(model)
    assert copied is not model and torch.equal(copied(**kwargs).logits, clean)
    again = HookedLVLM.from_hf(model, lvlm.processor)
    assert torch.equal(again(inputs), clean)
    with repair.on(again):
        assert not torch.equal(again(inputs), clean)


def test_what_a_repair_cannot_know_is_refused(llava_maker, picture):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    repair = make_repair(lvlm)
    inputs = lvlm.prepare([Example("what is red", image=picture(0)), Example("how to make a blue")])
    raw, model = inputs.generate_kwargs(), lvlm.hf_model
    embeds = model.get_input_embeddings()(inputs.input_ids)
    with torch.no_grad():
        cached = model(**raw, use_cache=True).past_key_values
        with repair.on(lvlm):
            for call, match in (
                (lambda: model(inputs_embeds=embeds), "input_ids"),
                (lambda: model.generate(inputs_embeds=embeds, max_new_tokens=2), "input_ids"),
                (lambda: model.model.language_model(inputs_embeds=embeds), "without its tokens"),
                (lambda: model(**{**raw, "attention_mask": torch.ones(2, 1, 9, 9)}), "attention_mask"),
                (lambda: model(inputs.input_ids[:, -1:], past_key_values=cached), "past_key_values"),
                (lambda: model.generate(**raw, past_key_values=cached, max_new_tokens=2), "past_key_values"),
                (lambda: model.generate(**raw, max_new_tokens=2, prompt_lookup_num_tokens=2), "prompt_lookup"),
            ):
                with pytest.raises(ValueError, match=match):
                    call()
            with lvlm.hooks_for_each_batch(lambda batch: [(SITE, lambda a, hook: None)][: len(batch.image_rows)]):
                with pytest.raises(HookError, match="must be prepared"):
                    model(**raw)
                lvlm(inputs)


@torch.no_grad()
def test_labels_tell_the_response_and_a_missing_mask_is_made_as_hugging_face_makes_it(llava_maker, picture):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    repair = replace(make_repair(lvlm), scope="response")
    rows = [Example("what is red", image=picture(0), response="sure red"), Example("blue", response="no")]
    inputs = lvlm.prepare(rows, responses=True)
    labels = torch.where(inputs.spans.response, inputs.input_ids, -100)
    with repair.on(lvlm):
        assert torch.equal(lvlm.hf_model(**inputs.model_kwargs(), labels=labels).logits, lvlm(inputs))
        assert torch.equal(
            lvlm.hf_model(**inputs.model_kwargs()).logits, lvlm(inputs)
        )  # the chat template tells it too
        less = labels.clone()
        less[:, :-1] = -100  # labels go before it: only the last token is the response
        assert not torch.equal(lvlm.hf_model(**inputs.model_kwargs(), labels=less).logits, lvlm(inputs))
    prompts = lvlm.prepare(rows)
    raw = {name: value for name, value in prompts.generate_kwargs().items() if name != "attention_mask"}
    pad = lvlm.tokenizer.pad_token_id
    with make_repair(lvlm).on(lvlm):
        found = lvlm.hf_model.generate(
            raw.pop("input_ids"), **raw, max_new_tokens=NEW, pad_token_id=pad, do_sample=False
        )
        assert torch.equal(found, lvlm.generate(prompts, max_new_tokens=NEW).sequences)
