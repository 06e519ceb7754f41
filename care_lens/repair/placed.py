"""Tensors of a frozen object, ready on the device and in the dtype that an activation asks for."""

from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which activations of ``dtype`` are read and edited: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class PlacedTensors:
    """Mix-in for frozen dataclasses: their tensor fields, a copy kept for each device and dtype asked for."""

    def placed(self, *names: str, like: Tensor) -> tuple[Tensor, ...]:
        """The named fields on the device and in the dtype of ``like``."""
        kept: dict[Any, tuple[Tensor, ...]] = self.__dict__.setdefault("_placed", {})
        key = (names, like.device, like.dtype)
        if key not in kept:
            with torch.inference_mode(False):  # a copy made for inference could not be used with gradients later
                kept[key] = tuple(getattr(self, name).to(like.device, like.dtype) for name in names)
        return kept[key]
