"""Controls for a subspace: the same shape elsewhere, editing by as much.

A repair that works because it edits at all, and not because of where it edits, works as well with the
control.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.safety_subspace import SafetySubspace

_MOVED = ("basis", "read", "write", "left")


def random_isometry(
    matrices: Sequence[Float[Tensor, "d _"]],
    *,
    span: Sequence[Float[Tensor, "d _"]],
    generator: torch.Generator,
) -> list[Float[Tensor, "d _"]]:
    """Carry matrices from a span to a uniformly random one, with all lengths and angles among their columns.

    The construction behind every random control: what it leaves alone (rank, obliqueness, lengths) cannot be what
    tells the repair from its control.

    Args:
        matrices: [d, ...] each, with columns in the span; what lies outside of it is dropped.
        span: [d, ...] matrices whose columns span what is carried; side by side they have m columns or fewer.
        generator: Of the image; min(m, d) Gaussian columns of length d are drawn.

    Returns:
        The images, of the dtype and on the device of the matrices; computed in float64.
    """
    own = torch.linalg.qr(torch.cat([matrix.double().cpu() for matrix in span], dim=1)).Q
    image = torch.linalg.qr(torch.randn(own.shape, generator=generator, dtype=torch.float64)).Q
    return [(image @ (own.T @ matrix.double().cpu())).to(matrix) for matrix in matrices]


def random_like(subspace: SafetySubspace, seed: int = 0) -> SafetySubspace:
    """A random subspace of the same rank, site, modality, means and projector geometry.

    Args:
        subspace: The one to control for.
        seed: Of the generator.

    Returns:
        The control: ``basis``, ``read``, ``write`` and ``left`` carried by a random isometry from their span
        (of dimension m = min(2k, d)) to a uniformly random one, so that lengths and obliqueness stay;
        eigenvalues are kept for reference, they are not the control's. ``diagnostics["control"]`` says what
        it is.

    Example:
        >>> import torch
        >>> from care_lens.subspace import SafetySubspace
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows = torch.randn(2, 80, 16, generator=generator)
        >>> subspace = SafetySubspace.fit(rows[0], rows[1], rank=2)
        >>> control = random_like(subspace, seed=1)
        >>> alpha = edit_norm_ratio(subspace, control, rows[1])
        >>> bool(alpha > 0)
        True
    """
    own = [getattr(subspace, name) for name in _MOVED]
    generator = torch.Generator().manual_seed(seed)
    found = random_isometry(own, span=(subspace.basis, subspace.write), generator=generator)
    moved = dict(zip(_MOVED, found, strict=True))
    notes = {**subspace.diagnostics, "control": "random subspace", "control_seed": seed}
    return dataclasses.replace(subspace, **moved, diagnostics=notes)


def edit_norm_ratio(
    subspace: SafetySubspace,
    control: SafetySubspace,
    activations: Float[Tensor, "n d"],
    *,
    beta: float = 1.0,
    target: Float[Tensor, "d"] | None = None,
) -> float:
    """How much stronger a control must act to edit as much: the factor from the subspace's alpha to the
    control's.

    Args:
        subspace: The one controlled for.
        control: Its control.
        activations: [n, d] such as the repair meets.
        beta: As for ``SafetySubspace.apply``; likewise target.
        target: [d] or None.

    Returns:
        Mean of ``||P (h - target)||`` over the rows for the subspace, over that for the control.

    Raises:
        SubspaceError: If the control edits nothing.
    """
    means = []
    for one in (subspace, control):
        aim = beta * one.mean_benign if target is None else target
        means.append(float(one.project(activations.double() - aim.to(activations.device)).norm(dim=-1).mean()))
    if means[1] == 0:
        raise SubspaceError(
            "control must edit the activations, got edits of norm 0; give other activations or another seed"
        )
    return means[0] / means[1]
