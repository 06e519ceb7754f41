"""Whether tensors and notes are those of a subspace: what a checksum cannot say of a file that was sealed with wrong numbers.

Tolerances are of the dtype that the tensors were kept in, and relative to the lengths of the columns.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from care_lens.core.site import Site
from care_lens.subspace.errors import SubspaceFileError
from care_lens.subspace.model_identity import ModelIdentity

_COLUMNS = ("basis", "read", "write", "left")
_MEANS = ("mean_benign", "mean_malicious")


def check_tensors(
    tensors: Mapping[str, Tensor], *, where: str, projection: str | None = None, fitted: bool = False
) -> None:
    """Refuse tensors that are no subspace's: types, shapes, finiteness, and what holds between them.

    Args:
        tensors: basis, read, write, left [d, k]; eigenvalues [k]; mean_benign, mean_malicious [d].
        where: The file, for the message.
        projection: "oblique", "orthogonal", or None where it is not known.
        fitted: Whether it is a fit, whose eigenvalues are known; those of unions and intersections are not.

    Raises:
        SubspaceFileError: Says which tensor is wrong and how.
    """

    def refuse(name: str, must: str, got: Any) -> None:
        raise SubspaceFileError(f"{name} in {where} must {must}, got {got}; save the subspace again from its fit")

    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            refuse(name, "be of a floating dtype", tensor.dtype)
    basis = tensors["basis"]
    if basis.ndim != 2 or not 1 <= basis.shape[1] <= basis.shape[0]:
        refuse("basis", "be of shape [d, k] with 1 <= k <= d", f"shape {list(basis.shape)}")
    width, rank = basis.shape
    shapes = {name: (width, rank) for name in _COLUMNS} | {name: (width,) for name in _MEANS} | {"eigenvalues": (rank,)}
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            refuse(name, f"be of shape {list(shape)} beside the basis", f"shape {list(tensors[name].shape)}")
    for name in (*_COLUMNS, *_MEANS):
        if not bool(tensors[name].isfinite().all()):
            refuse(name, "be finite", "NaN or infinity")
    values = tensors["eigenvalues"].double()
    if fitted or not bool(values.isnan().all()):
        tolerance = _tolerance(tensors["eigenvalues"]) * float(values.abs().nan_to_num().max())
        if not bool(values.isfinite().all()) or bool((values < -tolerance).any()):
            refuse(
                "eigenvalues",
                f"be numbers of 0 or more{'' if fitted else ', or all NaN where they are not known'}",
                values.tolist(),
            )
        if bool((values.diff() > tolerance).any()):
            refuse("eigenvalues", "fall", values.tolist())
    wide = {name: tensors[name].double().cpu() for name in _COLUMNS}
    for name in _COLUMNS:
        if bool((wide[name].norm(dim=0) == 0).any()):
            refuse(name, "have no column of zeros", "one")
    tolerance = max(_tolerance(tensors[name]) for name in _COLUMNS)
    eye = torch.eye(rank, dtype=torch.float64)
    gap = float((wide["basis"].T @ wide["basis"] - eye).abs().max())
    if not gap <= tolerance:
        refuse("basis", "have orthonormal columns", f"inner products off by {gap:.2g}")
    lengths = wide["left"].norm(dim=0)[:, None] * wide["write"].norm(dim=0)[None]
    gap = float(((wide["left"].T @ wide["write"] - eye).abs() / lengths.clamp(min=1)).max())
    if not gap <= tolerance:
        refuse("left and write", "be dual, left.T @ write = I", f"a relative difference of {gap:.2g}")
    for name in ("read", "left"):
        outside = wide[name] - wide["basis"] @ (wide["basis"].T @ wide[name])
        share = float((outside.norm(dim=0) / wide[name].norm(dim=0)).max())
        if not share <= tolerance:
            refuse(name, "lie in the span of the basis", f"a share of {share:.2g} outside")
    if projection == "oblique" and not _close(wide["left"], wide["read"], tolerance):
        refuse("left", "be read for an oblique projection", "another")
    if projection == "orthogonal" and not _close(wide["write"], wide["left"], tolerance):
        refuse("write", "be left for an orthogonal projection", "another")


def check_notes(notes: Mapping[str, Any], tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse notes of wrong types, and a width or rank that is not the tensors'.

    Raises:
        SubspaceFileError: Says which.
    """

    def refuse(name: str, must: str) -> None:
        raise SubspaceFileError(f"{name} in {where} must be {must}, got {notes[name]!r}; save the subspace again")

    width, rank = tensors["basis"].shape
    if [notes["width"], notes["rank"]] != [width, rank]:
        raise SubspaceFileError(
            f"{where} must state the tensors' width {width} and rank {rank}, got {notes['width']!r} and "
            f"{notes['rank']!r}; save the subspace again"
        )
    if notes["site"] is not None:
        try:
            Site.parse(notes["site"])
        except (ValueError, TypeError, AttributeError):
            refuse("site", "the name of a site, or null")
    if notes["modality"] not in (None, "visual", "textual"):
        refuse("modality", "'visual', 'textual' or null")
    model, known = notes["model"], {field.name for field in fields(ModelIdentity)}
    if model is not None and not (
        isinstance(model, dict)
        and "name" in model
        and {*model} <= known
        and all(isinstance(value, str) or (value is None and key != "name") for key, value in model.items())
    ):
        refuse("model", f"an object of texts with {sorted(known)}, or null")
    for name in ("diagnostics", "provenance"):
        if not isinstance(notes[name], dict):
            refuse(name, "an object")


def _tolerance(tensor: Tensor) -> float:
    """Rounding of columns of that dtype; float32 fits are good to a few 1e-6."""
    return max(1e-4, 8 * torch.finfo(tensor.dtype).eps)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool(((one - other).norm(dim=0) <= tolerance * other.norm(dim=0)).all())
