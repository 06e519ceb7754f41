"""From examples to a batch: chat template, image placeholders, answers that are begun or teacher-forced, padding, spans.

Each conversation is put through the processor's chat template and tokenised by the processor. The beginning of an answer
(``prefill``) is tokenised on its own and its ids are appended, then those of a response, followed by the end-of-sequence id, so
that the prompt's tokens are the same with and without them and the masks are exact. Which positions are image tokens is read
off the ids.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from care_lens.core.conversation import ExampleError
from care_lens.core.examples import Example
from care_lens.core.spans import PatchGrid, TokenSpans
from care_lens.lvlm.chat import format_prompt, require_no_markers
from care_lens.lvlm.families import Family, ImageLayout, Pictured
from care_lens.lvlm.inputs import LVLMInputs
from care_lens.lvlm.unknown import warn_of_unknown

Encoded = TypeVar("Encoded")


class _Row(NamedTuple):
    """One example as the processor sees it: prompt ids, tensors about its images, and about its tokens."""

    ids: list[int]
    images: dict[str, Tensor]
    tokens: dict[str, list[int]]


def prepare_batch(
    examples: Sequence[Example],
    *,
    processor: Any,
    config: Any,
    family: Family,
    responses: bool,
    padding_side: str,
) -> LVLMInputs:
    """Make a batch of examples, with and without images.

    Args:
        examples: The examples.
        processor: The model's processor.
        config: The model's config.
        family: The model's family.
        responses: Whether to append each example's response, teacher-forced, and an end-of-sequence token. A prefill is
            appended in any case.
        padding_side: "left" or "right".

    Returns:
        The batch, on the CPU.

    Raises:
        ExampleError: Naming the row and the id, if placeholders and images do not match, a response is missing, or the processor
            cannot take a text or a picture. It is a ValueError.
        ValueError: If there are no examples.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    placeholder, texts = family.image_text(processor), []
    for i, example in enumerate(examples):
        require_no_markers(processor, example, family, _named(i, example))
        texts.append(format_prompt(processor, example, family))
        _check_placeholders(texts[-1].count(placeholder), len(example.images), _named(i, example), placeholder)
    rows = _encode(processor, texts, examples, family)
    begun = [_prefill_ids(processor.tokenizer, example, _named(i, example)) for i, example in enumerate(examples)]
    answers = [
        ids + (_response_ids(processor.tokenizer, example, _named(i, example)) if responses else [])
        for i, (ids, example) in enumerate(zip(begun, examples, strict=True))
    ]
    warn_of_unknown(
        processor.tokenizer, [[*r.ids, *a] for r, a in zip(rows, answers, strict=True)], examples, responses=responses
    )
    abouts = [
        Pictured(config, processor, [image.size for image in example.images], row.images)
        for row, example in zip(rows, examples, strict=True)
    ]
    layouts = [list(family.layout(about)) if about.sizes else [] for about in abouts]
    for i, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
        expected = sum(image.tokens for image in layout)
        if (found := row.ids.count(config.image_token_id)) != expected:
            raise ExampleError(
                f"{_named(i, examples[i])} must have {expected} image tokens, got {found}; the processor's settings (patch_size, "
                "num_additional_image_tokens, vision_feature_select_strategy, ...) must be those of the model"
            )
    lengths = [len(row.ids) + len(answer) for row, answer in zip(rows, answers, strict=True)]
    width, n = max(lengths), len(examples)
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.full((n, width), processor.tokenizer.eos_token_id or 0 if pad is None else pad)
    attention_mask = torch.zeros((n, width), dtype=torch.long)
    response, prefill = torch.zeros((n, width), dtype=torch.bool), torch.zeros((n, width), dtype=torch.bool)
    token_inputs = {name: torch.zeros((n, width), dtype=torch.long) for name in family.token_inputs}
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        start = width - lengths[i] if padding_side == "left" else 0
        here = slice(start, start + lengths[i])
        input_ids[i, here] = torch.tensor(row.ids + answer)
        attention_mask[i, here] = 1
        response[i, start + len(row.ids) : start + lengths[i]] = True
        prefill[i, start + len(row.ids) : start + len(row.ids) + len(begun[i])] = True
        for name, value in family.token_inputs.items():
            token_inputs[name][i, here] = torch.tensor(row.tokens[name] + [value] * len(answer))
    image = (input_ids == config.image_token_id) & (attention_mask == 1)
    grids = [_grids(layout, image[i].nonzero()[:, 0].tolist()) for i, layout in enumerate(layouts)]
    spans = TokenSpans.from_masks(
        image=image, padding=attention_mask == 0, response=response, grids=grids, prefill=prefill
    )
    entries = tuple(family.entries(about) if about.sizes else 0 for about in abouts)
    return LVLMInputs(
        input_ids, attention_mask, spans=spans, token_inputs=token_inputs, entries=entries,
        own_positions=family.own_positions, first_position=family.first_position, examples=tuple(examples), **_collate(rows, family),
    )  # fmt: skip


def _collate(rows: Sequence[_Row], family: Family) -> dict[str, Any]:
    """Pixels and what else is about images, rows after one another; smaller ones are padded with zeros at their end."""
    names = [name for name in ("pixel_values", *family.extra_inputs) if any(name in row.images for row in rows)]
    made: dict[str, Tensor] = {}
    for name in names:
        parts = [row.images[name] for row in rows if name in row.images]
        size = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
        made[name] = torch.cat([_padded(part, size) for part in parts])
    counts = {name: tuple(len(row.images[name]) if name in row.images else 0 for row in rows) for name in names}
    return {"pixel_values": made.pop("pixel_values", None), "extra": made, "counts": counts}


def _padded(tensor: Tensor, size: Sequence[int]) -> Tensor:
    if list(tensor.shape[1:]) == list(size):
        return tensor
    out = tensor.new_zeros(len(tensor), *size)
    out[(slice(None), *(slice(n) for n in tensor.shape[1:]))] = tensor
    return out


def _named(row: int, example: Example) -> str:
    """What to call an example in a message."""
    return f"example {row}" + (f" (id {example.id!r})" if example.id else "")


def _check_placeholders(found: int, images: int, row: str, token: str) -> None:
    if found == images:
        return
    if found == 0:
        raise ExampleError(
            f"{row} has an image and no placeholder for it; the processor's chat template must write {token} for an image"
        )
    raise ExampleError(
        f"{row} has {found} image placeholders ({token}) and {images} image; the processor's chat template must write {token} once "
        "for each"
    )


def _encode(processor: Any, texts: list[str], examples: Sequence[Example], family: Family) -> list[_Row]:
    bos = processor.tokenizer.bos_token
    special = [bos is None or not text.startswith(bos) for text in texts]
    if family.batched and all(len(example.images) <= 1 for example in examples):
        try:
            return _encode_together(processor, texts, examples, special[0])
        except Exception:
            # Which of them it was is found by giving them one by one; if none is refused alone, the batch's own error stands.
            for i, (text, example, add) in enumerate(zip(texts, examples, special, strict=True)):
                _say_which(
                    i, example, lambda text=text, row=example, add=add: _encode_together(processor, [text], [row], add)
                )
            raise
    return [
        _say_which(i, example, lambda text=text, row=example, add=add: _encode_one(processor, text, row, family, add))
        for i, (text, example, add) in enumerate(zip(texts, examples, special, strict=True))
    ]


def _say_which(index: int, example: Example, encode: Callable[[], Encoded]) -> Encoded:
    try:
        return encode()
    except Exception as error:
        sizes = [f"{image.width} x {image.height}" for image in example.images]
        about = f" (pictures of {', '.join(sizes)} pixels)" if sizes else ""
        raise ExampleError(
            f"{_named(index, example)} must be one that the model's processor takes, got {type(error).__name__}: {error}{about}"
        ) from error


def _encode_one(processor: Any, text: str, example: Example, family: Family, special: bool) -> _Row:
    kwargs: dict[str, Any] = {"text": [text], "add_special_tokens": special, "return_tensors": "pt"}
    if example.images:
        kwargs["images"] = [list(example.images)] if family.nested_images else list(example.images)
    alone = family.needs_images and not example.images
    encoded = processor.tokenizer(**kwargs) if alone else processor(**kwargs)
    ids = encoded["input_ids"][0].tolist()
    tokens = {name: encoded[name][0].tolist() if name in encoded else [0] * len(ids) for name in family.token_inputs}
    return _Row(ids, _image_tensors(encoded, family) if example.images else {}, tokens)


def _image_tensors(encoded: Mapping[str, Any], family: Family) -> dict[str, Tensor]:
    names = [name for name in ("pixel_values", *family.extra_inputs) if name in encoded]
    return {name: torch.as_tensor(encoded[name]) for name in names}


def _encode_together(processor: Any, texts: list[str], examples: Sequence[Example], special: bool) -> list[_Row]:
    """One call of the processor for all rows; each picture is one tensor of the same size."""
    images = [image for example in examples for image in example.images]
    kwargs: dict[str, Any] = {"images": images} if images else {}
    encoded = processor(text=texts, add_special_tokens=special, padding=False, **kwargs)
    pixels = iter([torch.as_tensor(pixel) for pixel in encoded["pixel_values"]] if images else [])
    return [
        _Row(ids, {"pixel_values": next(pixels)[None]} if example.images else {}, {})
        for ids, example in zip(encoded["input_ids"], examples, strict=True)
    ]


def _response_ids(tokenizer: Any, example: Example, row: str) -> list[int]:
    if example.response is None:
        raise ExampleError(f"{row} must have a response, got None; give it one, or leave responses=False")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token to end responses with; set tokenizer.eos_token")
    return [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _prefill_ids(tokenizer: Any, example: Example, row: str) -> list[int]:
    if not example.prefill:
        return []
    ids = tokenizer(example.prefill, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id in ids:
        raise ExampleError(f"{row} must have a prefill that the model can go on from, got the end of an answer in it")
    return list(ids)


def _grids(layout: Sequence[ImageLayout], positions: Sequence[int]) -> list[PatchGrid]:
    """Patch grids of a row, from the layout of its images and the positions of their tokens."""
    grids, first = [], 0
    for index, image in enumerate(layout):
        for tile in image.tiles:
            left, top, width, height = tile.region
            start = positions[first + tile.offset]
            grids.append(PatchGrid(start, tile.rows, tile.cols, width, height, left, top, tile.stride, index))
        first += image.tokens
    return grids
