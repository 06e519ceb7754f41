"""Subtracting a mean that is large beside the spread, in the dtype of the activations.

A mean of 1e6 is known to 0.06 in float32, which is lost before any variance of 1 is looked at. Means are therefore kept in float64,
and taken off in two parts: ``h - high`` is exact where h is close to the mean (Sterbenz 1974, "Floating-point computation"), and the
rest of the mean is small. Nothing is computed in float64 on the way, so that devices without it serve too.
"""

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor | None]
"""A centre as ``high + low``; low is None where high is all of it."""


def split(centre: Tensor, like: Tensor) -> Parts:
    """A centre as ``high + low`` in the dtype and on the device of ``like``; low is None where high is all of it."""
    if centre.dtype != torch.float64 or like.dtype == torch.float64:
        return centre.to(device=like.device, dtype=like.dtype), None
    high = centre.to(like.dtype)
    low = (centre - high.to(torch.float64)).to(like.dtype)
    return high.to(like.device), low.to(like.device)


def subtract(activation: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """``activation - (high + low)`` without losing the low part of a large centre."""
    rest = activation - high
    return rest if low is None else rest - low


def centred(activation: Tensor, centre: Tensor) -> Tensor:
    """``activation - centre`` in the dtype of the activation, without what a cast of the centre would lose."""
    return subtract(activation, *split(centre, activation))
