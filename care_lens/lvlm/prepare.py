"""From examples to a batch: chat template, image placeholders, teacher-forced responses, padding, spans.

Each prompt is put through the processor's chat template as one user turn, image first, and tokenised by the
processor. A response is tokenised on its own and its ids are appended, followed by the end-of-sequence id, so
that the prompt's tokens are the same with and without it and the response mask is exact. Which positions are
image tokens is read off the ids.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.spans import PatchGrid, TokenSpans
from care_lens.lvlm.families import Family
from care_lens.lvlm.inputs import LVLMInputs


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
        responses: Whether to append each example's response, teacher-forced, and an end-of-sequence token.
        padding_side: "left" or "right".

    Returns:
        The batch, on the CPU.

    Raises:
        ValueError: If there are no examples, placeholders and images do not match, or a response is missing.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
    texts = [format_prompt(processor, example) for example in examples]
    for i, (text, example) in enumerate(zip(texts, examples, strict=True)):
        _check_placeholders(text.count(processor.image_token), 0 if example.image is None else 1, i, processor)
    prompts, pixels, extra = _encode(processor, texts, examples, family)
    answers = [
        _response_ids(processor.tokenizer, example, i) if responses else [] for i, example in enumerate(examples)
    ]
    grid = (0, 0) if pixels is None else family.patch_grid(config, *pixels.shape[-2:])
    per_image = family.image_tokens(config, *grid)
    for i, (ids, example) in enumerate(zip(prompts, examples, strict=True)):
        expected = 0 if example.image is None else per_image
        if (found := ids.count(config.image_token_id)) != expected:
            raise ValueError(
                f"example {i} must have {expected} image tokens, got {found}; the processor's patch_size, "
                "num_additional_image_tokens and vision_feature_select_strategy must be those of the model"
            )
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    width, n = max(lengths), len(examples)
    pad = processor.tokenizer.pad_token_id
    input_ids = torch.full((n, width), processor.tokenizer.eos_token_id or 0 if pad is None else pad)
    attention_mask = torch.zeros((n, width), dtype=torch.long)
    response = torch.zeros((n, width), dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = width - lengths[i] if padding_side == "left" else 0
        input_ids[i, start : start + lengths[i]] = torch.tensor(prompt + answer)
        attention_mask[i, start : start + lengths[i]] = 1
        response[i, start + len(prompt) : start + lengths[i]] = True
    image = (input_ids == config.image_token_id) & (attention_mask == 1)
    grids = [_grids(example, image[i], grid, per_image, family, processor) for i, example in enumerate(examples)]
    spans = TokenSpans.from_masks(image=image, padding=attention_mask == 0, response=response, grids=grids)
    return LVLMInputs(input_ids, attention_mask, pixels, spans, extra)


def format_prompt(processor: Any, example: Example) -> str:
    """The example's prompt in the processor's chat template: one user turn, image first.

    Raises:
        ValueError: If the processor has no chat template.
    """
    if not processor.chat_template:
        raise ValueError("processor must have a chat template, got none; set processor.chat_template")
    content = [{"type": "text", "text": example.prompt}]
    if example.image is not None:
        content.insert(0, {"type": "image"})
    turns = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _check_placeholders(found: int, images: int, row: int, processor: Any) -> None:
    if found == images:
        return
    token = processor.image_token
    if images == 0:
        raise ValueError(
            f"example {row} has {found} image placeholders ({token}) and no image; give it an image, or take "
            f"{token} out of its prompt"
        )
    if found == 0:
        raise ValueError(
            f"example {row} has an image and no placeholder for it; the processor's chat template must write "
            f"{token} for an image"
        )
    raise ValueError(
        f"example {row} has {found} image placeholders ({token}) and {images} image; the chat template adds "
        f"the placeholder, so take {token} out of its prompt"
    )


def _encode(
    processor: Any, texts: list[str], examples: Sequence[Example], family: Family
) -> tuple[list[list[int]], Tensor | None, dict[str, Tensor]]:
    bos = processor.tokenizer.bos_token
    kwargs: dict[str, Any] = {
        "text": texts,
        "add_special_tokens": bos is None or not texts[0].startswith(bos),
    }
    images = [example.image for example in examples if example.image is not None]
    if images:
        kwargs["images"] = images
    encoded = processor(**kwargs, padding=False)
    if not images:
        return encoded["input_ids"], None, {}
    pixels = torch.stack([torch.as_tensor(pixel) for pixel in encoded["pixel_values"]])
    extra = {name: torch.as_tensor(encoded[name]) for name in family.extra_inputs}
    return encoded["input_ids"], pixels, extra


def _response_ids(tokenizer: Any, example: Example, row: int) -> list[int]:
    if example.response is None:
        raise ValueError(f"example {row} must have a response, got None; give it one, or leave responses=False")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer must have an end-of-sequence token to end responses with; set tokenizer.eos_token")
    return [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _grids(
    example: Example, image: Tensor, grid: tuple[int, int], per_image: int, family: Family, processor: Any
) -> list[PatchGrid]:
    if example.image is None:
        return []
    rows, cols = grid
    start = int(image.int().argmax()) + per_image - rows * cols
    region = family.picture_region(processor.image_processor, *example.image.size)
    return [PatchGrid(start, rows, cols, region.width, region.height, region.left, region.top)]
