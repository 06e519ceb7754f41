"""Which positions of a batch a repair reads and writes, at prefill and at the generated tokens after it.

Positions are named as in :class:`~care_lens.core.spans.TokenSpans`: "all" (everything but padding), "image",
"text" (the template and generated tokens included), "prompt", "response" or "generated", "last" (the last
PROMPT token), "context_end" (the last token that is given: the last of a begun answer, else of the prompt); a tuple of names means their union. During generation with a key-value cache the prompt's spans
hold at prefill; every new token is text and generated, and is neither image, nor prompt, nor last.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from care_lens.core.site import Site
from care_lens.core.spans import SPAN_NAMES
from care_lens.lvlm import LVLMInputs
from care_lens.repair.errors import RepairError

Positions: TypeAlias = str | tuple[str, ...]
"""The name of a span, or several whose union is meant."""

_GENERATED = frozenset({"all", "text", "response", "generated"})
_PER_HEAD = ("attn.hook_z", "attn.hook_pattern")
_TOKENS_HOOK = "embed.hook_in"


def check_positions(positions: Positions, *, name: str) -> None:
    """Refuse what names no span.

    Args:
        positions: The name or names.
        name: The argument they came in, for the message.

    Raises:
        RepairError: If a name is not known, or there is none.
    """
    named = isinstance(positions, (str, tuple))
    if not named or not positions or any(span not in SPAN_NAMES for span in _names(positions)):
        raise RepairError(f"{name} must be one of {SPAN_NAMES} or a tuple of them, got {positions!r}")


def check_site(site: Site, *, name: str) -> None:
    """Refuse a site whose activation is not [batch, pos, d] of the language tower.

    Raises:
        RepairError: If it is no site, the site is of another tower, or has a head axis.
    """
    if not isinstance(site, Site):
        raise RepairError(f"{name} must be a Site, got {site!r}; make one with Site.parse")
    if site.tower != "language" or site.component in _PER_HEAD:
        raise RepairError(
            f"{name} must be a [batch, pos, d] site of the language tower, where every position is known to "
            f"be image or text, got {site}; take a residual stream, hook_attn_out, hook_mlp_out or "
            "mlp.hook_post"
        )


def includes_generated(positions: Positions) -> bool:
    """Whether generated tokens are among the positions."""
    return not _GENERATED.isdisjoint(_names(positions))


def _names(positions: Positions) -> tuple[str, ...]:
    return (positions,) if isinstance(positions, str) else positions


class BatchView:
    """One batch as the hooks made for it see it.

    Args:
        inputs: The batch.

    Raises:
        ValueError: If its rows have a single position, which could not be told from a generation step.
    """

    def __init__(self, inputs: LVLMInputs) -> None:
        if inputs.input_ids.shape[1] < 2:
            raise ValueError("inputs must have 2 positions or more, got 1; a prompt includes its chat template")
        self._inputs = inputs

    def is_prefill(self, shape: torch.Size) -> bool:
        """Whether an activation (or the token ids) is of the whole batch, or of a step after it.

        Args:
            shape: [batch, pos, ...].

        Returns:
            True for the whole batch, False for one generated token a row.

        Raises:
            ValueError: If it is neither: the hooks run on another batch than theirs.
        """
        batch, pos = self._inputs.input_ids.shape
        if shape[0] == batch and shape[1] in (1, pos):
            return shape[1] == pos
        raise ValueError(
            f"these hooks must run on the batch they were made for, of shape {(batch, pos)}, or on one new "
            f"token a row, got {tuple(shape[:2])}; make new hooks with fwd_hooks(inputs), or use "
            "`with repair.on(lvlm)`. Beams, several returned sequences, and generation without the key-value "
            "cache are not supported"
        )

    def mask(self, positions: Positions, *, prefill: bool) -> Bool[Tensor, "batch pos"]:
        """Where the positions are.

        Args:
            positions: Name or names of spans.
            prefill: Whether the whole batch is meant, else one generated token a row.

        Returns:
            [batch, pos] at prefill, [batch, 1] after it.
        """
        spans = self._inputs.spans
        if not prefill:
            return torch.full_like(spans.padding[:, :1], includes_generated(positions))
        mask = torch.zeros_like(spans.padding)
        for name in _names(positions):
            mask = mask | spans.mask(name)
        return mask

    def guard(self) -> tuple[str, Callable[..., Any]]:
        """A hook on the token embedding that refuses another batch's tokens.

        Pixels are not compared: all that a repair takes from the batch is which position is what.

        Returns:
            A TransformerLens ``(name, fn)`` pair.
        """
        inputs = self._inputs
        compared = inputs.spans.text

        def check_tokens(ids: Tensor, hook: Any) -> None:
            if self.is_prefill(ids.shape) and bool(
                ((ids != inputs.input_ids.to(ids.device)) & compared.to(ids.device)).any()
            ):
                raise ValueError(
                    "these hooks must run on the batch they were made for, got other tokens; make new hooks "
                    "with fwd_hooks(inputs), or use `with repair.on(lvlm)`"
                )

        return _TOKENS_HOOK, check_tokens
