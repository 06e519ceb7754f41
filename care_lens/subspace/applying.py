"""What a subspace does to activations: coordinates, projection, correction.

    apply(h) = h - alpha P (h - target)

Activations are row vectors of any floating dtype. Everything is computed in float32, or in float64 where the activations or the
projector are, and nothing is written in place.
"""

import dataclasses
import warnings
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.affine import along, working_dtype
from care_lens.subspace.centring import centred, split
from care_lens.subspace.errors import NonFiniteError, SubspaceError
from care_lens.subspace.linear_map import LinearMap

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace


def project(subspace: "SafetySubspace", h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """See ``SafetySubspace.project``."""
    moved = along(_wide(subspace, h), write=subspace.write, left=subspace.left)
    return moved.to(torch.promote_types(h.dtype, torch.float32))


def coordinates(subspace: "SafetySubspace", h: Float[Tensor, "*batch d"], *, centre: bool) -> Float[Tensor, "*batch k"]:
    """See ``SafetySubspace.coordinates``."""
    wide = _wide(subspace, h)
    found = (centred(wide, subspace.mean_benign) if centre else wide) @ subspace.read.to(wide)
    return found.to(torch.promote_types(h.dtype, torch.float32))


def apply(
    subspace: "SafetySubspace",
    h: Float[Tensor, "*batch d"],
    *,
    alpha: float,
    beta: float,
    target: Float[Tensor, "d"] | None,
) -> Float[Tensor, "*batch d"]:
    """See ``SafetySubspace.apply``."""
    wide = _wide(subspace, h)
    _check_strengths(alpha, beta)
    if target is not None:
        subspace.check(width=target.shape[-1])
    if alpha == 0:
        return h
    aim = beta * subspace.mean_benign if target is None else _finite_target(target)
    moved = along(wide, write=subspace.write, left=subspace.left, centre=split(aim, wide))
    return (wide - alpha * moved).to(h.dtype)


def correction(
    subspace: "SafetySubspace", *, alpha: float, beta: float, target: Float[Tensor, "d"] | None
) -> LinearMap:
    """See ``SafetySubspace.correction``."""
    _check_strengths(alpha, beta)
    if target is not None:
        subspace.check(width=target.shape[-1])
    own = subspace.mean_benign
    aim = beta * own if target is None else _finite_target(target).to(own)
    return dataclasses.replace(subspace.removal(alpha), centre=aim)


def _wide(subspace: "SafetySubspace", h: Tensor) -> Tensor:
    """h in float32, or float64 if h or the projector is; checked."""
    if not h.is_floating_point():
        raise SubspaceError(
            f"activations must be of a floating dtype, got {h.dtype}, which could not hold the result; give h.float()"
        )
    subspace.check(width=h.shape[-1])
    return h.to(working_dtype(h.dtype, subspace.left))


def _check_strengths(alpha: float, beta: float) -> None:
    if not 0 <= alpha < float("inf"):
        raise SubspaceError(f"alpha must be 0 or more, got {alpha!r}")
    if not 0 <= beta <= 1:
        raise SubspaceError(f"beta must be in [0, 1], got {beta!r}; give a target to aim elsewhere")
    if alpha > 1:
        warnings.warn(
            f"alpha={alpha} is above 1: coordinates are reflected through the target, not removed",
            stacklevel=4,
        )


def _finite_target(target: Tensor) -> Tensor:
    if not target.is_floating_point() or not bool(target.isfinite().all()):
        raise NonFiniteError(
            f"target must be finite floating point, got {target.dtype} with NaN, infinity or whole numbers"
        )
    return target
