"""Llama 4: tiles on a padded canvas, the class token last, layers with and without experts."""

import pytest
import torch
from PIL import ImageDraw
from zoo.llama4 import make_llama4

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def lvlm():
    return HookedLVLM.from_hf(*make_llama4())


@torch.no_grad()
def test_tiles_of_a_padded_canvas(lvlm, picture):
    # 56 x 28 is shrunk to 48 x 24 in a canvas of 3 x 2 tiles of 16 x 16: a tile shows 56 / 3 pixels of its width.
    inputs = lvlm.prepare(Example("red", image=picture(0, (56, 28))))
    *tiles, whole = inputs.spans.grids[0]
    side = 56 / 3
    for i, grid in enumerate(tiles):
        y, x = divmod(i, 3)
        corner = (x * side, y * side)
        assert grid.rectangle(grid.start) == pytest.approx((*corner, corner[0] + side / 2, corner[1] + side / 2))
    assert whole.rectangle(whole.start + 3) == pytest.approx((28, 14, 56, 28))
    tokens = lvlm.tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist())
    x, y = "<|tile_x_separator|>", "<|tile_y_separator|>"
    assert [tokens[grid.stop] for grid in (*tiles, whole)] == [x, x, y, x, x, y, "<|image_end|>"]
    assert tokens[whole.start - 1] == "<|image|>"
    positions = [position for grid in (*tiles, whole) for position in grid.positions()]
    assert inputs.spans.image[0].nonzero()[:, 0].tolist() == positions


def test_a_small_picture_is_one_tile_that_may_be_padded(lvlm, picture):
    (grid,) = lvlm.prepare(Example("red", image=picture(0, (16, 8)))).spans.grids[0]
    assert grid.rectangle(grid.start + 3) == (8, 8, 16, 16)  # below the picture


@torch.no_grad()
def test_paint_shows_in_its_tile_and_in_the_whole_picture(lvlm, picture):
    before = picture(1, (32, 32))
    after = before.copy()
    ImageDraw.Draw(after).rectangle((4, 24, 7, 27), fill=(255, 0, 0))  # of the third tile, patch 2, 1
    sites = ["vision.hook_embed", "projector.hook_out", "blocks.0.hook_resid_pre"]
    inputs = [lvlm.prepare(Example("red", image=image)) for image in (before, after)]
    caches = [lvlm.run_with_cache(each, sites=sites)[1] for each in inputs]
    change = {site: (caches[1][site] - caches[0][site]).norm(dim=-1) for site in sites}
    embed = change["vision.hook_embed"]
    assert embed.shape == (5, 17) and embed[2].nonzero()[:, 0].tolist() == [2 * 4 + 1]
    assert not embed[[0, 1, 3]].any() and embed[4].any() and not embed[:, -1].any()
    grids, stream = inputs[0].spans.grids[0], change["blocks.0.hook_resid_pre"][0]
    assert set(stream.nonzero()[:, 0].tolist()) <= {*grids[2].positions(), *grids[4].positions()}
    assert grids[2].positions()[int(stream[grids[2].positions()].argmax())] == grids[2].position(5, 25)
    assert torch.equal(stream[inputs[0].spans.image[0]], change["projector.hook_out"].flatten())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_images_and_rows_without_any(lvlm, picture, side):
    rows = [
        Example("red", image=picture(0, (16, 16)), more_images=(picture(1, (32, 16)),)),
        Example("how to make a blue"),
        Example("what is in the picture", image=picture(2, (32, 32))),
    ]
    inputs = lvlm.prepare(rows, padding_side=side)
    assert [[grid.image for grid in row] for row in inputs.spans.grids] == [[0, 1, 1, 1], [], [0] * 5]
    assert inputs.image_rows == (0,) * 4 + (2,) * 5
    _, cache = lvlm.run_with_cache(inputs, sites=["projector.hook_out", "blocks.0.hook_resid_pre"])
    stream = cache["blocks.0.hook_resid_pre"]
    at = [stream[row, grid.positions()] for row, grids in enumerate(inputs.spans.grids) for grid in grids]
    assert torch.equal(torch.stack(at), cache["projector.hook_out"])


@torch.no_grad()
def test_the_class_token_is_last_and_no_patch(lvlm, picture):
    inputs = lvlm.prepare(Example("red", image=picture(0, (16, 16))))
    sites = ["vision.hook_embed", "vision.blocks.0.hook_resid_pre", "projector.hook_in"]
    _, cache = lvlm.run_with_cache(inputs, sites=sites)
    patches = [lvlm.patch_mask(site, cache[site])[0].tolist() for site in sites]
    assert patches == [[True] * 16 + [False]] * 2 + [[True] * 4]
    every = [lvlm.patch_mask(site, cache[site], class_tokens=True)[0].tolist() for site in sites]
    assert every == [[True] * 17] * 2 + [[True] * 4]
    assert "last patch is the CLS" in lvlm.site_info("vision.blocks.0.hook_resid_pre").note


@torch.no_grad()
def test_neurons_are_where_there_are_no_experts(lvlm, picture):
    neurons = [site.layer for site in lvlm.sites(tower="language") if site.component == "mlp.hook_post"]
    assert neurons == [1] and lvlm.site_info("blocks.1.mlp.hook_post").width == 48
    with pytest.raises(ValueError, match="experts"):
        lvlm.site_info("blocks.0.mlp.hook_post")
    inputs = lvlm.prepare(Example("red", image=picture(0, (16, 16))))
    names = ("hook_resid_mid", "hook_mlp_out", "hook_resid_post")
    _, cache = lvlm.run_with_cache(inputs, sites=[f"blocks.0.{name}" for name in names])
    mid, mlp, post = (cache[f"blocks.0.{name}"] for name in names)
    assert torch.equal(mid + mlp, post)


@torch.no_grad()
def test_pixels_come_in_the_dtype_of_the_model(picture):
    model, processor = make_llama4()
    processor.image_processor.do_normalize = True
    lvlm = HookedLVLM.from_hf(model, processor)
    inputs = lvlm.prepare(Example("red", image=picture(0, (16, 16))))
    assert processor.image_processor(picture(0, (16, 16)), return_tensors="pt")["pixel_values"].dtype == torch.bfloat16
    assert inputs.pixel_values.dtype == torch.float32 and lvlm(inputs).isfinite().all()
