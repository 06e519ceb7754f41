"""Batches: tokens, spans, grids, refusals."""

from dataclasses import replace

import pytest
import torch

from care_lens.core import Example, TokenSpans
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.lvlm.inputs import require_inputs
from care_lens.lvlm.prepare import prepare_batch


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("responses", [False, True])
def test_spans_are_exact(lvlm, examples, side, responses):
    inputs = lvlm.prepare(examples, responses=responses, padding_side=side)
    spans, tokenizer = inputs.spans, lvlm.tokenizer
    for row, example in enumerate(examples):
        ids = inputs.input_ids[row]
        prompt = f"user {'<image> ' * 4 if example.image else ''}{example.prompt} assistant"
        assert tokenizer.convert_ids_to_tokens(ids[spans.prompt[row]]) == prompt.split()
        answer = tokenizer.convert_ids_to_tokens(ids[spans.response[row]])
        assert answer == ([*example.response.split(), "</s>"] if responses else [])
        assert spans.image[row].sum() == (4 if example.image else 0)
        assert ids[spans.last[row]].tolist() == [tokenizer.convert_tokens_to_ids("assistant")]
        assert torch.equal(spans.padding[row], inputs.attention_mask[row] == 0)
        assert bool(spans.padding[row, 0 if side == "left" else -1]) == (
            len(ids[~spans.padding[row]]) < inputs.input_ids.shape[1]
        )
    assert inputs.image_rows == (0, 2) and inputs.pixel_values.shape[0] == 2


def test_the_prompt_is_the_same_with_and_without_a_response(lvlm, examples):
    without, with_ = lvlm.prepare(examples), lvlm.prepare(examples, responses=True)
    for row in range(3):
        assert torch.equal(
            without.input_ids[row][without.spans.prompt[row]], with_.input_ids[row][with_.spans.prompt[row]]
        )


def test_grids_map_positions_to_the_picture_and_back(lvlm, picture):
    inputs = lvlm.prepare([Example("red", image=picture(0, (32, 16))), Example("what is in the picture")])
    (grid,), none = inputs.spans.grids
    assert none == ()
    positions = inputs.spans.image[0].nonzero().flatten().tolist()
    assert positions == list(range(grid.start, grid.stop))
    assert [grid.rectangle(p) for p in positions] == [
        (8.0, 0.0, 16.0, 8.0),
        (16.0, 0.0, 24.0, 8.0),
        (8.0, 8.0, 16.0, 16.0),
        (16.0, 8.0, 24.0, 16.0),
    ]
    for position in positions:
        x0, y0, x1, y1 = grid.rectangle(position)
        assert grid.position((x0 + x1) / 2, (y0 + y1) / 2) == position
    with pytest.raises(ValueError, match="does not see"):
        grid.position(2, 2)


def test_a_patch_of_the_picture_is_the_token_the_grid_says(lvlm, picture):
    image = picture(0)
    inputs = lvlm.prepare(Example("red", image=image))
    grid = inputs.spans.grids[0][0]
    changed = image.copy()
    changed.paste((0, 0, 0), (8, 0, 16, 8))
    difference = (lvlm.prepare(Example("red", image=changed)).pixel_values - inputs.pixel_values).abs().sum(1)[0]
    rows, cols = difference.nonzero(as_tuple=True)
    assert {grid.position(x + 0.5, y + 0.5) for x, y in zip(cols.tolist(), rows.tolist(), strict=True)} == {
        grid.start + 1
    }


BOUNDARIES = {
    "qwen": "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>",
    "gemma3": "<start_of_image> <end_of_image> <image_soft_token>",
    "glm4v": "<|begin_of_image|> <|end_of_image|> <|begin_of_video|> <|end_of_video|>",
    "internvl": "<img> </img> <IMG_CONTEXT> <video>",
    "idefics3": "<fake_token_around_image> <global-img> <row_1_col_2>",
    "llama4": "<|image_start|> <|image_end|> <|patch|> <|tile_x_separator|> <|tile_y_separator|>",
    "mistral3": "[IMG] [IMG_BREAK] [IMG_END]",
}
"""Tokens that enclose pictures or stand for parts of them, as the families' own tokenizers name them."""


@pytest.mark.parametrize("family", BOUNDARIES)
def test_a_boundary_of_pictures_that_a_user_types_is_refused(llava_maker, picture, family):
    tokens = BOUNDARIES[family].split()
    with HookedLVLM.from_hf(*llava_maker("clip")) as own:
        fine = Example(f"what is {tokens[0]}")
        with_words = own.prepare(fine).input_ids.shape  # words to this tokenizer, which does not know them
        assert with_words == own.prepare(fine).input_ids.shape
        own.tokenizer.add_tokens(tokens, special_tokens=True)
        for token in tokens:
            for example in (
                Example(f"what is {token}"),
                Example(f"x{token}y", image=picture(0)),
                Example("red", response=token),
                Example("red", prefill=token),
            ):
                with pytest.raises(ValueError, match="must hold no image placeholder in its") as raised:
                    own.prepare(example, responses=example.response is not None)
                assert repr(token) in str(raised.value)
        own.tokenizer.add_tokens(["<|im_start|>", "<|user|>", "<boiling>", "red_image"], special_tokens=True)
        own.prepare(Example("<|im_start|> <|user|> <boiling> red_image"))


def test_placeholders_and_pictures_must_match(lvlm, picture):
    with pytest.raises(
        ValueError, match=r"example 1 must hold no image placeholder in its prompt, got '<image>'.* has 0 images"
    ):
        lvlm.prepare([Example("red"), Example("what is in <image>")])
    with pytest.raises(
        ValueError, match=r"no image placeholder in its prompt, .* has 1 image\); the chat template adds"
    ):
        lvlm.prepare(Example("what is in <image>", image=picture(0)))
    template = lvlm.processor.chat_template
    try:
        lvlm.processor.chat_template = template.replace("<image> ", "")
        with pytest.raises(ValueError, match="has an image and no placeholder"):
            lvlm.prepare(Example("red", image=picture(0)))
        lvlm.processor.chat_template = None
        with pytest.raises(ValueError, match="chat template, got none"):
            lvlm.prepare(Example("red"))
    finally:
        lvlm.processor.chat_template = template
    extra = lvlm.processor.num_additional_image_tokens
    try:
        lvlm.processor.num_additional_image_tokens = extra + 1
        with pytest.raises(ValueError, match="example 0 must have 4 image tokens, got 5"):
            lvlm.prepare(Example("red", image=picture(0)))
    finally:
        lvlm.processor.num_additional_image_tokens = extra


def test_other_refusals(lvlm, examples):
    with pytest.raises(ValueError, match="example 0 must have a response"):
        lvlm.prepare(Example("red"), responses=True)
    with pytest.raises(ValueError, match="at least one example"):
        lvlm.prepare([])
    with pytest.raises(TypeError, match="must be LVLMInputs, got Tensor"):
        require_inputs(torch.zeros(1, 4).long())
    with pytest.raises(ValueError, match="padding_side must be"):
        prepare_batch(
            examples,
            processor=lvlm.processor,
            config=lvlm.hf_model.config,
            family=lvlm.family,
            responses=False,
            padding_side="both",
        )


def test_rows_are_batches_of_their_own(lvlm, examples):
    inputs = lvlm.prepare(examples, responses=True)
    with torch.no_grad():
        logits = lvlm(inputs)
        for index in ([2, 0], [1], [2, 1], [0, 0]):
            part = inputs.rows(index)
            assert isinstance(part, LVLMInputs) and part.batch_size == len(index)
            torch.testing.assert_close(lvlm(part), logits[index], rtol=1e-3, atol=1e-4)
    assert inputs.rows([1]).pixel_values is None
    assert torch.equal(inputs.rows([2, 0]).pixel_values, inputs.pixel_values[[1, 0]])


def test_fingerprints_tell_batches_apart(lvlm, examples):
    inputs = lvlm.prepare(examples)
    assert inputs.fingerprint() == lvlm.prepare(examples).fingerprint()
    others = [
        inputs.rows([0, 1]),
        replace(inputs, pixel_values=inputs.pixel_values + 1e-6),
        replace(inputs, input_ids=inputs.input_ids.flip(0)),
        lvlm.prepare(examples[1]),
    ]
    assert len({batch.fingerprint() for batch in [inputs, *others]}) == 5


def test_to_changes_the_dtype_of_pixels_only(lvlm, examples):
    inputs = lvlm.prepare(examples).to("cpu", torch.bfloat16)
    assert inputs.pixel_values.dtype == torch.bfloat16 and inputs.input_ids.dtype == torch.long
    assert isinstance(inputs.spans, TokenSpans)


def test_beginning_of_sequence_is_neither_lost_nor_doubled(lvlm, examples):
    template = lvlm.processor.chat_template
    try:
        lvlm.processor.chat_template = "<s>" + template
        inputs = lvlm.prepare(examples)
        assert ((inputs.input_ids == 1).sum(1) == 1).all()
    finally:
        lvlm.processor.chat_template = template


def test_an_image_placeholder_in_a_response_is_refused(lvlm, examples):
    example = replace(examples[0], response="sure <image>")
    with pytest.raises(ValueError, match=r"example 0 \(id 'a'\) must hold no image placeholder in its response"):
        lvlm.prepare(example, responses=True)


def test_fingerprints_tell_responses_and_owners_of_images_apart(lvlm, examples):
    inputs = lvlm.prepare(examples, responses=True)
    prompt = replace(inputs.spans, response=~inputs.spans.padding & ~inputs.spans.prompt)
    assert (
        inputs.fingerprint()
        == replace(inputs, spans=prompt).fingerprint()
        == lvlm.prepare(examples, responses=True).fingerprint()
    )
    none = torch.zeros_like(inputs.spans.response)
    moved = replace(inputs.spans, response=none, prompt=~inputs.spans.padding)
    assert replace(inputs, spans=moved).fingerprint() != inputs.fingerprint()
    assert replace(inputs, entries=(1, 1, 0)).fingerprint() != inputs.fingerprint()
