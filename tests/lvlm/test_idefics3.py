"""Idefics3 and SmolVLM: tiles with markers, the whole picture after them, merged patches, rows filled up with empty tiles."""

import pytest
import torch
from PIL import ImageDraw
from zoo.idefics3 import make_idefics3, make_smolvlm

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM

MAKERS = {"idefics3": make_idefics3, "smolvlm": make_smolvlm}


@pytest.fixture(scope="module", params=MAKERS)
def lvlm(request):
    return HookedLVLM.from_hf(*MAKERS[request.param]())


@pytest.fixture(scope="module")
def idefics3():
    return HookedLVLM.from_hf(*make_idefics3())


@pytest.fixture(scope="module")
def smolvlm():
    return HookedLVLM.from_hf(*make_smolvlm())


SETTINGS = {
    "as it is": {},
    "longest edge of no whole tiles": {"size": {"longest_edge": 40}},
    "smaller than a tile": {"size": {"longest_edge": 12}},
    "squashed": {"size": {"height": 20, "width": 50}},
    "not resized": {"do_resize": False},
    "not split": {"do_image_splitting": False},
}


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MAKERS)
def test_tiles_are_those_that_the_processor_makes(picture, name, setting, backend):
    import transformers

    model, processor = MAKERS[name]()
    own = processor.image_processor
    cls = type(own) if backend == "torchvision" else getattr(transformers, f"{type(own).__name__}Pil")
    given = {"size": dict(own.size), "max_image_size": dict(own.max_image_size), **SETTINGS[setting]}
    processor.image_processor = cls(**given)
    lvlm = HookedLVLM.from_hf(model, processor)
    for size in [(32, 32), (56, 28), (28, 57), (40, 24), (24, 40), (7, 50), (3, 3)]:
        width, height = size
        made = processor.image_processor([[picture(0, size)]], return_row_col_info=True, return_tensors="pt")
        down, across = made["rows"][0][0] or 1, made["cols"][0][0] or 1
        grids = lvlm.prepare(Example("red", image=picture(0, size))).spans.grids[0]
        assert len(grids) == made["pixel_values"].shape[1] == (down * across + 1 if down * across > 1 else 1), size
        corners = [(x * width / across, y * height / down) for y in range(down) for x in range(across)]
        corners += [(0, 0)] * (len(grids) - len(corners))
        assert [xy for grid in grids for xy in (grid.left, grid.top)] == pytest.approx(
            [xy for c in corners for xy in c]
        )


def test_tokens_and_rectangles_by_hand(idefics3, picture):
    # 56 x 28 becomes 32 x 16, two tiles of 4 x 4 patches, 2 x 2 tokens: a token shows 14 x 14 pixels of a tile of 28 x 28.
    inputs = idefics3.prepare(Example("red", image=picture(0, (56, 28))))
    left, right, whole = inputs.spans.grids[0]
    assert [left.rectangle(p) for p in left.positions()] == [
        (0, 0, 14, 14), (14, 0, 28, 14), (0, 14, 14, 28), (14, 14, 28, 28),
    ]  # fmt: skip
    assert right.rectangle(right.start + 2) == (28, 14, 42, 28)
    assert [whole.rectangle(p) for p in whole.positions()][1:3] == [(28, 0, 56, 14), (0, 14, 28, 28)]
    tokens = idefics3.tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist())
    marks = [tokens[grid.start - 2 : grid.start] for grid in (left, right, whole)]
    around = "<fake_token_around_image>"
    assert marks == [[around, "<row_1_col_1>"], [around, "<row_1_col_2>"], [around, "<global-img>"]]
    assert tokens[whole.stop] == around
    assert inputs.spans.image[0].nonzero()[:, 0].tolist() == [
        p for grid in (left, right, whole) for p in grid.positions()
    ]


def _changes(lvlm, before, box, sites):
    """How much each entry of some activations changes when a box of the picture is painted over."""
    after = before.copy()
    ImageDraw.Draw(after).rectangle(box, fill=(255, 0, 0))
    inputs = [lvlm.prepare(Example("red", image=image)) for image in (before, after)]
    caches = [lvlm.run_with_cache(each, sites=sites)[1] for each in inputs]
    return inputs[0].spans.grids[0], [(caches[1][site] - caches[0][site]).norm(dim=-1) for site in sites]


SITES = ["vision.hook_embed", "projector.hook_in", "projector.hook_out", "blocks.0.hook_resid_pre"]


@torch.no_grad()
def test_paint_shows_in_its_tile_and_in_the_whole_picture(idefics3, picture):
    # Of the second of 2 x 2 tiles, patch 1, 2: the picture is not resized.
    grids, (embed, hook_in, out, stream) = _changes(idefics3, picture(1, (32, 32)), (24, 4, 27, 7), SITES)
    assert embed.shape == hook_in.shape == (5, 16) and out.shape == (5, 4)
    assert embed[1].nonzero()[:, 0].tolist() == [1 * 4 + 2] and embed[4].any() and not embed[[0, 2, 3]].any()
    assert hook_in[1].argmax() == 1 * 4 + 2
    tile, whole = grids[1], grids[4]
    assert set(stream[0].nonzero()[:, 0].tolist()) <= {*tile.positions(), *whole.positions()}
    assert tile.positions()[int(stream[0, tile.positions()].argmax())] == tile.position(25, 5)
    assert whole.positions()[int(stream[0, whole.positions()].argmax())] == whole.position(25, 5)
    assert torch.equal(stream[0, [p for grid in grids for p in grid.positions()]], out.flatten())


@torch.no_grad()
def test_patches_that_do_not_fill_a_tile_leave_its_edge_out(smolvlm, picture):
    # Tiles of 26 pixels have 6 x 6 patches of 4: a token shows 12 x 12, and nothing shows the last two rows and columns.
    before = picture(1, (52, 52))
    grids, (embed,) = _changes(smolvlm, before, (24, 26, 25, 51), SITES[:1])  # right edge of the third tile
    assert grids[2].rectangle(grids[2].start + 3) == pytest.approx((12, 38, 24, 50))
    assert not embed[:4].any()
    with pytest.raises(ValueError, match="does not see"):
        grids[2].position(25, 30)
    _, (embed,) = _changes(smolvlm, before, (20, 46, 23, 49), SITES[:1])  # its last patch
    assert embed[2].nonzero()[:, 0].tolist() == [35] and not embed[[0, 1, 3]].any() and embed[4].any()
    assert grids[4].rectangle(grids[4].start + 3) == pytest.approx((24, 24, 48, 48))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_several_images_and_rows_without_any(lvlm, picture, side):
    rows = [
        Example("how to make a blue"),
        Example("red", image=picture(0, (56, 28)), more_images=(picture(1, (32, 32)),)),
        Example("what is in the picture", image=picture(2, (28, 57))),
    ]
    inputs = lvlm.prepare(rows, padding_side=side)
    assert [[grid.image for grid in row] for row in inputs.spans.grids] == [[], [0] * 3 + [1] * 5, [0] * 3]
    assert inputs.image_rows == (1,) * 8 + (2,) * 3
    assert inputs.pixel_values.shape[:2] == inputs.extra["pixel_attention_mask"].shape[:2] == (2, 8)
    logits, cache = lvlm.run_with_cache(inputs, sites=["projector.hook_out", "blocks.0.hook_resid_pre"])
    stream = cache["blocks.0.hook_resid_pre"]
    at = [stream[row, grid.positions()] for row, grids in enumerate(inputs.spans.grids) for grid in grids]
    assert torch.equal(torch.stack(at), cache["projector.hook_out"])
    for row, example in enumerate(rows):
        alone = lvlm(lvlm.prepare(example))[0]
        torch.testing.assert_close(logits[row][~inputs.spans.padding[row]], alone, rtol=1e-3, atol=1e-3)
    part = inputs.rows([2, 0])  # its pixels still have empty tiles
    assert part.image_rows == (0,) * 3 and part.pixel_values.shape[:2] == (1, 8)
    keep = ~part.spans.padding
    torch.testing.assert_close(lvlm(part)[keep], logits[[2, 0]][keep], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MAKERS)
def test_rows_one_by_one_are_the_batch_that_the_processor_makes(picture, name, side):
    model, processor = MAKERS[name]()
    plain, _ = MAKERS[name]()
    lvlm = HookedLVLM.from_hf(model, processor)
    images = [[picture(0, (56, 28))], [], [picture(1, (32, 32)), picture(2, (28, 57))]]
    words = ["what is in the picture", "how to make a blue", "red"]
    rows = [
        Example(text, image=pictures[0] if pictures else None, more_images=tuple(pictures[1:]))
        for text, pictures in zip(words, images, strict=True)
    ]
    inputs = lvlm.prepare(rows, padding_side=side)
    turns = [
        [{"role": "user", "content": [*[{"type": "image"}] * len(pictures), {"type": "text", "text": text}]}]
        for text, pictures in zip(words, images, strict=True)
    ]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    theirs = processor(text=texts, images=images, padding=True, padding_side=side, return_tensors="pt")
    assert torch.equal(theirs["input_ids"], inputs.input_ids)
    assert torch.equal(theirs["attention_mask"], inputs.attention_mask)
    # Theirs has a row of empty tiles for the text, ours none; the model drops them.
    assert not theirs["pixel_values"][1].any()
    assert torch.equal(theirs["pixel_values"][[0, 2]], inputs.pixel_values)
    assert torch.equal(theirs["pixel_attention_mask"][[0, 2]], inputs.extra["pixel_attention_mask"])
    logits = plain(**theirs, position_ids=inputs.position_ids).logits
    assert torch.equal(lvlm(inputs), logits)


@torch.no_grad()
def test_generation_with_several_images_equals_hugging_face(lvlm, picture):
    model, _ = MAKERS[lvlm.family.name]()
    rows = [
        Example("how to make a blue"),
        Example("red", image=picture(0, (56, 28)), more_images=(picture(1, (32, 32)),)),
    ]
    inputs = lvlm.prepare(rows)
    for options in ({}, {"num_beams": 2}):
        ours = lvlm.generate(inputs, max_new_tokens=5, **options).sequences
        theirs = model.generate(
            **inputs.generate_kwargs(), max_new_tokens=5, do_sample=False, pad_token_id=0, **options
        )
        assert torch.equal(ours, theirs)


def test_the_projector_reads_patches_and_writes_merged_ones(smolvlm):
    assert smolvlm.width("projector.hook_in") == 24 and smolvlm.width("projector.hook_out") == 32
    assert "scale_factor" in smolvlm.site_info("projector.hook_in").note
