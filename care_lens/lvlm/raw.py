"""A batch that was not prepared here: what each position is, from the keyword arguments of the Hugging Face model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_lens.core.spans import TokenSpans
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.families import Family
from care_lens.lvlm.inputs import LVLMInputs
from care_lens.lvlm.marker import Marker, begun_answers


@dataclass(frozen=True)
class RawInputs(LVLMInputs):
    """Tokens, masks and spans of a batch that the processor made; how its pictures were cut is not known."""

    def _entries(self) -> tuple[int, ...]:
        raise HookError(
            "inputs must be prepared to say which picture or tile is whose: these came to the Hugging Face model straight from a "
            "processor; make them with lvlm.prepare(examples) and run them with lvlm"
        )


def raw_inputs(
    given: Mapping[str, Any],
    *,
    config: Any,
    family: Family,
    marker: Marker | None = None,
    generating: bool = False,
    copies: int = 1,
) -> RawInputs:
    """The batch that a call of the Hugging Face model is about.

    The response is what ``labels`` mark at the end of a row (-100 before it, as in training); without labels, or with such as mark all
    of a row or nothing of it, what stands behind the last marker with which the chat template ends a request: an answer that was begun.
    Everything else that is not padding is prompt.

    Args:
        given: The call's keyword arguments.
        config: The model's config.
        family: The model's family.
        marker: What :func:`~care_lens.lvlm.marker.answer_marker` gives; None: answers are told by labels alone.
        generating: Whether the model goes on with the rows, so that an answer in them is its given beginning (a prefill).
        copies: How many times each row stands in the batch, one after the other.

    Raises:
        HookError: If the positions cannot be told apart: no token ids, embeddings in their place, a mask of another shape, or videos.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or given.get("inputs_embeds") is not None:
        raise HookError(
            "a repair is on, which must know what each position is: the call must have input_ids [batch, pos] and no inputs_embeds; "
            "give the processor's outputs as they are"
        )
    if given.get("pixel_values_videos") is not None:
        raise HookError(
            "a repair is on, and videos are not known to it; give pictures (pixel_values), or take the repair off"
        )
    if given.get("pixel_values") is None and bool((ids == config.image_token_id).any()):
        raise HookError(
            "a repair is on, and the batch has places of pictures without the pictures, which the model would read as words; give "
            "pixel_values too, as the processor makes them"
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise HookError(
            f"a repair is on, which must know what is padding: attention_mask must be of input_ids' shape {tuple(ids.shape)}, "
            f"got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}; give the processor's mask"
        )
    real = mask.to(ids.device) != 0
    response = torch.zeros_like(real)
    labels = given.get("labels")
    if isinstance(labels, Tensor) and labels.shape == ids.shape:
        told = (labels.to(ids.device) != -100) & real
        # From the first labelled position to the row's end; a row that is labelled from its start has no prompt to tell apart.
        answered = (told.cumsum(1) > 0) & real
        response = answered & (answered != real).any(1, keepdim=True)
    # Labels of whole rows, as for a perplexity, tell no answer apart.
    begun = begun_answers(ids, real, marker or Marker(), never=(config.image_token_id,))
    response = torch.where(response.any(1, keepdim=True), response, begun)
    names = [name for name in family.extra_inputs if isinstance(given.get(name), Tensor)]
    batch = RawInputs(
        ids,
        real.long(),
        given.get("pixel_values"),
        TokenSpans.from_masks(
            image=(ids == config.image_token_id) & real,
            padding=~real,
            response=response,
            grids=[()] * len(ids),
            prefill=response if generating else None,
        ),
        extra={name: given[name] for name in names},
        own_positions=family.own_positions,
        first_position=family.first_position,
    )
    return batch if copies == 1 else _repeated(batch, copies)


def _repeated(batch: RawInputs, copies: int) -> RawInputs:
    index = [row for row in range(batch.batch_size) for _ in range(copies)]
    return RawInputs(
        batch.input_ids[index],
        batch.attention_mask[index],
        batch.pixel_values,
        batch.spans.rows(index),
        extra=batch.extra,
        own_positions=batch.own_positions,
        first_position=batch.first_position,
    )


def inferred_mask(ids: Tensor, in_force: Mapping[str, Any]) -> Tensor:
    """The mask that Hugging Face's ``generate`` makes where it is given none: padding where the padding token is, unless that ends
    a text too."""
    pad, ends = in_force.get("pad_token_id"), in_force.get("eos_token_id")
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return torch.ones_like(ids)
    return (ids != pad).long()
