"""The one face of the eigensolvers: choice of solver, rank limit, residuals, signs."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.errors import RankError, SubspaceError, WidthError
from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _dense, _dual

Solver = Literal["auto", "dense", "dual"]

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class PencilSolution:
    """Leading eigenpairs of ``C_m u = lambda C_b u``.

    Attributes:
        eigenvalues: [k] descending, float64.
        vectors: [d, k] float64, ``U^T C_b U = I``; each column's entry of largest magnitude is positive.
        solver: "dense" or "dual".
        order: Order of the eigenproblem that was solved.
        condition: LAPACK's estimate of the 1-norm condition of C_b (in the dual solver: of its restriction).
        residual: Largest backward error ``||C_m u - lambda C_b u|| / ((||C_m|| + lambda ||C_b||) ||u||)`` of the
            pairs; the two norms are taken over the vectors found, so it errs on the large side.
    """

    eigenvalues: Float[Tensor, "k"]
    vectors: Float[Tensor, "d k"]
    solver: str
    order: int
    condition: float
    residual: float


def solve_pencil(
    malicious: ShrunkCovariance,
    benign: ShrunkCovariance,
    *,
    rank: int,
    solver: Solver = "auto",
    clip: bool = False,
) -> PencilSolution:
    """Solve ``C_m u = lambda C_b u`` for the largest eigenvalues.

    Args:
        malicious: C_m, positive semi-definite.
        benign: C_b, positive definite.
        rank: Number of eigenpairs k.
        solver: "dual" works at order N_b + N_m, "dense" at order d; "auto" takes the smaller.
        clip: Return fewer pairs, rather than raise, where the rows determine fewer.

    Returns:
        The eigenpairs, with how they were found.

    Raises:
        RankError: If k is larger than the rows determine; its ``largest`` says how many they do.
        SingularCovarianceError: If C_b is singular at working precision.
        WidthError: If the two differ in width.
        SubspaceError: If the solver is not known.

    Notes:
        With ``C_b = a I + F F^T`` and ``C_m = c I + G G^T`` we have
        ``C_m - (c/a) C_b = G G^T - (c/a) F F^T``, so by Sylvester's law at most rank(G) eigenvalues exceed
        c/a. Where the rows do not span the space, all of their complement is one eigenspace of c/a and no
        direction in it is preferred to another: what may be asked for ends there. Where they do span it, it
        ends at rank(G).

    Example:
        >>> import torch
        >>> eye = torch.eye(3, dtype=torch.float64)
        >>> malicious = ShrunkCovariance(0.5, 2 * eye[:, :1])
        >>> solve_pencil(malicious, ShrunkCovariance.identity(3), rank=1).eigenvalues
        tensor([4.5000], dtype=torch.float64)
    """
    if malicious.width != benign.width:
        raise WidthError(f"malicious and benign must be equally wide, got {malicious.width} and {benign.width}")
    if isinstance(rank, bool) or rank < 1:
        raise RankError(f"rank must be 1 or more, got {rank!r}", largest=malicious.width)
    if solver not in ("auto", "dense", "dual"):
        raise SubspaceError(f"solver must be 'auto', 'dense' or 'dual', got {solver!r}")
    columns = benign.factor.shape[1] + malicious.factor.shape[1]
    chosen = ("dual" if columns < benign.width else "dense") if solver == "auto" else solver
    values, vectors, condition, order = {"dense": _dense, "dual": _dual}[chosen].solve(malicious, benign, rank)
    allowed = _largest_rank(malicious, benign, values, rank)
    if allowed < rank and not clip:
        raise RankError(
            f"rank must be at most {allowed} for these rows, got {rank}; beyond that no direction is "
            f"preferred to another (malicious shrinkage weight {malicious.weight:.3g}): ask for less, or "
            "give more malicious rows",
            largest=allowed,
        )
    values, vectors = values[:allowed].clone(), signed(vectors[:, :allowed])
    residual = _residual(malicious.times(vectors), benign.times(vectors), values, vectors.norm(dim=0))
    return PencilSolution(values, vectors, chosen, order, condition, residual)


def signed(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Turn each column so that its entry of largest magnitude is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _residual(left: Tensor, right: Tensor, values: Tensor, lengths: Tensor) -> float:
    """Largest backward error of pairs with ``left = C_m U`` and ``right = C_b U``."""
    if len(values) == 0:
        return 0.0
    norms = [float((product.norm(dim=0) / lengths).max()) for product in (left, right)]
    return float(((left - right * values).norm(dim=0) / ((norms[0] + values * norms[1]) * lengths)).max())


def _largest_rank(malicious: ShrunkCovariance, benign: ShrunkCovariance, values: Tensor, rank: int) -> int:
    """How many of the leading ``rank`` directions are determined; cheap unless it is fewer than were asked
    for."""
    above = 0
    if benign.ridge > 0:
        largest = (malicious.ridge + float(malicious.factor.square().sum())) / benign.ridge
        floor = malicious.ridge / benign.ridge
        above = int((values > floor + benign.width * _EPS * max(largest, floor)).sum())
    if above >= rank:
        return rank
    if benign.ridge > 0 and _spanned(benign.factor, malicious.factor) < benign.width:
        return above
    return min(rank, len(values), _spanned(malicious.factor))


def _spanned(*factors: Tensor) -> int:
    """Numerical rank of the factors side by side, each scaled to norm 1."""
    scaled = [factor / norm for factor in factors if (norm := float(factor.norm())) > 0 and math.isfinite(norm)]
    return int(torch.linalg.matrix_rank(torch.cat(scaled, dim=1))) if scaled else 0
