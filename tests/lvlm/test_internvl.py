"""InternVL: tiles and the whole picture after them, pixel shuffle, scaled branches, towers as configured."""

import pytest
import torch
from PIL import ImageDraw
from zoo.internvl import make_internvl

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def lvlm():
    return HookedLVLM.from_hf(*make_internvl())


@pytest.mark.parametrize(
    ("size", "down", "across"),
    [((56, 28), 1, 2), ((32, 32), 2, 2), ((16, 16), 1, 1), ((20, 62), 3, 1), ((48, 32), 2, 3)],
)
def test_tiles_are_those_of_the_grid_that_fits_best(lvlm, picture, size, down, across):
    inputs = lvlm.prepare(Example("red", image=picture(0, size)))
    grids, (width, height) = inputs.spans.grids[0], size
    tiles = down * across
    assert len(grids) == inputs.pixel_values.shape[0] == (tiles + 1 if tiles > 1 else 1)
    assert [grid.start for grid in grids] == list(range(grids[0].start, grids[0].start + 4 * len(grids), 4))
    w, h = width / across, height / down
    for tile, grid in enumerate(grids[:tiles]):
        y, x = divmod(tile, across)
        assert grid.rectangle(grid.start) == pytest.approx((x * w, y * h, x * w + w / 2, y * h + h / 2))
        assert grid.rectangle(grid.start + 3) == pytest.approx((x * w + w / 2, y * h + h / 2, (x + 1) * w, (y + 1) * h))
    if tiles > 1:
        assert grids[-1].rectangle(grids[-1].start + 3) == pytest.approx((width / 2, height / 2, width, height))
    assert {grid.image for grid in grids} == {0}


@torch.no_grad()
def test_paint_shows_in_its_tile_and_in_the_whole_picture(lvlm, picture):
    before = picture(1, (32, 16))
    after = before.copy()
    ImageDraw.Draw(after).rectangle((24, 4, 27, 7), fill=(255, 0, 0))  # of the second tile, patch 1, 2
    sites = ["vision.hook_embed", "projector.hook_in", "blocks.0.hook_resid_pre"]
    inputs = [lvlm.prepare(Example("red", image=image)) for image in (before, after)]
    caches = [lvlm.run_with_cache(each, sites=sites)[1] for each in inputs]
    change = {site: (caches[1][site] - caches[0][site]).norm(dim=-1) for site in sites}
    embed = change["vision.hook_embed"]
    assert embed[1].nonzero()[:, 0].tolist() == [1 + 1 * 4 + 2] and not embed[0].any() and embed[2].any()
    left, right, whole = inputs[0].spans.grids[0]
    stream = change["blocks.0.hook_resid_pre"][0]
    assert not stream[left.positions()].any()
    assert change["projector.hook_in"][1].argmax() == 1
    assert right.positions()[int(stream[right.positions()].argmax())] == right.position(26, 6)
    assert set(stream.nonzero()[:, 0].tolist()) <= {*right.positions(), *whole.positions()}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_images_and_rows_without_any(lvlm, picture, side):
    rows = [
        Example("red", image=picture(0, (16, 16)), more_images=(picture(1, (56, 28)),)),
        Example("how to make a blue"),
        Example("what is in the picture", image=picture(2, (32, 32))),
    ]
    inputs = lvlm.prepare(rows, padding_side=side)
    assert [[grid.image for grid in row] for row in inputs.spans.grids] == [[0, 1, 1, 1], [], [0] * 5]
    assert inputs.image_rows == (0,) * 4 + (2,) * 5
    for row, grids in enumerate(inputs.spans.grids):
        expected = [position for grid in grids for position in grid.positions()]
        assert inputs.spans.image[row].nonzero()[:, 0].tolist() == expected
    _, cache = lvlm.run_with_cache(inputs, sites=["projector.hook_out", "blocks.0.hook_resid_pre"])
    stream = cache["blocks.0.hook_resid_pre"]
    at = [stream[row, grid.positions()] for row, grids in enumerate(inputs.spans.grids) for grid in grids]
    assert torch.equal(torch.stack(at), cache["projector.hook_out"])


@torch.no_grad()
def test_branches_are_what_is_added(lvlm, picture):
    inputs = lvlm.prepare(Example("red", image=picture(0, (32, 32))))
    names = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    _, cache = lvlm.run_with_cache(inputs, sites=[f"vision.blocks.1.{name}" for name in names])
    pre, attn, mid, mlp, post = (cache[f"vision.blocks.1.{name}"] for name in names)
    torch.testing.assert_close(pre + attn, mid)
    torch.testing.assert_close(mid + mlp, post)


VARIANTS = {
    "norms": {
        "vision": {
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "use_mean_pooling": False,
            "attention_bias": True,
            "use_absolute_position_embeddings": False,
        }
    },
    "layer": {"vision_feature_layer": -2},
    "qwen3": {"text": "qwen3"},
    "llama": {"text": "llama"},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_configurations_equal_hugging_face(picture, variant):
    model, processor = make_internvl(**VARIANTS[variant])
    plain, _ = make_internvl(**VARIANTS[variant])
    lvlm = HookedLVLM.from_hf(model, processor)
    inputs = lvlm.prepare([Example("red", image=picture(0, (32, 16))), Example("how to make a blue")])
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    assert torch.equal(clean, plain(**inputs.model_kwargs()).logits)
    assert lvlm.sites(tower="vision")[-1].layer == (1 if variant == "layer" else 2)
    for site in lvlm.sites():
        back = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook, held=cache[str(site)]: held.clone())])
        assert torch.equal(back, clean), site
        edited = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: a.roll(1, -1))])
        assert (edited - clean).abs().max() > 1e-5, site


@torch.no_grad()
def test_tiling_can_be_turned_off_in_the_processor(lvlm, picture):
    model, processor = make_internvl()
    processor.images_kwargs = {"crop_to_patches": False}
    (grid,) = HookedLVLM.from_hf(model, processor).prepare(Example("red", image=picture(0, (56, 28)))).spans.grids[0]
    assert grid.rectangle(grid.start + 3) == (28, 14, 56, 28)
