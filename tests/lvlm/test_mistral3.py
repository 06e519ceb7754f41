"""Mistral 3: grids with break tokens, images of different sizes in one row of the tower, merged patches."""

import pytest
import torch
from PIL import ImageDraw
from zoo.mistral3 import make_mistral3

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def lvlm():
    return HookedLVLM.from_hf(*make_mistral3())


def words(lvlm, inputs, row):
    return lvlm.tokenizer.convert_ids_to_tokens(inputs.input_ids[row].tolist())


@torch.no_grad()
def test_a_grid_is_what_the_processor_makes_of_the_picture(lvlm, picture):
    # 56 x 28 fits in 48 x 48 as 48 x 24: three rows of six tokens of 8 x 8, each row followed by a token of its own.
    inputs = lvlm.prepare(Example("red", image=picture(0, (56, 28))))
    (grid,) = inputs.spans.grids[0]
    assert (grid.rows, grid.cols, grid.stride) == (3, 6, 7)
    assert grid.rectangle(grid.start + 7) == pytest.approx((0, 28 / 3, 56 / 6, 56 / 3))
    assert grid.position(55, 27) == grid.stop - 1
    tokens = words(lvlm, inputs, 0)
    assert [tokens[grid.start + row * 7 + 6] for row in range(3)] == ["[IMG_BREAK]", "[IMG_BREAK]", "[IMG_END]"]
    assert all(tokens[position] == "[IMG]" for position in grid.positions())
    assert inputs.spans.image[0].nonzero()[:, 0].tolist() == grid.positions()


@torch.no_grad()
def test_paint_shows_where_it_is(lvlm, picture):
    before = picture(1, (48, 40))
    after = before.copy()
    ImageDraw.Draw(after).rectangle((32, 16, 39, 23), fill=(255, 0, 0))
    sites = ["vision.hook_embed", "projector.hook_out", "blocks.0.hook_resid_pre"]
    inputs = [lvlm.prepare(Example("red", image=image)) for image in (before, after)]
    caches = [lvlm.run_with_cache(each, sites=sites)[1] for each in inputs]
    change = {site: (caches[1][site] - caches[0][site])[0].norm(dim=-1) for site in sites}
    assert change["vision.hook_embed"].nonzero()[:, 0].tolist() == [4 * 12 + 8, 4 * 12 + 9, 5 * 12 + 8, 5 * 12 + 9]
    assert change["projector.hook_out"].argmax() == 2 * 6 + 4
    (grid,) = inputs[0].spans.grids[0]
    assert change["blocks.0.hook_resid_pre"].argmax() == grid.position(36, 20)
    assert set(change["blocks.0.hook_resid_pre"].nonzero()[:, 0].tolist()) <= set(grid.positions())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_images_that_share_a_row_of_the_tower_do_not_meet(lvlm, picture, side):
    images = [picture(0, (16, 24)), picture(1, (40, 8)), picture(2, (32, 32))]
    rows = [
        Example("red", image=images[0], more_images=(images[1],)),
        Example("how to make a blue"),
        Example("what is in the picture", image=images[2]),
    ]
    inputs = lvlm.prepare(rows, padding_side=side)
    assert [[(g.image, g.rows, g.cols) for g in row] for row in inputs.spans.grids] == [
        [(0, 3, 2), (1, 1, 5)],
        [],
        [(0, 4, 4)],
    ]
    assert inputs.image_rows == (0, 0, 2)
    for row, grids in enumerate(inputs.spans.grids):
        expected = [position for grid in grids for position in grid.positions()]
        assert inputs.spans.image[row].nonzero()[:, 0].tolist() == expected
    site = "vision.blocks.2.hook_resid_post"
    _, cache = lvlm.run_with_cache(inputs, sites=[site, "projector.hook_out"])
    assert cache[site].shape[:2] == (3, 64) and cache["projector.hook_out"].shape[:2] == (3, 16)
    assert not cache[site][0, 24:].any() and not cache[site][1, 20:].any()
    for entry, image in enumerate(images):
        _, alone = lvlm.run_with_cache(lvlm.prepare(Example("red", image=image)), sites=[site])
        patches = alone[site].shape[1]
        torch.testing.assert_close(cache[site][entry, :patches], alone[site][0], rtol=1e-4, atol=1e-4)

    def edit(activation, hook):
        return torch.cat([activation[:2], activation[2:] + 1.0])

    clean, edited = lvlm(inputs), lvlm.run_with_hooks(inputs, fwd_hooks=[(site, edit)])
    torch.testing.assert_close(edited[:2], clean[:2], rtol=1e-4, atol=1e-4)
    assert (edited[2] - clean[2])[~inputs.spans.padding[2]].abs().max() > 1e-2


def test_there_is_no_pattern_in_the_tower_and_it_is_said_why(lvlm):
    with pytest.raises(ValueError, match="all images in one row"):
        lvlm.site_info("vision.blocks.0.attn.hook_pattern")


@torch.no_grad()
def test_the_tower_ends_at_the_layer_that_is_read(picture):
    model, processor = make_mistral3(vision_feature_layer=-2)
    plain, _ = make_mistral3(vision_feature_layer=-2)
    lvlm = HookedLVLM.from_hf(model, processor)
    inputs = lvlm.prepare(Example("red", image=picture(0, (24, 16))))
    clean = lvlm(inputs)
    assert torch.equal(clean, plain(**inputs.model_kwargs()).logits)
    assert {site.layer for site in lvlm.sites(tower="vision")} == {None, 0, 1}
    edited = lvlm.run_with_hooks(inputs, fwd_hooks=[("vision.blocks.1.hook_resid_post", lambda a, hook: a.roll(1, -1))])
    assert (edited - clean).abs().max() > 1e-2
