"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V: which patch and which token is where, against hand calculations."""

import pytest
import torch
from PIL import ImageDraw
from zoo import glm4v, qwen_vl

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM

SPECIMENS = {specimen.name: specimen for specimen in [*qwen_vl.SPECIMENS, *glm4v.SPECIMENS]}
MODELS = {}


def model(name):
    if name not in MODELS:
        MODELS[name] = HookedLVLM.from_hf(*SPECIMENS[name].make())
    return MODELS[name]


@pytest.fixture(scope="module", params=SPECIMENS)
def lvlm(request):
    return model(request.param)


@pytest.fixture
def rows(picture):
    """Text alone, and two pictures of 4 x 4 and 3 x 7 tokens (their sizes are multiples of 8, so nothing is resized)."""
    return [
        Example("how to make a blue", response="no"),
        Example("red", image=picture(0, (32, 32)), more_images=(picture(1, (56, 24)),), response="sure i cannot"),
    ]


def moved(before, after):
    """[image or row, position] where anything changed."""
    return {tuple(where) for where in (before != after).any(-1).nonzero().tolist()}


def patches(image, rows, cols, wide):
    return {(image, row * wide + col) for row in rows for col in cols}


@pytest.mark.parametrize("name", SPECIMENS)
def test_a_resized_picture_has_the_grid_that_the_hand_gets(name, picture):
    inputs = model(name).prepare(Example("red", image=picture(0, (56, 28))))
    (grid,) = inputs.spans.grids[0]
    before = 4 if name == "glm4v" else 3  # [gMASK] <sop> user begin, or im_start "user" vision_start
    assert (grid.start, grid.rows, grid.cols) == (before, 4, 7)
    assert grid.rectangle(grid.start + 7 + 2) == (16.0, 7.0, 24.0, 14.0)
    assert grid.position(55, 27) == grid.stop - 1
    assert inputs.extra["image_grid_thw"].tolist() == [[1, 8, 14]]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_pixels_are_found_at_their_patches_and_tokens(lvlm, rows, side):
    clean = lvlm.prepare(rows, padding_side=side, responses=True)
    first, second = clean.spans.grids[1]
    assert [(grid.image, grid.rows, grid.cols) for grid in (first, second)] == [(0, 4, 4), (1, 3, 7)]
    token = second.position(44, 12)
    assert second.rectangle(token) == (40.0, 8.0, 48.0, 16.0)
    painted = rows[1].more_images[0].copy()
    ImageDraw.Draw(painted).rectangle((40, 8, 47, 15), fill="red")
    other = Example(rows[1].prompt, image=rows[1].image, more_images=(painted,), response=rows[1].response)
    dirty = lvlm.prepare([rows[0], other], padding_side=side, responses=True)
    sites = ["vision.hook_embed", "vision.blocks.0.hook_resid_pre"]
    caches = [lvlm.run_with_cache(inputs, sites=sites)[1] for inputs in (clean, dirty)]
    for site in sites:
        assert caches[0][site].shape[:2] == (2, 84)
        assert moved(caches[0][site], caches[1][site]) == patches(1, (2, 3), (10, 11), 14)


@torch.no_grad()
def test_a_token_is_made_of_its_own_four_patches(lvlm, rows):
    inputs = lvlm.prepare(rows)
    last = f"vision.blocks.{len(lvlm.sites(tower='vision', component='hook_resid_post')) - 1}.hook_resid_post"
    _, clean = lvlm.run_with_cache(inputs, sites=["projector.hook_out"])

    def edit(activation, hook):
        changed = activation.clone()
        for image, patch in patches(1, (2, 3), (10, 11), 14):
            changed[image, patch] += 1
        return changed

    _, edited = lvlm.run_with_cache(inputs, sites=["projector.hook_out"], fwd_hooks=[(last, edit)])
    assert moved(clean["projector.hook_out"], edited["projector.hook_out"]) == {(1, 1 * 7 + 5)}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_projected_tokens_are_in_the_order_of_the_grids(lvlm, rows, side):
    inputs = lvlm.prepare([rows[1], rows[0], rows[1]], padding_side=side)
    assert inputs.image_rows == (0, 0, 2, 2)
    _, cache = lvlm.run_with_cache(inputs, sites=["projector.hook_out", "blocks.0.hook_resid_pre"])
    out, stream = cache["projector.hook_out"], cache["blocks.0.hook_resid_pre"]
    grids = [(row, grid) for row, grids in enumerate(inputs.spans.grids) for grid in grids]
    for image, (row, grid) in enumerate(grids):
        at = grid.positions()
        assert torch.equal(out[image, : len(at)], stream[row, at])
        assert not out[image, len(at) :].any()


@torch.no_grad()
def test_text_alone_does_not_depend_on_the_pictures_before_it(lvlm, rows):
    inputs = lvlm.prepare([rows[0], Example("red")])
    assert not inputs.model_kwargs()["mm_token_type_ids"].any()
    before, answer = lvlm(inputs), lvlm.generate(inputs, max_new_tokens=4).sequences
    lvlm(lvlm.prepare(rows))
    lvlm.generate(lvlm.prepare(rows), max_new_tokens=2)
    assert torch.equal(lvlm(inputs), before)
    assert torch.equal(lvlm.generate(inputs, max_new_tokens=4).sequences, answer)


def test_images_are_marked_as_such_for_the_positions(lvlm, rows):
    inputs = lvlm.prepare(rows, responses=True)
    assert torch.equal(inputs.model_kwargs()["mm_token_type_ids"].bool(), inputs.spans.image)
    assert "position_ids" not in inputs.model_kwargs()


def test_the_missing_pattern_has_a_reason(lvlm, rows):
    with pytest.raises(ValueError, match="use attn"):
        lvlm.run_with_hooks(lvlm.prepare(rows), fwd_hooks=[("vision.blocks.0.attn.hook_pattern", lambda a, hook: a)])


@torch.no_grad()
def test_qwen2_5_attends_within_windows(rows):
    """Windows of 16 x 16 px; layer 0 is windowed, layer 1 is not."""
    lvlm, reached = model("qwen2_5_vl"), {}
    inputs = lvlm.prepare(rows)

    def edit(activation, hook):
        changed = activation.clone()
        changed[1, 3 * 14 + 13] += 1  # at (52, 12): in the last window of the first row, which is 8 px wide
        return changed

    for layer in (0, 1):
        out = f"vision.blocks.{layer}.hook_resid_post"
        _, clean = lvlm.run_with_cache(inputs, sites=[out])
        hooks = [(f"vision.blocks.{layer}.hook_resid_pre", edit)]
        _, edited = lvlm.run_with_cache(inputs, sites=[out], fwd_hooks=hooks)
        reached[layer] = moved(clean[out], edited[out])
    assert reached[0] == patches(1, range(4), (12, 13), 14)
    assert reached[1] == patches(1, range(6), range(14), 14)


@torch.no_grad()
def test_deepstack_adds_its_features_behind_the_first_blocks(rows):
    lvlm = model("qwen3_vl")
    inputs = lvlm.prepare(rows)
    _, cache = lvlm.run_with_cache(inputs, sites=lvlm.sites(tower="language"))
    image = {tuple(where) for where in inputs.spans.image.nonzero().tolist()}
    for layer in (0, 1):
        post, pre = cache[f"blocks.{layer}.hook_resid_post"], cache[f"blocks.{layer + 1}.hook_resid_pre"]
        assert moved(post, pre) == image
    for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "projector.hook_out"):
        assert "DeepStack" in lvlm.site_info(site).note
