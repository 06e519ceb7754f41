"""The arithmetic of fusion: from gated writers of two modalities to one edit. No model, no state."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.repair.writer import Writer


class GatedWriter(NamedTuple):
    """A writer and how far it acts on each token.

    Attributes:
        writer: The writer.
        openness: [batch, pos] between 0 and 1: gate times scope.
    """

    writer: Writer
    openness: Tensor


def modality_edit(
    activation: Float[Tensor, "batch pos d"], writers: Sequence[GatedWriter], *, unit: bool = False
) -> Float[Tensor, "batch pos d"]:
    """The edit that writers make one after the other.

    Args:
        activation: [batch, pos, d].
        writers: The writers, in order; each sees what those before it made.
        unit: Whether every alpha is taken to be 1.

    Returns:
        [batch, pos, d] what to add to the activation.
    """
    edit = torch.zeros_like(activation)
    for writer, openness in writers:
        alpha, opened = 1.0 if unit else writer.alpha, openness[..., None]
        # 0 times an edit that is not finite would be NaN: what is not opened is not edited, whatever stands there.
        edit = edit + alpha * opened * torch.where(opened != 0, writer.delta(activation + edit), 0.0)
    return edit


def fused_edit(
    activation: Float[Tensor, "batch pos d"],
    visual: Sequence[GatedWriter],
    textual: Sequence[GatedWriter],
    *,
    rule: str,
    weights: tuple[float, float],
) -> Float[Tensor, "batch pos d"]:
    """The edit of both modalities, combined by the rule (see :mod:`care_lens.repair.fusion`).

    Args:
        activation: [batch, pos, d].
        visual: Visual writers, each with its openness.
        textual: Textual ones.
        rule: "adaptive", "sequential", "parallel" or "modality"; under the last the openness must say which
            tokens are whose.
        weights: Of the visual and the textual edit under "parallel".

    Returns:
        [batch, pos, d] what to add to the activation.
    """
    if rule == "sequential":
        return modality_edit(activation, [*visual, *textual])
    seen, said = modality_edit(activation, visual), modality_edit(activation, textual)
    if rule == "adaptive":
        share = adaptive_weight(
            modality_edit(activation, visual, unit=True), modality_edit(activation, textual, unit=True)
        )
        return share * seen + (1 - share) * said
    if rule == "parallel":
        return weights[0] * seen + weights[1] * said
    return seen + said


def adaptive_weight(
    visual: Float[Tensor, "batch pos d"], textual: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "batch pos 1"]:
    """``||D_v|| / (||D_v|| + ||D_t||)`` per token; 0 where both are zero."""
    v, t = visual.norm(dim=-1, keepdim=True), textual.norm(dim=-1, keepdim=True)
    return v / (v + t).clamp(min=torch.finfo(v.dtype).tiny)
