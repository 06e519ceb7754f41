"""Checks of a part's settings, made where it is constructed."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from care_lens.repair.errors import RepairError


def require_number(value: Any, *, name: str, least: float | int = -math.inf, above: float | int | None = None) -> None:
    """Refuse what is no finite number, or too small.

    Args:
        value: The setting.
        name: Its name, for the message.
        least: The smallest value allowed.
        above: It must be larger than this; None: no such bound.

    Raises:
        RepairError: If it is not.
    """
    bound = f"above {above:g}" if above is not None else "finite" if least == -math.inf else f"{least:g} or more"
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number < least or (above is not None and not number > above):
        raise RepairError(f"{name} must be {bound}, got {value!r}; give a finite number")


def require_flag(value: Any, *, name: str) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise RepairError(f"{name} must be True or False, got {value!r}")


def require_text(value: Any, *, name: str) -> None:
    """Refuse what is no string."""
    if not isinstance(value, str):
        raise RepairError(f"{name} must be a text, got {value!r}")


def require_tensor(tensor: Any, *, name: str, shape: tuple[int | None, ...], where: Any) -> None:
    """Refuse what is no finite floating tensor of a shape.

    Args:
        tensor: The tensor.
        name: Its name, for the message.
        shape: The length of each axis; None: any of 1 or more.
        where: Site it belongs to, for the message.

    Raises:
        RepairError: If it is not.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise RepairError(f"{name} at {where} must be a tensor of a floating dtype, got {got}")
    fits = tensor.ndim == len(shape) and all(
        size > 0 and (wanted is None or size == wanted) for size, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = [("k" if axis else "d") if size is None else size for axis, size in enumerate(shape)]
        raise RepairError(
            f"{name} at {where} must be of shape {wanted}, got {list(tensor.shape)}; take all tensors from one site of one "
            "model".replace("'", "")
        )
    if not bool(torch.isfinite(tensor).all()):
        raise RepairError(f"{name} at {where} must be finite, got NaN or infinity; fit it on finite activations")


def require_mapping(value: Any, *, name: str) -> None:
    """Refuse what is no mapping."""
    if not isinstance(value, Mapping):
        raise RepairError(f"{name} must be a mapping of JSON-able values, got {type(value).__name__}")
