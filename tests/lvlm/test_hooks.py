"""Hooks come and go; caches hold what was asked for; the bridge is as it was after close."""

import pytest
import torch
from transformer_lens import patching
from transformer_lens.model_protocol import TransformerLensModel

from care_lens.lvlm import HookedLVLM


def torch_hooks(model):
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }


@pytest.fixture
def inputs(lvlm, examples):
    return lvlm.prepare(examples)


@torch.no_grad()
def test_hooks_are_gone_after_an_exception(lvlm, inputs):
    clean, before = lvlm(inputs), torch_hooks(lvlm.bridge)

    def fail(activation, hook):
        raise RuntimeError("on purpose")

    hooks = [
        ("vision.blocks.0.hook_resid_mid", lambda a, hook: a + 1),
        ("blocks.0.hook_resid_mid", lambda a, hook: a + 1),
    ]
    for place in ("blocks.0.mlp.hook_post", "blocks.1.hook_resid_mid", "vision.blocks.2.hook_resid_post"):
        with pytest.raises(RuntimeError, match="on purpose"):
            lvlm.run_with_hooks(inputs, fwd_hooks=[*hooks, (place, fail)])
        with pytest.raises(RuntimeError, match="on purpose"):
            lvlm.generate(inputs, fwd_hooks=[*hooks, (place, fail)])
        assert torch_hooks(lvlm.bridge) == before and torch.equal(lvlm(inputs), clean)
    with pytest.raises(ValueError, match=r"no\.such\.hook"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[*hooks, ("no.such.hook", fail)])
    assert torch_hooks(lvlm.bridge) == before and torch.equal(lvlm(inputs), clean)


@torch.no_grad()
def test_caches_hold_what_was_asked_for_and_nothing_else(lvlm, inputs):
    asked = ["blocks.1.hook_resid_mid", "vision.blocks.0.hook_mlp_out", "projector.hook_out"]
    _, cache = lvlm.run_with_cache(inputs, sites=asked)
    assert set(cache.keys()) == set(asked)
    assert cache["resid_mid", 1] is cache["blocks.1.hook_resid_mid"]
    _, everything = lvlm.run_with_cache(inputs, sites=None)
    assert set(everything.keys()) == {str(site) for site in lvlm.sites()}


@torch.no_grad()
@pytest.mark.parametrize(
    "site, place",
    [
        ("blocks.1.hook_resid_pre", "blocks.1.ln1.hook_in"),
        ("blocks.1.hook_resid_mid", "blocks.1.ln2.hook_in"),
        ("vision.blocks.1.hook_resid_pre", "vision_encoder.encoder_layers.1.ln1.hook_in"),
    ],
)
def test_hooks_in_place_do_not_leak_into_the_cache(lvlm, inputs, site, place):
    _, clean = lvlm.run_with_cache(inputs, sites=[site])

    def wipe(activation, hook):
        activation.zero_()

    _, cache = lvlm.run_with_cache(inputs, sites=[site], fwd_hooks=[(place, wipe)])
    assert torch.equal(cache[site], clean[site])


@torch.no_grad()
def test_the_cache_holds_what_the_model_went_on_with(lvlm, inputs):
    site = "blocks.1.hook_resid_mid"
    _, cache = lvlm.run_with_cache(inputs, sites=[site], fwd_hooks=[(site, lambda a, hook: torch.ones_like(a))])
    assert (cache[site] == 1).all()


@torch.no_grad()
def test_text_alone_has_no_vision_activations(lvlm, examples):
    inputs = lvlm.prepare(examples[1])
    with pytest.raises(ValueError, match="must hold an image"):
        lvlm.run_with_cache(inputs, sites=["vision.blocks.0.hook_mlp_out"])
    _, cache = lvlm.run_with_cache(inputs, sites=None)
    assert set(cache.keys()) == {str(site) for site in lvlm.sites(tower="language")}


@torch.no_grad()
def test_hooks_can_be_given_by_site_name_and_filter(lvlm, inputs):
    site = lvlm.sites(tower="language", component="hook_attn_out")[1]
    zero = lambda a, hook: a * 0  # noqa: E731
    by_site = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, zero)])
    by_name = lvlm.run_with_hooks(inputs, fwd_hooks=[(str(site), zero)])
    by_filter = lvlm.run_with_hooks(inputs, fwd_hooks=[(lambda name: name == str(site), zero)])
    with lvlm.hooks([(site, zero)]) as same:
        inside = same(inputs)
    assert same is lvlm
    assert torch.equal(by_site, by_name) and torch.equal(by_site, by_filter) and torch.equal(by_site, inside)
    heads = lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_q", zero)])
    assert not torch.equal(heads, lvlm(inputs))


@torch.no_grad()
def test_hooks_for_each_batch_are_made_for_every_way_of_running(lvlm, inputs, examples):
    site, batches = "blocks.1.hook_resid_post", []

    def make(batch):
        batches.append(batch)
        image = batch.spans.image

        def shift(activation, hook):
            return activation + 3.0 * image[..., None] if activation.shape[1] == image.shape[1] else activation

        return [(site, shift)]

    by_hand = lvlm.run_with_hooks(inputs, fwd_hooks=make(inputs))
    answers = lvlm.generate(inputs, max_new_tokens=4, fwd_hooks=make(inputs))
    batches.clear()
    with lvlm.hooks_for_each_batch(make) as same:
        assert same is lvlm
        assert torch.equal(lvlm(inputs), by_hand)
        assert torch.equal(lvlm.run_with_hooks(inputs, fwd_hooks=()), by_hand)
        assert torch.equal(lvlm.bind(inputs)(inputs.input_ids), by_hand)
        assert torch.equal(lvlm.generate(inputs, max_new_tokens=4).sequences, answers.sequences)
        logits, cache = lvlm.run_with_cache(inputs, sites=[site])
        assert torch.equal(logits, by_hand)
        other = lvlm.prepare(examples[1])
        lvlm(other)
        with lvlm.hooks_for_each_batch(lambda batch: [(site, lambda a, hook: a * 0)]):
            assert not lvlm.run_with_cache(inputs, sites=[site])[1][site].any()
    assert [batch.fingerprint() for batch in batches] == [
        *[inputs.fingerprint()] * 5,
        other.fingerprint(),
        inputs.fingerprint(),
    ]
    _, clean = lvlm.run_with_cache(inputs, sites=[site])
    difference = cache[site] - clean[site]
    assert not difference[~inputs.spans.image].any()
    torch.testing.assert_close(difference[inputs.spans.image], torch.full((8, 32), 3.0), rtol=0, atol=1e-4)


@torch.no_grad()
def test_close_restores_the_bridge(llava_maker, examples):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    bridge, processor, inputs = lvlm.bridge, lvlm.processor, lvlm.prepare(examples)
    lvlm(inputs)  # TransformerLens and transformers put hooks of their own on at the first pass
    lvlm.close()
    names, hooks = dict(bridge.hook_dict), torch_hooks(bridge)
    conversions = {name: point.hook_conversion for name, point in names.items()}
    assert names["blocks.0.hook_resid_mid"] is bridge.blocks[0].ln2.hook_in
    assert bridge.blocks[0].hook_resid_mid is bridge.blocks[0].ln2.hook_in
    assert not any(name.startswith(("vision.", "projector.")) for name in names)

    with HookedLVLM.from_bridge(bridge, processor) as again:
        logits = again(inputs)
        assert bridge.hook_dict["blocks.0.hook_resid_mid"] is not bridge.blocks[0].ln2.hook_in
        assert bridge.blocks[0].hook_resid_mid is bridge.hook_dict["blocks.0.hook_resid_mid"]
        with pytest.raises(ValueError, match="must not have care_lens's hook points yet"):
            HookedLVLM.from_bridge(bridge, processor)
    after = bridge.hook_dict
    assert after.keys() == names.keys() and all(after[name] is point for name, point in names.items())
    assert {name: point.hook_conversion for name, point in after.items()} == conversions
    assert torch_hooks(bridge) == hooks
    again.close()
    for call in (
        lambda: again(inputs),
        lambda: again.hook_name("blocks.0.hook_mlp_out"),
        lambda: again.bind(inputs),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    kwargs = inputs.model_kwargs()
    assert torch.equal(bridge(kwargs.pop("input_ids"), **kwargs), logits)


def test_what_cannot_be_wrapped_is_refused(llava_maker):
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model, processor = llava_maker("clip")
    model.config.image_token_id += 1
    with pytest.raises(ValueError, match="processor must be the model's own"):
        HookedLVLM.from_hf(model, processor)
    with pytest.raises(ValueError, match="register_family"):
        HookedLVLM.from_hf(torch.nn.Linear(2, 2), processor)
    model, processor = llava_maker("clip")
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    model.model.vision_tower.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention must be eager, got 'sdpa'"):
        HookedLVLM.from_bridge(bridge, processor)


@torch.no_grad()
def test_transformer_lens_patching_works_on_a_bound_model(lvlm, examples):
    from care_lens.core import Example

    other = Example("what is in the red", image=examples[2].image)
    clean, corrupted = lvlm.prepare(examples[0]), lvlm.prepare(other)
    bound = lvlm.bind(corrupted)
    assert isinstance(bound, TransformerLensModel) and bound.cfg.n_layers == 3
    _, cache = lvlm.bind(clean).run_with_cache(clean.input_ids)

    def metric(logits):
        return logits[0, -1, 18] - logits[0, -1, 17]

    result = patching.get_act_patch_resid_pre(bound, corrupted.input_ids, cache, metric)
    assert result.shape == (3, clean.input_ids.shape[1])
    for layer, position in [(0, 2), (1, 8), (2, 10)]:

        def patch(activation, hook, layer=layer, position=position):
            new = activation.clone()
            new[:, position] = cache["resid_pre", layer][:, position]
            return new

        logits = lvlm.run_with_hooks(corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)])
        torch.testing.assert_close(result[layer, position], metric(logits))
    assert result.std() > 0
    assert torch.equal(bound(corrupted.input_ids), lvlm(corrupted))
    with pytest.raises(ValueError, match="bound batch's shape"):
        bound(corrupted.input_ids[:, 1:])
    with pytest.raises(ValueError, match="image placeholders where"):
        bound(corrupted.input_ids.flip(1))
