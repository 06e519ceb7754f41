"""Subspaces on disk: ``subspace.safetensors`` and a manifest ``subspace.json`` that says what must be in it.

Both are an artifact of :mod:`care_lens.core.files`: the manifest holds the schema, package versions, names and types, the sha256 of the
tensor file and of its own content. The checksums find damage, not malice: whoever can write the files can write the sums. Nothing
is executed on loading. What the sums cannot say, whether the numbers are those of a subspace at all, is checked as well
(:mod:`care_lens.subspace.validity`).

Schema 1 had neither ``model`` nor the manifest's checksum; schemas 1 and 2 kept a sum a tensor. They are brought up to date, one
version at a time, by the functions in ``_MIGRATIONS``; files are not rewritten by loading.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from care_lens.core import files
from care_lens.core.errors import ArtifactError
from care_lens.core.results import package_versions
from care_lens.core.site import Site
from care_lens.subspace.errors import SubspaceFileError
from care_lens.subspace.model_identity import ModelIdentity
from care_lens.subspace.validity import check_notes, check_tensors

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace

SCHEMA = 3
"""Version of the files that :func:`save` writes."""
TENSORS_FILE, MANIFEST_FILE = "subspace.safetensors", "subspace.json"
TENSORS = ("basis", "read", "write", "left", "eigenvalues", "mean_benign", "mean_malicious")
"""The fields of a subspace that are tensors."""

_KIND = "care_lens.SafetySubspace"
_KEYS = ("model", "site", "modality", "width", "rank", "diagnostics", "provenance")
_OWN = "manifest_sha256"


def save(subspace: "SafetySubspace", directory: str | Path) -> Path:
    """Write both files, the manifest last; each appears whole or not at all. See ``SafetySubspace.save``.

    Raises:
        TypeError: If the notes are not JSON-able.
        OSError: If a file cannot be written.
    """
    notes = {
        "site": None if subspace.site is None else str(subspace.site),
        "width": subspace.width,
        "rank": subspace.rank,
        "model": None if subspace.model is None else subspace.model.to_dict(),
        "modality": subspace.modality,
        "diagnostics": subspace.diagnostics,
        "provenance": subspace.provenance,
    }
    files.save_artifact(
        directory,
        "subspace",
        kind=_KIND,
        schema=SCHEMA,
        data={"safetensors": files.tensor_bytes({name: getattr(subspace, name) for name in TENSORS})},
        content={"versions": package_versions(), **files.packed(notes)},
    )
    return Path(directory)


def load_fields(directory: str | Path) -> dict[str, Any]:
    """What a subspace is made of, from both files: they are checked, against each other and for what they say.

    Args:
        directory: Where.

    Returns:
        The fields of a ``SafetySubspace``; tensors on the CPU.

    Raises:
        FileNotFoundError: If a file is not there.
        SubspaceFileError: If they are damaged, do not fit each other, hold no subspace, or come from a newer schema.
    """
    tensors, manifest = _load_checked(directory)
    return {
        **tensors,
        "site": None if manifest["site"] is None else Site.parse(manifest["site"]),
        "modality": manifest["modality"],
        "model": None if manifest["model"] is None else ModelIdentity(**manifest["model"]),
        "diagnostics": manifest["diagnostics"],
        "provenance": manifest["provenance"],
    }


def _load_checked(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors on the CPU, and the manifest."""
    path = Path(directory) / MANIFEST_FILE
    try:
        manifest = files.read_object(path, kind="SafetySubspace")
        if manifest.get("kind") != _KIND:
            raise SubspaceFileError(f"{path} must be the manifest of a SafetySubspace; load it with its own class")
        if manifest.get("schema") in (1, 2) and "files" not in manifest:
            data, manifest = _older(manifest, path)
        else:
            data, manifest = files.load_artifact(directory, "subspace", kind=_KIND, schema=SCHEMA, oldest=3)
            manifest = files.unpacked(manifest)
        tensors = files.tensors_of(data, where=path.with_name(TENSORS_FILE))
    except SubspaceFileError:
        raise
    except ArtifactError as error:
        raise SubspaceFileError(str(error)) from None
    if missing := [key for key in _KEYS if key not in manifest]:
        raise SubspaceFileError(f"{path} must have {missing}; save the subspace again")
    if "tensors" in manifest:
        told = manifest["tensors"]
        if told != {name: _fingerprint(tensor) for name, tensor in tensors.items()}:
            raise SubspaceFileError(
                f"{path.with_name(TENSORS_FILE)} must hold the tensors as the manifest describes them; copy both again"
            )
    if set(tensors) != set(TENSORS):
        raise SubspaceFileError(
            f"{path.with_name(TENSORS_FILE)} must hold {sorted(TENSORS)}, got {sorted(tensors)}; copy both files again"
        )
    notes = manifest["diagnostics"] if isinstance(manifest["diagnostics"], dict) else {}
    # A fit says of how many rows it is; a union, an intersection and what is made by hand do not.
    fitted = "n_benign" in notes and "operation" not in notes
    check_tensors(tensors, where=str(path.with_name(TENSORS_FILE)), projection=notes.get("projection"), fitted=fitted)
    check_notes(manifest, tensors, where=str(path))
    return tensors, manifest


def _older(manifest: dict[str, Any], path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The tensor file and the manifest of schema 1 or 2, checked and brought up to date."""
    schema = manifest["schema"]
    if type(schema) is not int or (schema == 1) == (_OWN in manifest) or "sha256" not in manifest:
        raise SubspaceFileError(f"{path} must be as schema {schema!r} was written, got other keys; copy it again")
    if schema == 2 and manifest.get(_OWN) != _manifest_sum(manifest):
        raise SubspaceFileError(f"{path} must be as it was written, but its checksum differs; copy it again")
    data = path.with_name(TENSORS_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise SubspaceFileError(
            f"{path.with_name(TENSORS_FILE)} must be the file its manifest describes, but its checksum differs; "
            "copy both files again"
        )
    if schema == 1:
        files.warn_unsummed(path)
    for version in range(schema, SCHEMA):
        manifest = {**_MIGRATIONS[version](manifest), "schema": version + 1}
    return {"safetensors": data}, manifest


def _name_no_model(manifest: dict[str, Any]) -> dict[str, Any]:
    """1 to 2: the model is not known. Notes in the provenance may name one, but nothing said what they mean."""
    return {**manifest, "model": None}


def _keep_sums(manifest: dict[str, Any]) -> dict[str, Any]:
    """2 to 3: the same content; the sums have been checked as they were written."""
    return manifest


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _name_no_model, 2: _keep_sums}
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
