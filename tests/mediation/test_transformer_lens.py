"""Equality with TransformerLens's own activation patching on the language tower."""

import pytest
import torch
from transformer_lens import patching

from care_lens.mediation import heads, mediate, patch_map

SWEEPS = {
    "hook_resid_pre": patching.get_act_patch_resid_pre,
    "hook_attn_out": patching.get_act_patch_attn_out,
    "hook_mlp_out": patching.get_act_patch_mlp_out,
}


def theirs(model, pair, margin, component):
    """[layer, pos] Y(x with M := M(x*)) of one pair: the corrupted run is x, the clean cache that of x*."""
    safe, unsafe = model.prepare(pair.safe), model.prepare(pair.unsafe)
    with torch.no_grad():
        _, cache = model.bind(unsafe).run_with_cache(unsafe.input_ids)
        return SWEEPS[component](
            model.bind(safe), safe.input_ids, cache, lambda logits: margin(logits, safe)[0]
        ).double(), float(margin(model(safe), safe)[0])


@pytest.mark.parametrize("component", SWEEPS)
def test_last_position(model, pictured, margin, component, read):
    for pair in (pictured[:1], pictured[1:2]):
        patched, untouched = theirs(model, pair, margin, component)
        sites = model.sites(tower="language", component=component)
        ours = mediate(model, pair, outcome=margin, sites=sites, positions=("last",), n_boot=10, progress=False)
        for site in sites:
            found = read(ours, site, "last", "NIE")
            assert found == pytest.approx(float(patched[site.layer, -1]) - untouched, abs=1e-5)
            assert abs(found) > 1e-4 or site.layer == 0


def cells(model, pair, margin, mediators):
    """[layer, pos] or [layer, pos, head] safe_patched of one pair, every position by itself."""
    result = mediate(model, pair, outcome=margin, sites=mediators, positions=("each",), n_boot=10, progress=False)
    frame = result.details.astype({"position": int})
    keys = ["layer", "position"] + (["head"] if frame["head"].notna().any() else [])
    values = frame.sort_values(keys)["safe_patched"].to_numpy()
    return torch.from_numpy(values.copy()).reshape([frame[key].nunique() for key in keys])


@pytest.mark.parametrize("component", SWEEPS)
def test_every_position_cell_by_cell(model, pictured, margin, component):
    for pair in (pictured[:1], pictured[1:2]):
        expected, untouched = theirs(model, pair, margin, component)
        found = cells(model, pair, margin, model.sites(tower="language", component=component))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert (expected - untouched).abs().max() > 1e-2


def test_every_head_at_every_position_cell_by_cell(model, pictured, margin):
    pair = pictured[:1]
    safe, unsafe = model.prepare(pair.safe), model.prepare(pair.unsafe)
    with torch.no_grad():
        _, cache = model.bind(unsafe).run_with_cache(unsafe.input_ids)
        expected = patching.get_act_patch_attn_head_out_by_pos(
            model.bind(safe), safe.input_ids, cache, lambda logits: margin(logits, safe)[0]
        ).double()
    found = cells(model, pair, margin, heads(model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - expected[0, 0, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("component", SWEEPS)
def test_image_patches(model, pictured, margin, component):
    pair = pictured[1:2]
    patched, untouched = theirs(model, pair, margin, component)
    where = model.prepare(pair.safe).spans.image[0]
    for site in model.sites(tower="language", component=component)[:2]:
        ours = patch_map(model, pair, outcome=margin, site=site, n_boot=10, progress=False)
        expected = (patched[site.layer, where] - untouched).reshape(2, 2)
        torch.testing.assert_close(torch.from_numpy(ours.grid), expected, atol=1e-5, rtol=0)
        assert expected.abs().max() > 2e-4
