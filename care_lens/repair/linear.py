"""Which parts of a repair are linear: an edit of every token that depends on that token alone, ``h' = h + E h + e``.

Such an edit is the same at every position and open whatever is read, so that it can be folded into the linear map whose output (or
input) it edits. :mod:`care_lens.repair.bake` does so; whatever says here that it is not linear is refused there with the reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site
from care_lens.repair.correction import Correction
from care_lens.repair.fuse import GatedWriter, fused_edit
from care_lens.repair.gate import AlwaysOpen
from care_lens.repair.positions import Positions

RowEdit = Callable[[Tensor], Tensor]
"""From [n, d] activations, one token a row, to [n, d], what is added to them."""


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearPart:
    """A part of a repair: a linear edit, or the reason why it is none.

    Attributes:
        name: What it is called in messages, such as "visual[0]".
        site: Where it edits.
        edit: The edit; None: it is not linear.
        reason: Why not; empty for a linear part.
    """

    name: str
    site: Site
    edit: RowEdit | None = None
    reason: str = ""


def linear_part(name: str, site: Site, edit: RowEdit, *, scope: Positions) -> LinearPart:
    """A part whose edit is the same affine map at every position of its scope.

    Args:
        name: What it is called.
        site: Where it edits.
        edit: The edit, in the dtype of the rows that it is given.
        scope: The positions.

    Returns:
        A linear part where the scope is everything, else one that says that it is not.
    """
    if reason := _limited(scope):
        return LinearPart(name=name, site=site, reason=reason)
    return LinearPart(name=name, site=site, edit=edit)


def _limited(scope: Positions) -> str:
    named = (scope,) if isinstance(scope, str) else scope
    if "all" in named:
        return ""
    return f"it edits {scope!r} positions alone, and weights do not know positions; take scope='all'"


def fusion_parts(
    visual: Sequence[Correction],
    textual: Sequence[Correction],
    *,
    rule: str,
    weights: tuple[float, float],
    scope: Positions,
) -> list[LinearPart]:
    """The parts of a fusion: one for each site where all corrections are linear, and one for each correction that is not.

    Args:
        visual: Visual corrections.
        textual: Textual ones.
        rule: How they are combined.
        weights: Of the two under "parallel".
        scope: Which tokens are edited.

    Returns:
        The parts in the order of the forward pass; corrections of strength 0 are none.
    """
    named = [(f"visual[{i}]", "visual", c) for i, c in enumerate(visual)]
    named += [(f"textual[{i}]", "textual", c) for i, c in enumerate(textual)]
    named = [(name, side, c) for name, side, c in named if c.writer.alpha != 0]
    parts: list[LinearPart] = []
    for site in sorted({c.writer.site for _, _, c in named}):
        here = [(name, side, c) for name, side, c in named if c.writer.site == site]
        both = len({side for _, side, _ in here}) == 2
        reasons = {name: _why_not(c, rule=rule, scope=scope, both=both) for name, _, c in here}
        if any(reasons.values()):
            parts += [LinearPart(name=name, site=site, reason=reason) for name, reason in reasons.items() if reason]
            continue
        sides = [[c for _, side, c in here if side == wanted] for wanted in ("visual", "textual")]
        # A modality that is alone at a site has all the weight there.
        acting = "sequential" if rule in ("adaptive", "joint") else rule
        parts.append(
            LinearPart(name=" and ".join(reasons), site=site, edit=_fused(*sides, rule=acting, weights=weights))
        )
    return parts


def _why_not(correction: Correction, *, rule: str, scope: Positions, both: bool) -> str:
    """Why a correction is not linear; empty where it is."""
    for limits in (scope, correction.writer.scope):
        if reason := _limited(limits):
            return reason
    if rule == "modality":
        return "the rule 'modality' edits image tokens or words alone, and weights do not know which a token is"
    if correction.pulse:
        return "it acts only on the token at which its gate opens (pulse)"
    if correction.reader is not None and not isinstance(correction.gate, AlwaysOpen):
        return f"it is gated ({type(correction.gate).__name__}): it opens on what is read, and weights do not read"
    if correction.unless is not None:
        return f"it spares tokens on what is read ({type(correction.unless).__name__}), and weights do not read"
    if rule == "joint" and both:
        return "the rule 'joint' sends each token to the target of its own modality, and weights do not know which a token is"
    if rule == "adaptive" and both:
        return "the rule 'adaptive' weighs visual and textual edits by their norms at each token, which is not linear"
    return ""


def _fused(
    visual: Sequence[Correction], textual: Sequence[Correction], *, rule: str, weights: tuple[float, float]
) -> RowEdit:
    def edit(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        opened = torch.ones(1, len(rows), dtype=rows.dtype, device=rows.device)
        sides = [[GatedWriter(c.writer, opened) for c in side] for side in (visual, textual)]
        return fused_edit(rows[None], *sides, rule=rule, weights=weights).edit[0]

    return edit
