"""A digest of everything that an object holds: every number of its tensors, every setting, and which classes they are of.

Two objects have one digest if they were made alike, on whatever device. It goes through attributes, dataclass fields,
mappings, sequences and sets; modules count with their parameters and buffers, functions with their code, defaults and what they
close over. Values of any other type count with their class and ``repr``.
"""

import dataclasses
import hashlib
import types
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_COPIES = frozenset({"_placed"})
"""Attributes that hold copies of others, made while the object is used."""


def held_digest(value: Any) -> str:
    """The sha256 of all that a value holds, in hexadecimal digits.

    Args:
        value: Anything; a circle of references is followed once.

    Returns:
        64 digits.

    Example:
        >>> held_digest({"a": 1, "b": 2.0}) == held_digest({"b": 2.0, "a": 1})
        True
        >>> held_digest(1) == held_digest(1.0)
        False
    """
    return _digest(value, {}).hex()


def _digest(value: Any, seen: dict[int, int]) -> bytes:
    if isinstance(value, Enum) or not isinstance(value, _PLAIN):
        if id(value) in seen:  # a circle: said by how far up it closes, which two equal objects agree in
            return _join("again", str(len(seen) - seen[id(value)]).encode())
        seen = {**seen, id(value): len(seen)}
    else:
        return _join(type(value).__name__, repr(value).encode())
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, Tensor):
        return _join("tensor", _tensor(value))
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return _join("array", f"{value.shape}".encode(), *(_digest(item, seen) for item in value.ravel()))
        return _join("array", f"{value.dtype.str}:{value.shape}".encode(), np.ascontiguousarray(value).tobytes())
    if isinstance(value, Mapping):
        items = [_join("item", _digest(key, seen), _digest(item, seen)) for key, item in value.items()]
        return _join(kind, *sorted(items))
    if isinstance(value, (list, tuple)):  # a list comes back from a file as a tuple
        name = "sequence" if type(value) in (list, tuple) else kind
        return _join(name, *(_digest(item, seen) for item in value))
    if isinstance(value, AbstractSet):
        return _join(kind, *sorted(_digest(item, seen) for item in value))
    if isinstance(value, type):
        return _join("class", f"{value.__module__}.{value.__qualname__}".encode())
    if isinstance(value, types.MethodType):
        return _join("method", _digest(value.__func__, seen), _digest(value.__self__, seen))
    if isinstance(value, types.FunctionType):
        closed = [] if value.__closure__ is None else [_cell(cell, seen) for cell in value.__closure__]
        parts = (value.__defaults__, value.__kwdefaults__)
        return _join(
            "function", value.__qualname__.encode(), _code(value.__code__, seen), _digest(parts, seen), *closed
        )
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if not name.startswith("_")}
        return _join(
            kind, *(_digest(part, seen) for part in (own, dict(value.state_dict()), dict(value.named_children())))
        )
    if isinstance(value, Enum):
        return _join(kind, value.name.encode())
    if isinstance(value, (torch.dtype, torch.device, PurePath, range, slice, np.generic, types.ModuleType)):
        return _join(kind, repr(value).encode())
    return _join(kind, _digest(_attributes(value), seen))


def _attributes(value: Any) -> Any:
    """What an object holds: its fields, its attributes and its slots; its ``repr`` if it has none of these."""
    found = {} if not dataclasses.is_dataclass(value) else {f.name: getattr(value, f.name) for f in _fields(value)}
    found |= {name: part for name, part in getattr(value, "__dict__", {}).items() if name not in _COPIES}
    slots = [name for cls in type(value).__mro__ for name in _names(getattr(cls, "__slots__", ()))]
    found |= {name: getattr(value, name) for name in slots if hasattr(value, name) and not name.startswith("__")}
    return found if found or hasattr(value, "__dict__") else repr(value)


def _fields(value: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(value) if hasattr(value, field.name)]


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _tensor(tensor: Tensor) -> bytes:
    if tensor.is_meta:
        return f"{tuple(tensor.shape)}:{tensor.dtype}:meta".encode()
    here = tensor.detach()
    here = (here.to_dense() if here.layout != torch.strided else here).cpu().contiguous()
    if here.is_quantized:
        here = here.dequantize()
    here = here.resolve_conj().resolve_neg()
    return f"{tuple(here.shape)}:{tensor.dtype}".encode() + here.reshape(-1).view(torch.uint8).numpy().tobytes()


def _cell(cell: types.CellType, seen: dict[int, int]) -> bytes:
    try:
        return _digest(cell.cell_contents, seen)
    except ValueError:  # a name that the function closes over and that has no value yet
        return _join("empty")


def _code(code: types.CodeType, seen: dict[int, int]) -> bytes:
    constants = [
        _code(part, seen) if isinstance(part, types.CodeType) else _digest(part, seen) for part in code.co_consts
    ]
    return _join("code", code.co_code, repr((code.co_names, code.co_varnames)).encode(), *constants)


def _join(kind: str, *parts: bytes) -> bytes:
    content = hashlib.sha256(kind.encode())
    for part in parts:
        content.update(len(part).to_bytes(8, "big") + part)
    return content.digest()
