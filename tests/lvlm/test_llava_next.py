"""LLaVA-NeXT and LLaVA-OneVision: overview, crops and newlines; which token shows which pixels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextProcessor, LlavaOnevisionConfig, LlavaOnevisionProcessor
from zoo.llava_next import SPECIMENS

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.families.llava_next import image_layout

SIDES = {"llava-next": 16, "llava-onevision": 20}


@pytest.fixture(scope="module", params=SPECIMENS[:2], ids=lambda specimen: specimen.name)
def specimen(request):
    return request.param


@pytest.fixture(scope="module")
def twins(specimen):
    lvlm, (plain, _) = HookedLVLM.from_hf(*specimen.make()), specimen.make()
    return lvlm, plain


@pytest.fixture(scope="module")
def rows(picture):
    """Two pictures, none, one of another shape."""
    return [
        Example("red then blue", image=picture(0, (40, 17)), more_images=(picture(1, (20, 60)),), response="no"),
        Example("how to make a blue", response="sorry"),
        Example("what is in the picture", image=picture(2, (33, 40)), response="sure red"),
    ]


def black(size, white=None):
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    if white is not None:
        x0, y0, x1, y1 = (max(round(edge), 0) for edge in white)
        pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def read(lvlm, example, site, **kwargs):
    inputs = lvlm.prepare(example)
    return lvlm.run_with_cache(inputs, sites=[site], **kwargs)[1][site]


def most_changed(lvlm, size):
    """For each patch of each tile, the position that depends on it most, found by changing the projector's output."""
    site, example = "blocks.0.hook_resid_pre", Example("red", image=black(size))
    features, clean = (read(lvlm, example, name) for name in ("projector.hook_out", site))
    found = {}
    for tile, patch in np.ndindex(*features.shape[:2]):

        def add(activation, hook, at=(tile, patch)):
            activation = activation.clone()
            activation[at] += 1
            return activation

        change = (read(lvlm, example, site, fwd_hooks=[("projector.hook_out", add)]) - clean)[0].norm(dim=-1)
        found[tile, patch] = int(change.argmax()) if change.max() > 0 else None
    return found


@torch.no_grad()
@pytest.mark.parametrize("size", [(56, 28), (30, 10), (20, 60), (32, 32), (40, 34), (50, 70)])
def test_a_token_shows_the_pixels_of_its_rectangle(specimen, twins, size):
    """Paint the pixels of each token: the patch that changes most is the one from which that token is made."""
    lvlm, _ = twins
    grids = lvlm.prepare(Example("red", image=black(size))).spans.grids[0]
    to_position, site = most_changed(lvlm, size), "vision.hook_embed"
    clean, special = read(lvlm, Example("red", image=black(size)), site), int(specimen.name == "llava-next")
    checked = 0
    for index, grid in enumerate(grids):
        for position in grid.positions():
            x0, y0, x1, y1 = grid.rectangle(position)
            inside = (max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1]))
            if (inside[2] - inside[0]) * (inside[3] - inside[1]) < (x1 - x0) * (y1 - y0) / 2:
                continue  # it shows padding for the most part
            change = (read(lvlm, Example("red", image=black(size, inside)), site) - clean)[:, special:].norm(dim=-1)
            change[1:] *= index > 0  # the picture is shown twice: look at the overview or at the crops
            change[0] *= index == 0
            tile, patch = divmod(int(change.argmax()), change.shape[1])
            assert to_position[tile, patch] == position, (index, position)
            checked += 1
    assert checked > 4


@torch.no_grad()
def test_positions_are_overview_then_crops_with_a_newline_a_row(specimen, twins):
    """A picture that fills two crops side by side: 4 tokens of overview, and two rows of 4 with a newline each."""
    lvlm, plain = twins
    side = SIDES[specimen.name]
    example = Example("red", image=black((2 * side, side)))
    inputs = lvlm.prepare(example)
    first = int(inputs.spans.image[0].nonzero()[0])
    assert inputs.spans.image[0].sum() == 14 and inputs.image_rows == (0, 0, 0)
    fine = {(row, col): first + 4 + 5 * row + col for row in range(2) for col in range(5)}
    expected = {(0, patch): first + patch for patch in range(4)}
    for tile, patch in np.ndindex(2, 4):
        expected[1 + tile, patch] = fine[patch // 2, 2 * tile + patch % 2]
    assert most_changed(lvlm, example.image.size) == expected
    stream = read(lvlm, example, "blocks.0.hook_resid_pre")[0]
    newlines = [fine[0, 4], fine[1, 4]]
    torch.testing.assert_close(stream[newlines], plain.model.image_newline.expand(2, -1))
    in_grids = {position for grid in inputs.spans.grids[0] for position in grid.positions()}
    assert in_grids == set(range(first, first + 14)) - set(newlines)
    for (tile, patch), position in expected.items():
        (grid,) = [grid for grid in inputs.spans.grids[0] if position in grid.positions()]
        row, col = divmod(patch, 2)
        left, width = (16 * col, 16) if tile == 0 else (side * (tile - 1) + 8 * col, 8)
        rectangle = (left, 8 * row, left + width, 8 * row + 8)
        assert grid.rectangle(position) == pytest.approx(rectangle), (tile, patch)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_images_a_row_and_rows_without_are_what_the_processor_makes(specimen, twins, rows, side):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows, padding_side=side)
    template = lvlm.processor.apply_chat_template
    turns = [[{"type": "image"}] * len(row.images) + [{"type": "text", "text": row.prompt}] for row in rows]
    texts = [template([{"role": "user", "content": t}], add_generation_prompt=True, tokenize=False) for t in turns]
    images = [list(row.images) for row in rows if row.images]
    raw = lvlm.processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
    assert set(raw) == set(inputs.generate_kwargs())
    for name, tensor in inputs.generate_kwargs().items():
        assert torch.equal(torch.as_tensor(raw[name]), tensor), name
    assert torch.equal(lvlm(inputs), plain(**inputs.model_kwargs()).logits)
    _, cache = lvlm.run_with_cache(inputs, sites=["vision.hook_embed", "projector.hook_out"])
    counts = {"llava-next": (4 + 4, 0, 5), "llava-onevision": (2, 0, 5)}[specimen.name]
    assert tuple(inputs.image_rows.count(row) for row in range(3)) == counts
    assert [len(tensor) for tensor in cache.values()] == [sum(counts)] * 2  # padding tiles are not run
    for row, example in enumerate(rows):
        of_image = [grid.image for grid in inputs.spans.grids[row]]
        assert sorted(set(of_image)) == list(range(len(example.images))) and of_image == sorted(of_image)


def test_generation_from_several_images_equals_plain_hugging_face(twins, rows):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows)
    theirs = plain.generate(**inputs.generate_kwargs(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(lvlm.generate(inputs, max_new_tokens=5).sequences, theirs)


@torch.no_grad()
def test_a_picture_so_long_that_its_crops_show_padding_alone(specimen, twins, picture):
    lvlm, plain = twins
    inputs = lvlm.prepare(Example("red", image=picture(0, (200, 10))))
    assert torch.equal(lvlm(inputs), plain(**inputs.model_kwargs()).logits)
    assert len(inputs.spans.grids[0]) == 1 and inputs.spans.image.sum() == 4


def test_onevision_pads_each_of_several_pictures_to_a_square(picture):
    lvlm = HookedLVLM.from_hf(*SPECIMENS[1].make())
    inputs = lvlm.prepare(Example("red", image=picture(0, (30, 20)), more_images=(picture(1, (20, 25)),)))
    wide, tall = inputs.spans.grids[0]
    assert (
        wide.positions() == [wide.start + i for i in range(4)] and tall.start == wide.stop + 1
    )  # a newline between them
    # 16 of 20 pixels of the square are seen; 5 pixels are padded above the wide picture, 2 left of the tall one
    assert (wide.left, wide.top, wide.width, wide.height) == pytest.approx((0, -5, 24, 24))
    assert (tall.left, tall.top, tall.width, tall.height) == pytest.approx((-2, 0, 20, 20))


def test_settings_that_are_not_the_models_are_refused(specimen, picture):
    lvlm = HookedLVLM.from_hf(*specimen.make())
    images, example = lvlm.processor.image_processor, Example("red", image=picture(0, (30, 20)))
    images.image_grid_pinpoints = list(reversed(images.image_grid_pinpoints))
    with pytest.raises(ValueError, match="image_grid_pinpoints"):
        lvlm.prepare(example)
    images.image_grid_pinpoints = lvlm.hf_model.config.image_grid_pinpoints
    images.size = {"height": 10, "width": 10}
    with pytest.raises(ValueError, match="pixels"):
        lvlm.prepare(example)


SIZES = [(640, 480), (333, 1000), (2000, 300), (336, 336), (5000, 4000), (50, 60), (3000, 40), (1153, 1151)]


@pytest.mark.parametrize("size", SIZES)
def test_token_counts_at_real_sizes_are_the_processors(size):
    width, height = size
    next_, onevision = _real()
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=next_.image_grid_pinpoints),
        patch_size=14,
        num_additional_image_tokens=0,
        _get_unpadded_features=lambda *args: LlavaNextProcessor._get_unpadded_features(None, *args),
    )
    expected = LlavaNextProcessor._get_number_of_features(processor, height, width, 336, 336)
    assert image_layout(next_, size).tokens == expected
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=onevision.image_grid_pinpoints),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    processor._get_unpadded_features = lambda *args: LlavaOnevisionProcessor._get_unpadded_features(processor, *args)
    expected = LlavaOnevisionProcessor._get_number_of_features(processor, height, width, 384, 384)
    layout = image_layout(onevision, size, 9)
    assert layout.tokens == expected
    last = max(tile.offset + (tile.rows - 1) * (tile.stride or tile.cols) + tile.cols for tile in layout.tiles)
    assert last in (expected, expected - 1)


def test_rectangles_at_real_sizes_by_hand():
    next_, onevision = _real()
    # 640 x 480 is resized to 672 x 504 for 2 x 2 crops of 24 x 24 tokens; 6 rows above and below are padding
    base, fine = image_layout(next_, (640, 480)).tiles
    assert base[:4] == (0, 24, 24, (0, 0, 640, 480)) and fine == (576, 36, 48, (0, 0, 640, 480), 49)
    # resized to 768 x 576 for 2 x 2 crops of 27 x 27 tokens that show 378 of 384 pixels; 7 of 54 rows are dropped at
    # each end, which leaves 2 pixels of the picture out above, and 6 + 2 below
    layout = image_layout(onevision, (640, 480), 9)
    assert layout.tokens == 729 + 40 * 55
    base, *fine = layout.tiles
    assert base.region == pytest.approx((0, 0, 640 * 378 / 384, 480 * 378 / 384))
    assert [(tile.offset, tile.rows, tile.cols, tile.stride) for tile in fine] == [
        (729, 20, 27, 55),
        (729 + 27, 20, 27, 55),
        (729 + 20 * 55, 20, 27, 55),
        (729 + 20 * 55 + 27, 20, 27, 55),
    ]
    assert fine[0].region == pytest.approx((0, 2 / 1.2, 378 / 1.2, 280 / 1.2))
    assert fine[3].region == pytest.approx((320, 240, 378 / 1.2, 280 / 1.2))


def _real():
    return LlavaNextConfig(), LlavaOnevisionConfig()
