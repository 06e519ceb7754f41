"""Tensors of a frozen object, ready on the device and in the dtype that an activation asks for."""

from typing import Any

import torch
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.centring import split


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of ``dtype`` are read and edited: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def subtract(activation: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """``activation - (high + low)`` without losing the low part of a large centre; see :func:`care_lens.subspace.centring.split`."""
    rest = activation - high
    return rest if low is None else rest - low


class PlacedTensors(ShortRepr):
    """Mix-in for frozen dataclasses: their tensor fields, a copy kept for each device and dtype asked for."""

    def centred(self, activation: Tensor, name: str) -> Tensor:
        """``activation`` less the named field, exact where that is a float64 mean far from 0 and the activation float32."""
        kept: dict[Any, Any] = self.__dict__.setdefault("_placed", {})
        key = (name, "centre", activation.device, activation.dtype)
        if key not in kept:
            with torch.inference_mode(False):
                kept[key] = split(getattr(self, name), activation)
        return subtract(activation, *kept[key])

    def placed(self, *names: str, like: Tensor) -> tuple[Tensor, ...]:
        """The named fields on the device and in the dtype of ``like``."""
        kept: dict[Any, tuple[Tensor, ...]] = self.__dict__.setdefault("_placed", {})
        key = (names, like.device, like.dtype)
        if key not in kept:
            with torch.inference_mode(False):  # a copy made for inference could not be used with gradients later
                kept[key] = tuple(getattr(self, name).to(like.device, like.dtype) for name in names)
        return kept[key]
