"""Repairs on disk and in reports: one traversal of the registered kinds they are made of.

``repair.json`` holds the structure, ``repair.safetensors`` the tensors; they are an artifact of :mod:`care_lens.core.files`, with
checksums of both. An object that occurs twice (a reader shared by two corrections) is written once and shared again when loaded.
Whatever is loaded goes through the constructors of its kinds, which check shapes, types and numbers.

Schema 1 had no checksums and named no modules; it is brought up to date by loading, and its files are left as they are.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from care_lens.core import files
from care_lens.core.errors import ArtifactError, CareLensError
from care_lens.core.results import package_versions
from care_lens.core.site import Site
from care_lens.repair.errors import KindError, RepairError, RepairFileError
from care_lens.repair.kinds import RESERVED, kind_of, name_of
from care_lens.subspace import ModelIdentity

SCHEMA = 2
"""Version of the files that :func:`save_repair` writes."""
_KIND, _NAME = "care_lens.Repair", "repair"

Loaded = TypeVar("Loaded")


def describe(repair: Any) -> dict[str, Any]:
    """A repair as JSON-able values, its tensors by shape, norm and digest.

    Args:
        repair: Of a registered kind.

    Returns:
        Its fields by name, nested, each part with its ``kind``.

    Raises:
        KindError: If a part is of a kind that is not registered.
    """

    def told(tensor: Tensor) -> dict[str, Any]:
        exact = tensor.detach().cpu().double().contiguous()
        digest = hashlib.sha256(exact.numpy().tobytes()).hexdigest()[:16]
        return {"shape": list(tensor.shape), "norm": round(float(exact.norm()), 6), "digest": digest}

    return _encode(repair, told, None)


def save_repair(repair: Any, directory: str | Path) -> Path:
    """Write ``repair.json`` and ``repair.safetensors`` into a directory, each whole or not at all.

    Args:
        repair: Of a registered kind: a defence, or any part of one.
        directory: Where to; made if it does not exist.

    Returns:
        The directory.

    Raises:
        KindError: If a part is of a kind that is not registered, or a field holds what cannot be stored.
        OSError: If a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> dict[str, Any]:
        name = str(len(tensors))
        tensors[name] = tensor
        return {"tensor": name}

    name_of(repair)
    encoded = _encode(repair, keep, {})
    files.save_artifact(
        directory,
        _NAME,
        kind=_KIND,
        schema=SCHEMA,
        data={"safetensors": files.tensor_bytes(tensors)},
        content={"versions": package_versions(), "repair": encoded},
    )
    return Path(directory)


def load_repair(kind: type[Loaded], directory: str | Path) -> Loaded:
    """Read what :func:`save_repair` wrote, in this version or an older one. Nothing is executed or imported.

    Args:
        kind: The class expected; a base class of it serves.
        directory: Where from.

    Returns:
        The repair, on the CPU.

    Raises:
        FileNotFoundError: If a file is not there.
        RepairFileError: If the files are damaged, hold another kind or one that is not registered, hold settings or tensors
            that make no repair, or come from a newer version.

    Warns:
        UserWarning: If they are of schema 1, which had no checksums.
    """
    path = Path(directory) / f"{_NAME}.json"
    if not path.exists() and not path.with_name("defence.json").is_file():
        what = "has none" if path.parent.is_dir() else "is no folder"
        raise FileNotFoundError(
            f"{directory} must be a folder with {path.name}, as repair.save and a run's repair/ have it; it {what}"
        )
    if not path.exists() and path.with_name("defence.json").is_file():
        raise FileNotFoundError(
            f"{directory} must hold {path.name}, got defence.json, another defence; load it with care_lens.defences.load_defence(folder)"
        )
    try:
        manifest = files.read_object(path, kind="repair")
        if manifest.get("schema") == 1 and {*manifest} == {"schema", "versions", "repair"}:
            data = {"safetensors": path.with_suffix(".safetensors").read_bytes()}
            files.warn_unsummed(path)
        else:
            data, manifest = files.load_artifact(directory, _NAME, kind=_KIND, schema=SCHEMA, oldest=2)
        tensors = files.tensors_of(data, where=path.with_suffix(".safetensors"))
        repair = _decode(manifest["repair"], tensors, [])
    except RepairFileError:
        raise
    except ArtifactError as error:
        raise RepairFileError(str(error)) from None
    except (CareLensError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise RepairFileError(f"{path} must hold a repair, got one that cannot be made: {error}") from error
    if not isinstance(repair, kind):
        raise RepairFileError(f"{directory} must hold a {kind.__name__}, got a {type(repair).__name__}")
    return repair


save, load = save_repair, load_repair


def _encode(value: Any, on_tensor: Callable[[Tensor], Any], seen: dict[int, int] | None, name: str = "repair") -> Any:
    """JSON-able form; with ``seen``, an object met again becomes a reference to when it was completed."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Site):
        return {"site": str(value)} if seen is not None else str(value)
    if isinstance(value, ModelIdentity):
        return {"model": value.to_dict()} if seen is not None else value.to_dict()
    if isinstance(value, tuple):
        return [_encode(item, on_tensor, seen, name) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": files.packed(value)} if seen is not None else dict(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        if isinstance(value, float) and not math.isfinite(value):
            raise KindError(f"{name} must be finite to be saved or described, got {value}")
        return value
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise KindError(
            f"{name} must hold tensors, sites, numbers, texts, None, mappings, registered kinds or tuples of these to be saved "
            f"or described, got a {type(value).__name__}; give it in one of these forms"
        )
    kind = name_of(value)
    if seen is not None and id(value) in seen:
        return {"same_as": seen[id(value)]}
    made = {
        f.name: _encode(getattr(value, f.name), on_tensor, seen, f.name) for f in dataclasses.fields(value) if f.init
    }
    if seen is None:
        return {"kind": kind, **made}
    seen[id(value)] = len(seen)
    return {"kind": kind, "module": type(value).__module__, **made}


def _decode(value: Any, tensors: Mapping[str, Tensor], made: list[Any]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors, made) for item in value)
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        return _decode_leaf(value, tensors, made)
    kind = kind_of(value["kind"], value.get("module"))
    fields = {name: _decode(item, tensors, made) for name, item in value.items() if name not in RESERVED}
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    if strange := {*fields} - known:
        raise RepairFileError(
            f"a {kind.__name__} must have no other fields than {sorted(known)}, got {sorted(strange)}"
        )
    made.append(kind(**fields))
    return made[-1]


def _decode_leaf(value: dict[str, Any], tensors: Mapping[str, Tensor], made: list[Any]) -> Any:
    if len(value) == 1:
        (form, held), *_ = value.items()
        if form == "tensor" and held in tensors:
            return tensors[held]
        if form == "site":
            return Site.parse(held)
        if form == "model":
            return ModelIdentity(**held)
        if form == "mapping" and isinstance(held, dict):
            return files.unpacked(held)
        if form == "same_as" and isinstance(held, int) and 0 <= held < len(made):
            return made[held]
    raise RepairError(f"a part must be a tensor, site, model, mapping or an earlier part, got {value!r}")
