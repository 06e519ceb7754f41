"""A batch that is ready for a model: tokens, pixels and what each position is."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from care_lens.core.spans import TokenSpans


@dataclass(frozen=True)
class LVLMInputs:
    """A batch made by ``HookedLVLM.prepare``.

    To give the model other pixels, use ``dataclasses.replace(inputs, pixel_values=...)``.

    Attributes:
        input_ids: [batch, pos] token ids, image placeholders expanded.
        attention_mask: [batch, pos] 1 for tokens, 0 for padding.
        pixel_values: [image, channel, height, width] of the rows that have an image, in order of row; None if
            none has.
        spans: What each position is.
        extra: Other tensors the model takes, one entry an image.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    pixel_values: Float[Tensor, "image channel height width"] | None
    spans: TokenSpans
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    @property
    def image_rows(self) -> tuple[int, ...]:
        """The row of each image, i.e. of each entry of ``pixel_values`` and of vision activations."""
        return tuple(row for row, grids in enumerate(self.spans.grids) for _ in grids)

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """[batch, pos] positions counted without the padding, as ``generate`` counts them."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def model_kwargs(self) -> dict[str, Tensor]:
        """The keyword arguments of the Hugging Face model's forward."""
        return {**self.generate_kwargs(), "position_ids": self.position_ids}

    def generate_kwargs(self) -> dict[str, Tensor]:
        """The keyword arguments of the Hugging Face model's generate, which counts positions itself."""
        kwargs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, **self.extra}
        return kwargs if self.pixel_values is None else {**kwargs, "pixel_values": self.pixel_values}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LVLMInputs":
        """The same batch on another device, with its pixels in another dtype if one is given."""
        pixels = None if self.pixel_values is None else self.pixel_values.to(device, dtype)
        return LVLMInputs(
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            pixel_values=pixels,
            spans=self.spans.to(device),
            extra={name: tensor.to(device) for name, tensor in self.extra.items()},
        )

    def rows(self, index: Sequence[int]) -> "LVLMInputs":
        """The rows ``index`` as a batch of their own, in that order, with their images; padding stays."""
        rows = list(index)
        images = [image for row in rows for image, owner in enumerate(self.image_rows) if owner == row]
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            pixel_values=self.pixel_values[images] if self.pixel_values is not None and images else None,
            spans=self.spans.rows(rows),
            extra={name: tensor[images] for name, tensor in self.extra.items()} if images else {},
        )

    def fingerprint(self) -> str:
        """A digest of tokens, mask and pixels: two batches with the same one are the same batch."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.generate_kwargs().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Generation:
    """What a model answered.

    Attributes:
        sequences: [batch, pos + new] prompt and answer.
        new_tokens: [batch, new] the answer, padded on the right after its end.
        texts: The answers as text, without special tokens.
    """

    sequences: Int[Tensor, "batch total"]
    new_tokens: Int[Tensor, "batch new"]
    texts: list[str]


def require_inputs(inputs: Any) -> LVLMInputs:
    """The inputs, if they are a prepared batch.

    Raises:
        TypeError: If they are anything else, such as a tensor of tokens whose image placeholders have no
            pixels.
    """
    if not isinstance(inputs, LVLMInputs):
        raise TypeError(f"inputs must be LVLMInputs, got {type(inputs).__name__}; make them with HookedLVLM.prepare")
    return inputs
