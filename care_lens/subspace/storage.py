"""Subspaces on disk: ``subspace.safetensors`` and a manifest ``subspace.json`` that says what must be in it.

The manifest holds the schema version, package versions, names and types, and the sha256 of every tensor's
bytes and of the tensor file. Nothing is executed on loading.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor

from care_lens.core.results import package_versions
from care_lens.subspace.errors import SubspaceFileError

_SCHEMA = 1
_KIND = "care_lens.SafetySubspace"
_TENSORS, _MANIFEST = "subspace.safetensors", "subspace.json"
_KEYS = ("site", "modality", "width", "rank", "diagnostics", "provenance")


def save(directory: str | Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> Path:
    """Write both files, the manifest last; each appears whole or not at all.

    Args:
        directory: Made if it does not exist.
        tensors: By name.
        notes: JSON-able; goes into the manifest.

    Returns:
        The directory.

    Raises:
        TypeError: If the notes are not JSON-able.
    """
    directory = Path(directory)
    data = to_bytes({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    manifest = {
        "schema": _SCHEMA,
        "kind": _KIND,
        "versions": package_versions(),
        **notes,
        "tensors": {name: _fingerprint(tensor) for name, tensor in tensors.items()},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in ((_TENSORS, data), (_MANIFEST, text.encode())):
        part = directory / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, directory / name)
    return directory


def load_checked(directory: str | Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read both files and check them against each other.

    Args:
        directory: Where.
        names: The tensors that must be there.

    Returns:
        The tensors on the CPU, and the manifest.

    Raises:
        FileNotFoundError: If a file is not there.
        SubspaceFileError: If the two do not fit each other, hold another kind or come from a newer schema.
    """
    directory = Path(directory)
    data = (directory / _TENSORS).read_bytes()
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SubspaceFileError(f"{directory / _MANIFEST} must be JSON, got {error}; save the subspace again") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise SubspaceFileError(
            f"{directory / _MANIFEST} must be the manifest of a SafetySubspace; load it with its own class"
        )
    if manifest.get("schema", 0) > _SCHEMA:
        raise SubspaceFileError(f"schema must be {_SCHEMA} or less, got {manifest['schema']}; update care_lens")
    if missing := [key for key in (*_KEYS, "sha256", "tensors") if key not in manifest]:
        raise SubspaceFileError(f"{directory / _MANIFEST} must have {missing}; save the subspace again")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise SubspaceFileError(
            f"{directory / _TENSORS} must be the file its manifest describes, but its checksum differs; "
            "copy both files again"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise SubspaceFileError(f"{directory / _TENSORS} must be a safetensors file, got {error}") from None
    fingerprints = {name: _fingerprint(tensor) for name, tensor in tensors.items()}
    if fingerprints != manifest["tensors"] or set(fingerprints) != set(names):
        raise SubspaceFileError(
            f"{directory / _TENSORS} must hold {sorted(names)} as the manifest describes them, got "
            f"{sorted(tensors)}; copy both files again"
        )
    width, rank = tensors["basis"].shape
    if (width, rank) != (manifest["width"], manifest["rank"]):
        raise SubspaceFileError(
            f"{directory / _MANIFEST} must state the tensors' width {width} and rank {rank}, got "
            f"{manifest['width']} and {manifest['rank']}; save the subspace again"
        )
    return tensors, manifest


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return {
        "shape": list(content.shape),
        "dtype": str(content.dtype).removeprefix("torch."),
        "sha256": digest,
    }
