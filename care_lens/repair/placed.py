"""Tensors of a frozen object, ready on the device and in the dtype that an activation asks for."""

from typing import Any

import torch
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.centring import Parts, split, subtract


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of ``dtype`` are read and edited: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class PlacedTensors(ShortRepr):
    """Mix-in for frozen dataclasses: their tensor fields, a copy kept for each device and dtype asked for."""

    def centred(self, activation: Tensor, name: str) -> Tensor:
        """``activation`` less the named field, exact where that is a float64 mean far from 0 and the activation float32."""
        return subtract(activation, *self.parted(name, like=activation))

    def parted(self, name: str, *, like: Tensor) -> Parts:
        """The named field as the centre of activations like these, see :func:`care_lens.subspace.centring.split`."""
        kept: dict[Any, Any] = self.__dict__.setdefault("_placed", {})
        key = (name, "centre", like.device, like.dtype)
        if key not in kept:
            with torch.inference_mode(False):
                kept[key] = split(getattr(self, name), like)
        return kept[key]

    def placed(self, *names: str, like: Tensor) -> tuple[Tensor, ...]:
        """The named fields on the device and in the dtype of ``like``."""
        kept: dict[Any, tuple[Tensor, ...]] = self.__dict__.setdefault("_placed", {})
        key = (names, like.device, like.dtype)
        if key not in kept:
            with torch.inference_mode(False):  # a copy made for inference could not be used with gradients later
                kept[key] = tuple(getattr(self, name).to(like.device, like.dtype) for name in names)
        return kept[key]
