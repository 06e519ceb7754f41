"""Gemma3: pooled tokens, post-norms, and image tokens that see each other in both directions."""

import pytest
import torch
from forced import forced_logits
from PIL import Image
from zoo.gemma3 import make_gemma3

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM

WINDOW = 6


@pytest.fixture(scope="module")
def gemma3():
    return HookedLVLM.from_hf(*make_gemma3(WINDOW))


def plain_picture(size=(32, 32)):
    return Image.new("RGB", size, (120, 120, 120))


def test_rectangles_are_those_of_pooled_tokens(gemma3):
    inputs = gemma3.prepare(Example("red", image=plain_picture((80, 40))))
    ((grid,),) = inputs.spans.grids
    assert grid.positions() == inputs.spans.image[0].nonzero()[:, 0].tolist()
    assert [grid.rectangle(p) for p in grid.positions()] == [
        (0.0, 0.0, 40.0, 20.0),
        (40.0, 0.0, 80.0, 20.0),
        (0.0, 20.0, 40.0, 40.0),
        (40.0, 20.0, 80.0, 40.0),
    ]


def test_patches_that_are_not_pooled_belong_to_no_token():
    # 5 x 5 patches are pooled two by two: the fifth row and column are dropped, a fifth of the picture each way.
    lvlm = HookedLVLM.from_hf(*make_gemma3(image_size=40))
    ((grid,),) = lvlm.prepare(Example("red", image=plain_picture((100, 50)))).spans.grids
    assert grid.rectangle(grid.positions()[-1]) == (40.0, 20.0, 80.0, 40.0)
    with pytest.raises(ValueError, match="does not see"):
        grid.position(90, 10)


@torch.no_grad()
@pytest.mark.parametrize("token", range(4))
def test_a_painted_token_is_where_the_grid_says(gemma3, token):
    sites = ["vision.hook_embed", "blocks.0.hook_resid_pre"]
    clean = gemma3.prepare(Example("red", image=plain_picture()))
    grid = clean.spans.grids[0][0]
    position = grid.positions()[token]
    changed = plain_picture()
    changed.paste((255, 0, 30), tuple(int(edge) for edge in grid.rectangle(position)))
    _, before = gemma3.run_with_cache(clean, sites=sites)
    _, after = gemma3.run_with_cache(gemma3.prepare(Example("red", image=changed)), sites=sites)
    embed, stream = ((after[site] - before[site])[0].norm(dim=-1) for site in sites)
    row, col = divmod(token, 2)
    first = 8 * row + 2 * col
    assert embed.nonzero()[:, 0].tolist() == [first, first + 1, first + 4, first + 5]
    assert stream.argmax() == position and not stream[~clean.spans.image[0]].any()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_of_one_image_see_each_other_and_no_later_one(gemma3, picture, side):
    two = Example("what is", image=picture(0, (40, 20)), more_images=(picture(1, (16, 32)),), response="sure")
    inputs = gemma3.prepare([two, Example("red", response="no")], responses=True, padding_side=side)
    assert [grid.image for grid in inputs.spans.grids[0]] == [0, 1] and inputs.image_rows == (0, 0)
    assert torch.equal(inputs.token_inputs["token_type_ids"].bool(), inputs.spans.image)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    _, cache = gemma3.run_with_cache(inputs, sites=names)
    n = inputs.input_ids.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    for row, grids in enumerate(inputs.spans.grids):
        real = ~inputs.spans.padding[row]
        sees = query >= key
        for grid in grids:
            inside = torch.isin(torch.arange(n), torch.tensor(grid.positions()))
            sees = sees | (inside[:, None] & inside[None])
        for name, window in zip(names, (WINDOW, n, WINDOW), strict=True):
            expected = (sees & (query - key < window) & real[None])[real]
            assert torch.equal(cache[name][row].amin(0)[real] > 0, expected), name


@torch.no_grad()
def test_branches_add_up_to_the_stream(gemma3, picture):
    inputs = gemma3.prepare(Example("red", image=picture(0)))
    _, cache = gemma3.run_with_cache(inputs, sites=None)
    for layer in range(3):
        at = f"blocks.{layer}."
        mid = cache[at + "hook_resid_pre"] + cache[at + "hook_attn_out"]
        torch.testing.assert_close(cache[at + "hook_resid_mid"], mid)
        torch.testing.assert_close(cache[at + "hook_resid_post"], mid + cache[at + "hook_mlp_out"])


@torch.no_grad()
def test_a_response_is_read_as_it_would_be_generated(gemma3, picture):
    rows = [Example("what is in the picture", image=picture(0), response="sure red"), Example("red", response="no no")]
    plain, _ = make_gemma3(WINDOW)
    inputs = gemma3.prepare(rows, responses=True)
    answers = [ids[mask].tolist() for ids, mask in zip(inputs.input_ids, inputs.spans.response, strict=True)]
    steps = forced_logits(plain, gemma3.prepare(rows), answers)
    torch.testing.assert_close(gemma3(inputs)[:, -4:-1], steps, rtol=1e-4, atol=1e-4)


def test_token_types_are_given_even_where_there_is_no_image(gemma3):
    inputs = gemma3.prepare(Example("red"))
    assert inputs.pixel_values is None and not inputs.model_kwargs()["token_type_ids"].any()


def test_pan_and_scan_is_refused(picture):
    model, processor = make_gemma3()
    processor.images_kwargs = {**processor.images_kwargs, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 4}
    lvlm = HookedLVLM.from_hf(model, processor)
    with pytest.raises(ValueError, match="got 5 of 1; pan and scan is not supported"):
        lvlm.prepare(Example("red", image=picture(0, (80, 16))))
