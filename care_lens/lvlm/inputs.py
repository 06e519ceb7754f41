"""A batch that is ready for a model: tokens, pixels and what each position is."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from care_lens.core.display import ShortRepr, as_html, as_text
from care_lens.core.examples import Example
from care_lens.core.spans import TokenSpans
from care_lens.lvlm.display import shown_inputs


@dataclass(frozen=True)
class LVLMInputs:
    """A batch made by ``HookedLVLM.prepare``.

    To give the model other pixels, use ``dataclasses.replace(inputs, pixel_values=...)``.

    Attributes:
        input_ids: [batch, pos] token ids, image placeholders expanded.
        attention_mask: [batch, pos] 1 for tokens, 0 for padding.
        pixel_values: The pictures as the model takes them, in order of row; in most families
            [image, channel, height, width]. None if no row has one.
        spans: What each position is.
        extra: Other tensors about the images that the model takes.
        token_inputs: Other tensors [batch, pos] about the tokens that the model takes.
        entries: For each row, the entries (images or tiles) that it has in vision activations; None: one a patch grid.
        counts: For ``pixel_values`` and each extra tensor, how long each row's part of its first axis is; None: ``entries``.
        own_positions: Whether the model counts positions itself (rotary embeddings in several dimensions).
        first_position: Position of a row's first token, where it does not.
        examples: What the rows were prepared from, for defences that ask the model something more about a request; empty if not known.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    pixel_values: Float[Tensor, "image ..."] | None
    spans: TokenSpans
    extra: dict[str, Tensor] = field(default_factory=dict)
    token_inputs: dict[str, Tensor] = field(default_factory=dict)
    entries: tuple[int, ...] | None = None
    counts: dict[str, tuple[int, ...]] | None = None
    own_positions: bool = False
    first_position: int = 0
    examples: tuple[Example, ...] = ()

    def __repr__(self) -> str:
        return as_text(*shown_inputs(self))

    def _repr_html_(self) -> str:
        return as_html(*shown_inputs(self))

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    @property
    def image_rows(self) -> tuple[int, ...]:
        """The row of each entry (image or tile) of vision activations."""
        return tuple(row for row, n in enumerate(self._entries()) for _ in range(n))

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """[batch, pos] positions counted without the padding, as ``generate`` counts them."""
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0) + self.first_position

    def model_kwargs(self) -> dict[str, Tensor]:
        """The keyword arguments of the Hugging Face model's forward."""
        kwargs = self.generate_kwargs()
        return kwargs if self.own_positions else {**kwargs, "position_ids": self.position_ids}

    def generate_kwargs(self) -> dict[str, Tensor]:
        """The keyword arguments of the Hugging Face model's generate, which counts positions itself."""
        kwargs = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            **self.token_inputs,
            **self.extra,
        }
        return kwargs if self.pixel_values is None else {**kwargs, "pixel_values": self.pixel_values}

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "LVLMInputs":
        """The same batch on another device, with its pixels in another dtype if one is given."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            pixel_values=None if self.pixel_values is None else self.pixel_values.to(device, dtype),
            spans=self.spans.to(device),
            extra={name: tensor.to(device) for name, tensor in self.extra.items()},
            token_inputs={name: tensor.to(device) for name, tensor in self.token_inputs.items()},
        )

    def rows(self, index: Sequence[int]) -> "LVLMInputs":
        """The rows ``index`` as a batch of their own, in that order, with their images; padding stays.

        Raises:
            ValueError: If no row is named.
        """
        rows = list(index)
        if not rows:
            raise ValueError("index must name at least one row, got none")
        if out := [row for row in rows if not 0 <= row < self.batch_size]:
            raise ValueError(f"index must name rows of the batch of {self.batch_size}, from 0, got {out[0]}")
        entries = self._entries()
        kept = tuple(entries[row] for row in rows)
        counts = {name: self._counts(name) for name in ("pixel_values", *self.extra)}

        def part(name: str, tensor: Tensor) -> Tensor:
            starts = [sum(counts[name][:row]) for row in range(len(entries))]
            return torch.cat([tensor[starts[row] : starts[row] + counts[name][row]] for row in rows])

        pictured = any(kept)
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            pixel_values=part("pixel_values", self.pixel_values)
            if self.pixel_values is not None and pictured
            else None,
            spans=self.spans.rows(rows),
            extra={name: part(name, tensor) for name, tensor in self.extra.items()} if pictured else {},
            token_inputs={name: tensor[rows] for name, tensor in self.token_inputs.items()},
            entries=kept,
            examples=tuple(self.examples[row] for row in rows) if self.examples else (),
            counts={name: tuple(lengths[row] for row in rows) for name, lengths in counts.items()},
        )

    def _entries(self) -> tuple[int, ...]:
        return tuple(len(grids) for grids in self.spans.grids) if self.entries is None else self.entries

    def _counts(self, name: str) -> tuple[int, ...]:
        return self._entries() if self.counts is None else self.counts.get(name, (0,) * self.batch_size)

    def require_pixels(self) -> None:
        """Refuse tensors about images that are not as long as the rows' images say.

        Raises:
            ValueError: If pixels or another tensor about images are of other images than the batch's.
        """
        for name, tensor in {"pixel_values": self.pixel_values, **self.extra}.items():
            if tensor is not None and len(tensor) != (wanted := sum(self._counts(name))):
                raise ValueError(
                    f"{name} must be of the batch's images, {wanted} along the first axis, got {len(tensor)}; "
                    "prepare the batch anew"
                )

    def fingerprint(self) -> str:
        """A digest of tokens, masks, pixels and whose they are: two batches with the same one are the same batch."""
        digest = hashlib.sha256(repr((self._entries(), self.counts)).encode())
        for name, tensor in sorted(
            {**self.generate_kwargs(), "response": self.spans.response, "prefill": self.spans.prefill}.items()
        ):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Generation(ShortRepr):
    """What a model answered.

    Attributes:
        sequences: [batch, pos + new] prompt and answer.
        new_tokens: [batch, new] the answer, padded on the right after its end.
        texts: What the model wrote, as text, without special tokens.
        activations: By site name, if any were asked for: [batch, pos + new - 1, ...] in the language tower, since the
            model is never given the last token; [image, patch, ...] in the vision tower.
        answers: The whole answers as text: the beginning that the example gave (``prefill``), then what the model wrote.
    """

    sequences: Int[Tensor, "batch total"]
    new_tokens: Int[Tensor, "batch new"]
    texts: list[str]
    activations: dict[str, Tensor] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)


def require_inputs(inputs: Any) -> LVLMInputs:
    """The inputs, if they are a prepared batch.

    Raises:
        TypeError: If they are anything else, such as a tensor of tokens whose image placeholders have no
            pixels.
    """
    if not isinstance(inputs, LVLMInputs):
        raise TypeError(f"inputs must be LVLMInputs, got {type(inputs).__name__}; make them with HookedLVLM.prepare")
    return inputs
