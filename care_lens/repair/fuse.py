"""The arithmetic of fusion: from gated writers of two modalities to one edit. No model, no state."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.gates import gradient_wanted
from care_lens.repair.errors import RepairError
from care_lens.repair.writer import Writer
from care_lens.subspace.affine import along


class GatedWriter(NamedTuple):
    """A writer and how far it acts on each token.

    Attributes:
        writer: The writer.
        openness: [batch, pos] between 0 and 1: gate times scope times schedule.
        gate: [batch, pos] gate times scope, where a schedule makes it differ; None: it is the openness. For records.
    """

    writer: Writer
    openness: Tensor
    gate: Tensor | None = None

    def at(self, columns: Tensor) -> "GatedWriter":
        """At some positions."""
        gate = None if self.gate is None else self.gate[:, columns]
        return GatedWriter(self.writer, self.openness[:, columns], gate)


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
    for writer, openness, _ in writers:
        alpha, opened = 1.0 if unit else writer.alpha, openness[..., None]
        # 0 times an edit that is not finite would be NaN: what is not opened is not edited, whatever stands there.
        edit = edit + alpha * opened * _where_open(opened, writer.delta(activation + edit))
    return edit


def _where_open(opened: Tensor, delta: Tensor) -> Tensor:
    """The edit where a gate opens, 0 where it does not; to an attack that sees the repair, what a closed gate holds back too."""
    acts = (opened != 0) | delta.isfinite() if gradient_wanted() else opened != 0
    return torch.where(acts, delta, 0.0)


class Fused(NamedTuple):
    """An edit and how it was made.

    Attributes:
        edit: [batch, pos, d] what to add to the activation.
        visual: [batch, pos] weight of the visual edit in it.
        textual: [batch, pos] weight of the textual edit.
    """

    edit: Tensor
    visual: Tensor
    textual: Tensor


Share = Callable[[Tensor, Tensor], Tensor]
"""From the norms of the visual and of the textual edit at alpha = 1, [batch, pos, 1], to the visual share."""


def fused_edit(
    activation: Float[Tensor, "batch pos d"],
    visual: Sequence[GatedWriter],
    textual: Sequence[GatedWriter],
    *,
    rule: str,
    weights: tuple[float, float] = (0.5, 0.5),
    image: Bool[Tensor, "batch pos"] | None = None,
    share: Share | None = None,
) -> Fused:
    """The edit of both modalities, combined by the rule (see :mod:`care_lens.repair.fusion`).

    Args:
        activation: [batch, pos, d].
        visual: Visual writers, each with its openness.
        textual: Textual ones.
        rule: "adaptive", "sequential", "parallel", "modality" or "joint"; under "modality" the openness must say which
            tokens are whose.
        weights: Of the visual and the textual edit under "parallel".
        image: [batch, pos] which tokens are image tokens; needed under "joint", where each token goes to the target of its own
            modality.
        share: How the norms of the two edits make the visual share under "adaptive"; None: :func:`adaptive_share`.

    Returns:
        The edit, and the weights of the two modalities in it (of "joint": whether each takes part).
    """
    # A gate that reads the last prompt token opens there, and in front of it stand all the tokens of the pictures. A share of the whole
    # row needs the norms of all of it, and an attack that sees the repair gets a gradient through every token.
    opened = None if share is not None or gradient_wanted() else _open_columns([*visual, *textual])
    if opened is None or len(opened) == activation.shape[1]:
        return _fused(activation, visual, textual, rule=rule, weights=weights, image=image, share=share)
    closed = torch.ones(activation.shape[1], dtype=torch.bool, device=activation.device).index_fill_(0, opened, False)
    columns = torch.cat([opened, closed.nonzero()[:1, 0]])  # the closed one stands for all of them
    sides = ([one.at(columns) for one in side] for side in (visual, textual))
    at = None if image is None else image[:, columns]
    part = _fused(activation[:, columns], *sides, rule=rule, weights=weights, image=at, share=share)
    edit = torch.zeros_like(activation, dtype=part.edit.dtype).index_copy(1, columns, part.edit)
    said, seen = (w[:, -1:].expand(activation.shape[:2]).index_copy(1, columns, w) for w in (part.textual, part.visual))
    return Fused(edit, seen, said)


def _open_columns(writers: Sequence[GatedWriter]) -> Tensor | None:
    """The positions at which some gate of some row is open; None: there is no writer."""
    if not writers:
        return None
    acts = torch.stack([one.openness.detach() != 0 for one in writers])
    return acts.flatten(0, 1).any(dim=0).nonzero()[:, 0]


def _fused(
    activation: Float[Tensor, "batch pos d"],
    visual: Sequence[GatedWriter],
    textual: Sequence[GatedWriter],
    *,
    rule: str,
    weights: tuple[float, float],
    image: Bool[Tensor, "batch pos"] | None,
    share: Share | None,
) -> Fused:
    """As :func:`fused_edit`, at every token."""
    if rule == "sequential":
        edit = modality_edit(activation, [*visual, *textual])
        return Fused(edit, _acts(visual, activation), _acts(textual, activation))
    if rule == "joint":
        if image is None:
            raise RepairError('image must say which tokens are image tokens under rule="joint", got None')
        edit = joint_edit(activation, visual, textual, image=image)
        return Fused(edit, _acts(visual, activation), _acts(textual, activation))
    seen, said = modality_edit(activation, visual), modality_edit(activation, textual)
    if rule == "adaptive":
        units = [modality_edit(activation, side, unit=True).norm(dim=-1, keepdim=True) for side in (visual, textual)]
        w = (share or adaptive_share)(*units)
        return Fused(w * seen + (1 - w) * said, w[..., 0], 1 - w[..., 0])
    if rule == "parallel":
        ones = torch.ones_like(activation[..., 0])
        return Fused(weights[0] * seen + weights[1] * said, weights[0] * ones, weights[1] * ones)
    return Fused(seen + said, _acts(visual, activation), _acts(textual, activation))


def _acts(writers: Sequence[GatedWriter], activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
    """1 where one of the writers acts."""
    acts = torch.zeros_like(activation[..., 0], dtype=torch.bool)
    for _, openness, _ in writers:
        acts = acts | (openness != 0)
    return acts.to(activation.dtype)


def joint_edit(
    activation: Float[Tensor, "batch pos d"],
    visual: Sequence[GatedWriter],
    textual: Sequence[GatedWriter],
    *,
    image: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d"]:
    """One projection onto the span of both modalities' directions, towards the target of the token's own modality.

    With W = [W_v W_t] and L = [L_v L_t] the edit is ``-alpha W (L^T W)^-1 L^T (h - target)``: both sets of coordinates arrive at once, also
    where the directions overlap, which no sum of the two edits does. Where only one modality is open, it acts alone; a gate that is partly
    open shares between the two cases.

    Args:
        activation: [batch, pos, d].
        visual: No or one visual writer, with its openness.
        textual: No or one textual writer, of the same alpha (:class:`~care_lens.repair.HybridFusion` refuses others).
        image: [batch, pos] which tokens are image tokens.

    Returns:
        [batch, pos, d] what to add.
    """
    if not visual or not textual:
        return modality_edit(activation, [*visual, *textual])
    ((seen, open_v, _),), ((said, open_t, _),) = visual, textual
    both = torch.minimum(open_v, open_t)
    # A fit keeps float64 where float32 would lose too much of so oblique a projector.
    exact = activation.double() if torch.float64 in (seen.write.dtype, said.write.dtype) else activation
    write, left = _joined(seen, said, like=exact)
    centred = torch.where(image[..., None], seen.centred(exact, "target"), said.centred(exact, "target"))
    together = along(centred, write=write, left=left, back=True).to(activation.dtype)

    def part(opened: Tensor, delta: Tensor) -> Tensor:
        return seen.alpha * opened[..., None] * _where_open(opened[..., None], delta)

    return (
        part(both, together) + part(open_v - both, seen.delta(activation)) + part(open_t - both, said.delta(activation))
    )


def _joined(seen: Writer, said: Writer, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """W (L^T W)^-1 and L of two writers, made once for each pair, device and dtype."""
    kept = seen.__dict__.setdefault("_joined", {})
    key = (said, like.device, like.dtype)
    if key not in kept:
        with torch.inference_mode(False):
            write, left = (
                torch.cat([getattr(w, name).detach().cpu().double() for w in (seen, said)], dim=1)
                for name in ("write", "left")
            )
            # Directions that both modalities share are there once: the pseudo-inverse drops what is double.
            solved = write @ torch.linalg.pinv(left.T @ write, rtol=1e-6)
            kept[key] = solved.to(like.device, like.dtype), left.to(like.device, like.dtype)
    return kept[key]


def adaptive_share(
    visual: Float[Tensor, "batch pos 1"], textual: Float[Tensor, "batch pos 1"]
) -> Float[Tensor, "batch pos 1"]:
    """``n_v / (n_v + n_t)`` of two norms; 0 where both are zero."""
    share = visual / (visual + textual).clamp(min=torch.finfo(visual.dtype).tiny)
    # Where both edits are zero any share gives zero; this one lets an attacker's gradient through to either gate.
    return torch.where(visual + textual == 0, 0.5, share) if gradient_wanted() else share


def adaptive_weight(
    visual: Float[Tensor, "batch pos d"], textual: Float[Tensor, "batch pos d"]
) -> Float[Tensor, "batch pos 1"]:
    """``||D_v|| / (||D_v|| + ||D_t||)`` per token; 0 where both are zero."""
    return adaptive_share(visual.norm(dim=-1, keepdim=True), textual.norm(dim=-1, keepdim=True))
