"""Subspaces on disk: ``subspace.safetensors`` and a manifest ``subspace.json`` that says what must be in it.

The manifest holds the schema version, package versions, names and types, and the sha256 of every tensor's
bytes, of the tensor file and of the manifest's own content. The checksums find damage, not malice: whoever can
write the files can write the sums. Nothing is executed on loading.

Schema 1 had neither ``model`` nor the manifest's checksum. A manifest of an older schema is brought up to date, one
version at a time, by the functions in ``_MIGRATIONS``; files are not rewritten by loading.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch import Tensor

from care_lens.core.results import package_versions
from care_lens.subspace.errors import SubspaceFileError

SCHEMA = 2
"""Version of the files that :func:`save` writes."""
TENSORS_FILE, MANIFEST_FILE = "subspace.safetensors", "subspace.json"

_KIND = "care_lens.SafetySubspace"
_KEYS = ("model", "site", "modality", "width", "rank", "diagnostics", "provenance")
_OWN = "manifest_sha256"


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
        "schema": SCHEMA,
        "kind": _KIND,
        "versions": package_versions(),
        **notes,
        "tensors": {name: _fingerprint(tensor) for name, tensor in tensors.items()},
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    manifest = json.loads(json.dumps(manifest))  # tuples and keys as they will be read, for the sum
    text = json.dumps({**manifest, _OWN: _manifest_sum(manifest)}, indent=2) + "\n"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in ((TENSORS_FILE, data), (MANIFEST_FILE, text.encode())):
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
    data = (directory / TENSORS_FILE).read_bytes()
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise SubspaceFileError(
            f"{directory / MANIFEST_FILE} must be JSON, got {error}; save the subspace again"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND:
        raise SubspaceFileError(
            f"{directory / MANIFEST_FILE} must be the manifest of a SafetySubspace; load it with its own class"
        )
    manifest = _up_to_date(manifest, directory / MANIFEST_FILE)
    if missing := [key for key in (*_KEYS, "sha256", "tensors") if key not in manifest]:
        raise SubspaceFileError(f"{directory / MANIFEST_FILE} must have {missing}; save the subspace again")
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise SubspaceFileError(
            f"{directory / TENSORS_FILE} must be the file its manifest describes, but its checksum differs; "
            "copy both files again"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise SubspaceFileError(f"{directory / TENSORS_FILE} must be a safetensors file, got {error}") from None
    fingerprints = {name: _fingerprint(tensor) for name, tensor in tensors.items()}
    if fingerprints != manifest["tensors"] or set(fingerprints) != set(names):
        raise SubspaceFileError(
            f"{directory / TENSORS_FILE} must hold {sorted(names)} as the manifest describes them, got "
            f"{sorted(tensors)}; copy both files again"
        )
    width, rank = tensors["basis"].shape
    if (width, rank) != (manifest["width"], manifest["rank"]):
        raise SubspaceFileError(
            f"{directory / MANIFEST_FILE} must state the tensors' width {width} and rank {rank}, got "
            f"{manifest['width']} and {manifest['rank']}; save the subspace again"
        )
    return tensors, manifest


def _up_to_date(manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The manifest in the present schema; its own checksum is checked first."""
    schema = manifest.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise SubspaceFileError(
            f"schema in {path} must be a number of 1 or more, got {schema!r}; save the subspace again"
        )
    if schema > SCHEMA:
        raise SubspaceFileError(f"schema must be {SCHEMA} or less, got {schema}; update care_lens")
    if schema >= 2 and manifest.get(_OWN) != _manifest_sum(manifest):
        raise SubspaceFileError(
            f"{path} must be as it was written, but its checksum differs; copy it again, or load the subspace that "
            "it was made from, change that and save it"
        )
    for version in range(schema, SCHEMA):
        manifest = {**_MIGRATIONS[version](manifest), "schema": version + 1}
    return manifest


def _name_no_model(manifest: dict[str, Any]) -> dict[str, Any]:
    """1 to 2: the model is not known. Notes in the provenance may name one, but nothing said what they mean."""
    return {**manifest, "model": None}


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _name_no_model}
"""By the schema they start from."""


def _manifest_sum(manifest: Mapping[str, Any]) -> str:
    """sha256 of the content, whatever its layout; the sum itself does not count."""
    content = {key: value for key, value in manifest.items() if key != _OWN}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _fingerprint(tensor: Tensor) -> dict[str, Any]:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(content.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
    return {
        "shape": list(content.shape),
        "dtype": str(content.dtype).removeprefix("torch."),
        "sha256": digest,
    }
