"""Repairs on disk and in reports: one traversal of their frozen dataclasses.

``repair.json`` holds the structure, ``repair.safetensors`` the tensors; each is written whole, and an object
that occurs twice (a reader shared by two corrections) is written once and shared again when loaded.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from care_lens.core.results import package_versions
from care_lens.core.site import Site

_SCHEMA = 1
_JSON, _TENSORS = "repair.json", "repair.safetensors"

Loaded = TypeVar("Loaded")


def describe(repair: Any) -> dict[str, Any]:
    """A repair as JSON-able values, its tensors by shape and norm.

    Args:
        repair: A frozen dataclass of the kinds this module knows.

    Returns:
        Its fields by name, nested, each part with its ``kind``.

    Raises:
        TypeError: If a part is of a kind that is not known.
    """
    return _encode(repair, lambda t: {"shape": list(t.shape), "norm": round(float(t.double().norm()), 6)}, None)


def save(repair: Any, directory: str | Path) -> None:
    """Write a repair into a directory, which is made if it does not exist.

    Args:
        repair: A frozen dataclass of the kinds this module knows.
        directory: Where to.

    Raises:
        TypeError: If a part is of a kind that is not known, or the provenance is not JSON-able.
    """
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> dict[str, Any]:
        name = str(len(tensors))
        tensors[name] = tensor.detach().cpu().contiguous().clone()
        return {"tensor": name}

    manifest = {"schema": _SCHEMA, "versions": package_versions(), "repair": _encode(repair, keep, {})}
    text = json.dumps(manifest, indent=2)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / _TENSORS)
    (directory / _JSON).write_text(text + "\n", encoding="utf-8")


def load(kind: type[Loaded], directory: str | Path) -> Loaded:
    """Read what :func:`save` wrote.

    Args:
        kind: The class expected.
        directory: Where from.

    Returns:
        The repair, on the CPU.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If the files hold another kind, or come from a newer version.
    """
    directory = Path(directory)
    manifest = json.loads((directory / _JSON).read_text(encoding="utf-8"))
    if manifest["schema"] > _SCHEMA:
        raise ValueError(f"schema must be {_SCHEMA} or less, got {manifest['schema']}; update care_lens")
    repair = _decode(manifest["repair"], load_file(directory / _TENSORS), [])
    if not isinstance(repair, kind):
        raise ValueError(f"{directory} must hold a {kind.__name__}, got a {type(repair).__name__}")
    return repair


def _kinds() -> dict[str, type]:
    from care_lens.repair import correction, fusion, gate, reader, writer

    known = (
        fusion.HybridFusion,
        correction.Correction,
        writer.Writer,
        reader.EnergyReader,
        reader.LinearReader,
        reader.MaxReader,
        gate.AlwaysOpen,
        gate.ConformalGate,
    )
    return {kind.__name__: kind for kind in known}


def _encode(value: Any, on_tensor: Callable[[Tensor], Any], seen: dict[int, int] | None) -> Any:
    """JSON-able form; with ``seen``, an object met again becomes a reference to when it was completed."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Site):
        return {"site": str(value)} if seen is not None else str(value)
    if isinstance(value, tuple):
        return [_encode(item, on_tensor, seen) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": dict(value)} if seen is not None else dict(value)
    if not dataclasses.is_dataclass(value):
        return value
    name = type(value).__name__
    if _kinds().get(name) is not type(value):
        raise TypeError(f"parts of a repair must be one of {sorted(_kinds())} to be saved or described, got {name}")
    if seen is not None and id(value) in seen:
        return {"same_as": seen[id(value)]}
    encoded = {f.name: _encode(getattr(value, f.name), on_tensor, seen) for f in dataclasses.fields(value)}
    if seen is not None:
        seen[id(value)] = len(seen)
    return {"kind": name, **encoded}


def _decode(value: Any, tensors: Mapping[str, Tensor], made: list[Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors, made) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "site" in value and len(value) == 1:
        return Site.parse(value["site"])
    if "mapping" in value:
        return value["mapping"]
    if "same_as" in value:
        return made[value["same_as"]]
    kind = _kinds().get(value["kind"])
    if kind is None:
        raise ValueError(f"kind must be one of {sorted(_kinds())}, got {value['kind']!r}; update care_lens")
    fields = {name: _decode(item, tensors, made) for name, item in value.items() if name != "kind"}
    made.append(kind(**fields))
    return made[-1]
