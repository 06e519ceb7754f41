"""Every listed site does what its name says, against a forward pass that is written out by hand."""

from dataclasses import replace

import pytest
import torch
from reference import Edit, forward

from care_lens.core import Site
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.families import LLAVA, registry

VARIANTS = {
    "clip": ("clip", -2),
    "clip-first": ("clip", 1),
    "clip-several": ("clip", [-4, -2]),
    "siglip": ("siglip", -2),
    "siglip-last": ("siglip", -1),
}


@pytest.fixture(scope="module", params=VARIANTS)
def twins(request, llava_maker, examples):
    """A HookedLVLM, a plain model of the same weights, and a batch."""
    vision, layer = VARIANTS[request.param]
    lvlm = HookedLVLM.from_hf(*llava_maker(vision, feature_layer=layer))
    plain, _ = llava_maker(vision, feature_layer=layer)
    return lvlm, plain, lvlm.prepare(examples)


def bump(activation):
    generator = torch.Generator().manual_seed(activation.numel())
    return 0.7 * activation + 0.5 * torch.randn(activation.shape, generator=generator)


@torch.no_grad()
def test_every_editable_site_acts_as_its_name_says(twins):
    lvlm, plain, inputs = twins
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    real = ~inputs.spans.padding
    for site in lvlm.sites():
        if not lvlm.site_info(site).editable:
            continue
        edit = Edit(str(site), bump)
        expected = forward(plain, inputs, edit)
        edited = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: bump(a))])
        assert edit.seen is not None, site
        read, seen = cache[str(site)], edit.seen
        if site.tower == "language":
            rows = (slice(None), real.any(1)) if site.component == "attn.hook_pattern" else None
            keep = real.nonzero(as_tuple=True)
            read, seen = (t.transpose(1, 2)[keep] if rows else t[keep] for t in (read, seen))
        torch.testing.assert_close(
            read, seen, rtol=1e-4, atol=1e-5, msg=lambda m, site=site: f"{site} reads wrong: {m}"
        )
        torch.testing.assert_close(
            edited[real],
            expected[real],
            rtol=1e-3,
            atol=1e-4,
            msg=lambda m, site=site: f"{site} edits wrong: {m}",
        )
        assert (edited - clean)[real].abs().max() > 1e-3, f"{site}: the edit does nothing"


@torch.no_grad()
def test_writing_back_what_was_read_changes_no_bit(twins):
    lvlm, _, inputs = twins
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    for site in lvlm.sites():
        if lvlm.site_info(site).editable:
            back = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook, held=cache[str(site)]: held)])
        else:
            back = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: a)])
        assert torch.equal(back, clean), site


def test_only_the_vision_layers_that_are_read_are_listed(twins):
    lvlm, plain, _ = twins
    taps = plain.config.vision_feature_layer
    depth = max(tap % 5 for tap in ([taps] if isinstance(taps, int) else taps))
    assert {site.layer for site in lvlm.sites(tower="vision")} - {None} == set(range(depth))
    assert lvlm.n_layers("vision") == depth and lvlm.n_layers() == 3
    if depth < 4:
        with pytest.raises(ValueError, match=f"at layer {depth - 1}, so nothing above it.*projector.hook_in"):
            lvlm.site_info(Site("vision", depth, "hook_mlp_out"))
    with pytest.raises(ValueError, match="layers 0 to 2"):
        lvlm.hook_name("blocks.3.hook_resid_pre")


@torch.no_grad()
def test_names_are_the_same_on_the_bridge(lvlm, examples):
    inputs = lvlm.prepare(examples)
    kwargs = inputs.model_kwargs()
    ids = kwargs.pop("input_ids")
    hook_dict = lvlm.bridge.hook_dict
    for site in lvlm.sites():
        assert lvlm.hook_name(site) == str(site) and str(site) in hook_dict
        if not lvlm.site_info(site).editable or site.layer not in (None, 1):
            continue
        hooks = [(str(site), lambda a, hook: bump(a))]
        through_bridge = lvlm.bridge.run_with_hooks(ids, fwd_hooks=hooks, **kwargs)
        assert torch.equal(through_bridge, lvlm.run_with_hooks(inputs, fwd_hooks=hooks)), site
        _, cache = lvlm.bridge.run_with_cache(ids, names_filter=[str(site)], **kwargs)
        _, ours = lvlm.run_with_cache(inputs, sites=[site])
        assert torch.equal(cache[str(site)], ours[str(site)]), site


def test_sites_are_listed_in_the_order_of_the_forward_pass(lvlm, examples):
    inputs, fired = lvlm.prepare(examples), []
    with torch.no_grad():
        lvlm.run_with_hooks(inputs, fwd_hooks=[(s, lambda a, hook, s=s: fired.append(s)) for s in lvlm.sites()])
    order = [site for site in lvlm.sites() if site.component != "attn.hook_pattern"]
    assert [site for site in fired if site.component != "attn.hook_pattern"] == order
    assert set(fired) == set(lvlm.sites())


def test_site_info_tells_the_shape(lvlm, examples):
    _, cache = lvlm.run_with_cache(lvlm.prepare(examples), sites=None)
    for site in lvlm.sites():
        info, shape = lvlm.site_info(site), cache[str(site)].shape
        assert len(info.axes) == len(shape)
        if info.width is None:
            with pytest.raises(ValueError, match="fixed width"):
                lvlm.width(site)
        else:
            assert lvlm.width(site) == shape[-1]
    is_clip = lvlm.hf_model.config.vision_config.model_type == "clip_vision_model"
    assert ("CLS" in lvlm.site_info("vision.blocks.0.hook_mlp_out").note) == is_clip


def test_read_only_sites_refuse_edits(llava_maker, examples, monkeypatch):
    locked = replace(LLAVA.vision, read_only={"attn.hook_z": "for the test; edit hook_attn_out instead"})
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    registry.register_family(replace(LLAVA, vision=locked))
    with HookedLVLM.from_hf(*llava_maker("clip")) as lvlm:
        inputs, site = lvlm.prepare(examples), "vision.blocks.0.attn.hook_z"
        assert not lvlm.site_info(site).editable
        with pytest.raises(ValueError, match=r"read-only.*hook_attn_out"):
            lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: a * 0)])
        assert torch.equal(lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: None)]), lvlm(inputs))


def test_wrong_shapes_are_refused(lvlm, examples):
    inputs = lvlm.prepare(examples)
    with pytest.raises(ValueError, match="must return the shape it was given"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", lambda a, hook: a[:, :1])])
    with pytest.raises(TypeError, match="tensor or None, got float"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_mlp_out", lambda a, hook: 0.0)])


@torch.no_grad()
def test_edits_at_the_middle_and_later_in_the_same_block_compose(lvlm, llava_maker, examples):
    inputs = lvlm.prepare(examples)
    for prefix in ("blocks.1.", "vision.blocks.1."):
        _, cache = lvlm.run_with_cache(
            inputs,
            sites=[prefix + "hook_resid_post"],
            fwd_hooks=[
                (prefix + "hook_resid_mid", lambda a, hook: torch.ones_like(a)),
                (prefix + "hook_mlp_out", lambda a, hook: torch.full_like(a, 2.0)),
            ],
        )
        assert (cache[prefix + "hook_resid_post"] == 3.0).all()
