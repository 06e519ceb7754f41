"""Equality, union, intersection and leading part of subspaces.

The span of a union is that of all columns; an intersection keeps the principal vectors that the two nearly
share (the midpoint of a pair whose cosine is high enough), since two fits never share a direction exactly
(Bjorck and Golub 1973, "Numerical methods for computing angles between linear subspaces").

Two oblique subspaces fitted on the same benign rows know ``C_b u`` for every u in their spans, namely
``write``; ``read`` and ``write`` of the result are then exact in that metric. Otherwise no common benign
metric is known: the result projects orthogonally, and its ``read`` is its basis, in the activations' units.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from care_lens.subspace.errors import RankError, SubspaceError, SubspaceMismatchError

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace

_SAME_SPAN = 1e-5
"""Singular values of float32 bases side by side that are below this share of the largest are rounding."""
_SAME_METRIC = 1e-3
"""Relative difference up to which two float32 fits are taken to agree about C_b."""


def union_span(first: Tensor, second: Tensor) -> Tensor:
    """[d, k] orthonormal columns that span both of two orthonormal bases."""
    vectors, values, _ = torch.linalg.svd(torch.cat([first, second], dim=1), full_matrices=False)
    return vectors[:, values > _SAME_SPAN * values[0]]


def shared_span(first: Tensor, second: Tensor, least_cosine: float) -> tuple[Tensor, Tensor]:
    """[d, k] orthonormal midpoints of the principal pairs of cosine ``least_cosine`` or more, and the [k] cosines."""
    left, cosines, right = torch.linalg.svd(first.T @ second, full_matrices=False)
    kept = cosines >= least_cosine
    midpoints = first @ left[:, kept] + second @ right.T[:, kept]
    return torch.linalg.qr(midpoints).Q, cosines[kept].clamp(max=1)


def shared_metric(reads: Tensor, writes: Tensor) -> Tensor | None:
    """[k1+k2, k1+k2] ``R^T C_b R`` of the columns of both, if ``W = C_b R`` for one C_b; None if not."""
    gram = reads.T @ writes
    difference = (gram - gram.T).norm()
    return (gram + gram.T) / 2 if bool(difference <= _SAME_METRIC * gram.norm()) else None


def oblique_tensors(basis: Tensor, reads: Tensor, writes: Tensor, gram: Tensor) -> dict[str, Tensor]:
    """``read``, ``write`` and ``left`` of a span within that of ``reads``, in their common metric."""
    within = torch.linalg.lstsq(reads, basis, driver="gelsd").solution
    triangle = torch.linalg.cholesky(within.T @ gram @ within)
    columns = torch.linalg.solve_triangular(triangle, within.T, upper=False).T
    read, write = reads @ columns, writes @ columns
    return {"read": read, "write": torch.linalg.solve(read.T @ write, write, left=False), "left": read}


def equal(one: "SafetySubspace", other: "SafetySubspace", tolerance: float) -> bool:
    """See ``SafetySubspace.equals``."""
    if (one.site, one.modality, one.width, one.rank) != (other.site, other.modality, other.width, other.rank):
        return False
    mine, theirs = _wide(one), _wide(other)
    for name in ("mean_benign", "mean_malicious"):
        if not float((mine[name] - theirs[name]).norm()) <= tolerance * float(mine[name].norm()):
            return False
    return all(
        _outer_distance(mine[a], mine[b], theirs[a], theirs[b]) <= tolerance * _outer_norm(mine[a], mine[b])
        for a, b in (("write", "left"), ("read", "read"))
    )


def union(one: "SafetySubspace", other: "SafetySubspace") -> "SafetySubspace":
    """See ``SafetySubspace.union``."""
    _check_same_place(one, other)
    return _combined(one, other, union_span(_wide(one)["basis"], _wide(other)["basis"]), "union", {})


def intersect(one: "SafetySubspace", other: "SafetySubspace", least_cosine: float) -> "SafetySubspace":
    """See ``SafetySubspace.intersect``."""
    if not 0 < least_cosine <= 1:
        raise SubspaceError(f"least_cosine must be in (0, 1], got {least_cosine!r}")
    _check_same_place(one, other)
    # float32 bases know the cosine of equal directions to 1e-7.
    span, cosines = shared_span(_wide(one)["basis"], _wide(other)["basis"], least_cosine - 1e-6)
    if span.shape[1] == 0:
        raise RankError(
            f"the subspaces must share a direction of cosine {least_cosine} or more, got at most "
            f"{float(one.compare(other).cosines.max()):.3g}; lower least_cosine",
            largest=0,
        )
    return _combined(one, other, span, "intersection", {"cosines": cosines.tolist(), "least_cosine": least_cosine})


def leading(subspace: "SafetySubspace", rank: int) -> "SafetySubspace":
    """See ``SafetySubspace.truncate``."""
    if not bool(subspace.eigenvalues.isfinite().all()):
        raise SubspaceError(
            "a subspace must have eigenvalues to be truncated, got one made by "
            f"{subspace.diagnostics.get('operation', 'hand')}, whose directions are in no order; truncate what it was made of"
        )
    if not 1 <= rank <= subspace.rank:
        raise RankError(
            f"rank must be between 1 and {subspace.rank}, got {rank}; fit again for more", largest=subspace.rank
        )
    columns = {name: getattr(subspace, name)[:, :rank].clone() for name in ("basis", "read", "write", "left")}
    return dataclasses.replace(subspace, **columns, eigenvalues=subspace.eigenvalues[:rank].clone())


def _wide(subspace: "SafetySubspace") -> dict[str, Tensor]:
    names = ("basis", "read", "write", "left", "mean_benign", "mean_malicious")
    return {name: getattr(subspace, name).double().cpu() for name in names}


def _check_same_place(one: "SafetySubspace", other: "SafetySubspace") -> None:
    one.check(width=other.width)
    if one.site != other.site:
        raise SubspaceMismatchError(
            f"subspaces must be of one site to be combined, got {one.site} and {other.site}; a sum of directions "
            "of two places is a direction of neither"
        )


def _combined(
    one: "SafetySubspace", other: "SafetySubspace", basis: Tensor, operation: str, notes: Mapping[str, Any]
) -> "SafetySubspace":
    """A subspace of the span given, within that of the two."""
    mine, theirs = _wide(one), _wide(other)
    oblique = all(of.diagnostics.get("projection") == "oblique" for of in (one, other))
    benign_metric = all(of.diagnostics.get("metric") == "benign" for of in (one, other))
    reads, writes = (torch.cat([mine[name], theirs[name]], dim=1) for name in ("read", "write"))
    gram = shared_metric(reads, writes) if oblique and benign_metric else None
    tensors = {"read": basis, "write": basis, "left": basis}
    if gram is not None:
        tensors = oblique_tensors(basis, reads, writes, gram)
    alike = torch.allclose(mine["mean_benign"], theirs["mean_benign"], rtol=1e-5, atol=1e-6)
    made = {
        "basis": basis,
        **tensors,
        "mean_benign": mine["mean_benign"] if alike else (mine["mean_benign"] + theirs["mean_benign"]) / 2,
        "mean_malicious": (mine["mean_malicious"] + theirs["mean_malicious"]) / 2,
        "eigenvalues": torch.full((basis.shape[1],), torch.nan),
    }
    diagnostics = {
        "operation": operation,
        "projection": "orthogonal" if gram is None else "oblique",
        "metric": "identity" if gram is None else "benign",
        "of": [one.diagnostics, other.diagnostics],
        **notes,
    }
    return dataclasses.replace(
        one,
        **{name: tensor.to(getattr(one, name)).contiguous() for name, tensor in made.items()},
        modality=one.modality if one.modality == other.modality else None,
        model=one.model if one.model == other.model else None,
        diagnostics=diagnostics,
        provenance={"of": [one.provenance, other.provenance]},
    )


def _outer_norm(write: Tensor, left: Tensor) -> float:
    """Frobenius norm of ``write left^T``, at O(d k^2)."""
    return float(((write.T @ write) * (left.T @ left)).sum().clamp(min=0).sqrt())


def _outer_distance(write: Tensor, left: Tensor, other_write: Tensor, other_left: Tensor) -> float:
    """Frobenius norm of ``W L^T - V K^T``, without its cancellation: from the triangular factors of both sides."""
    first = torch.linalg.qr(torch.cat([write, -other_write], dim=1)).R
    second = torch.linalg.qr(torch.cat([left, other_left], dim=1)).R
    return float((first @ second.T).norm())
