"""The one face of the eigensolvers: choice of solver, rank limit, residuals, signs."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.errors import ConvergenceError, RankError, SubspaceError, WidthError
from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _cost, _dense, _dual, _householder, _iterative

Solver = Literal["auto", "dense", "dual", "iterative"]

_SOLVERS = {"dense": _dense.solve, "dual": _dual.solve, "iterative": _iterative.solve}

logger = logging.getLogger(__name__)

_EPS = torch.finfo(torch.float64).eps
_LARGEST_RESIDUAL = 1e-11


@dataclass(frozen=True, eq=False)
class PencilSolution(ShortRepr):
    """Leading eigenpairs of ``C_m u = lambda C_b u``.

    Attributes:
        eigenvalues: [k] descending, float64.
        vectors: [d, k] float64, ``U^T C_b U = I``; each column's entry of largest magnitude is positive.
        solver: "dense", "dual" or "iterative": which one it was.
        order: Order of the eigenproblem that was solved.
        condition: LAPACK's estimate of the 1-norm condition of C_b (in the dual solver: of its restriction; in the
            iterative one with few benign rows and a diagonal target: a bound).
        residual: Largest backward error ``||C_m u - lambda C_b u|| / ((||C_m|| + lambda ||C_b||) ||u||)`` of the
            pairs; the two norms are taken over the vectors found, so it errs on the large side.
        residuals: [k] that error of each pair.
    """

    eigenvalues: Float[Tensor, "k"]
    vectors: Float[Tensor, "d k"]
    solver: str
    order: int
    condition: float
    residual: float
    residuals: Float[Tensor, "k"]


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
        malicious: C_m, positive semi-definite. On another device than the CPU, or in another dtype than float64, it is
            moved; so is C_b.
        benign: C_b, positive definite.
        rank: Number of eigenpairs k.
        solver: "dual" works at order N_b + N_m, "dense" at order d, "iterative" by products at order d. "auto" takes the
            one that multiplies least, and the solution says which; if that is "iterative" and does not converge, it
            takes "dense" after all.
        clip: Return fewer pairs, rather than raise, where the rows determine fewer.

    Returns:
        The eigenpairs, with how they were found.

    Raises:
        RankError: If k is larger than the rows determine; its ``largest`` says how many they do.
        SingularCovarianceError: If C_b is singular at working precision.
        WidthError: If the two differ in width.
        ConvergenceError: If "iterative" was asked for and did not get there.
        SubspaceError: If the solver is not known, or is "dual" without rows or with a diagonal target.

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
    if solver not in get_args(Solver):
        raise SubspaceError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
    malicious, benign = malicious.cpu(), benign.cpu()
    chosen = _cost.cheapest(malicious, benign, rank) if solver == "auto" else solver
    try:
        found = _attempt(_SOLVERS[chosen], malicious, benign, rank)
    except ConvergenceError as error:
        if solver != "auto":
            raise
        logger.info("%s; solver='auto' goes on with 'dense'", error)
        chosen = "dense"
        found = _attempt(_dense.solve, malicious, benign, rank)
    if chosen == "dual" and found.largest > _LARGEST_RESIDUAL:
        # Eigenvalues close to the floor lose digits in Gram matrices, which only the answer shows.
        found = _attempt(_householder.solve, malicious, benign, rank)
    logger.debug("solver %s at order %d for rank %d of width %d", chosen, found.order, rank, benign.width)
    values, vectors = found.values, found.vectors
    allowed = _largest_rank(malicious, benign, values, rank)
    if allowed < rank and not clip:
        raise RankError(
            f"rank must be at most {allowed} for these rows, got {rank}; beyond that no direction is "
            f"preferred to another (malicious shrinkage weight {malicious.weight:.3g}): ask for less, or "
            "give more malicious rows",
            largest=allowed,
        )
    values, vectors, residuals = values[:allowed].clone(), signed(vectors[:, :allowed]), found.residuals[:allowed]
    largest = float(residuals.max()) if len(residuals) else 0.0
    return PencilSolution(values, vectors, chosen, found.order, found.condition, largest, residuals)


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What a solver found, with the backward error of each pair."""

    values: Tensor
    vectors: Tensor
    condition: float
    order: int
    residuals: Tensor

    @property
    def largest(self) -> float:
        return float(self.residuals.max()) if len(self.residuals) else 0.0


def _attempt(
    solve: Callable[[ShrunkCovariance, ShrunkCovariance, int], _dense.Pairs],
    malicious: ShrunkCovariance,
    benign: ShrunkCovariance,
    rank: int,
) -> _Attempt:
    values, vectors, condition, order = solve(malicious, benign, rank)
    products = malicious.times(vectors), benign.times(vectors)
    if solve is not _dense.solve:
        values, vectors, products = _refined(vectors, *products)
    return _Attempt(values, vectors, condition, order, _residuals(*products, values, vectors.norm(dim=0)))


def signed(vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
    """Turn each column so that its entry of largest magnitude is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _refined(vectors: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """One Rayleigh-Ritz step at full width, from ``left = C_m U`` and ``right = C_b U``.

    Makes ``U^T C_b U = I`` and the eigenvalues exact to second order; the products are turned along.
    """
    projected = [vectors.T @ product for product in (left, right)]
    if not vectors.shape[1]:
        return vectors.new_zeros(0), vectors, (left, right)
    ascending, found = eigh(*(((part + part.T) / 2).numpy() for part in projected), check_finite=False)
    turn = torch.from_numpy(found).flip(1)
    return torch.from_numpy(ascending).flip(0), vectors @ turn, (left @ turn, right @ turn)


def _residuals(left: Tensor, right: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """[k] backward errors of pairs with ``left = C_m U`` and ``right = C_b U``."""
    if len(values) == 0:
        return values.clone()
    norms = [float((product.norm(dim=0) / lengths).max()) for product in (left, right)]
    return (left - right * values).norm(dim=0) / ((norms[0] + values.abs() * norms[1]) * lengths)


def _largest_rank(malicious: ShrunkCovariance, benign: ShrunkCovariance, values: Tensor, rank: int) -> int:
    """How many of the leading ``rank`` directions are determined; cheap unless it is fewer than were asked
    for."""
    if malicious.diagonal is not None or benign.diagonal is not None:
        # Without a common floor no eigenspace is degenerate: only what C_m does not reach is undetermined.
        full = malicious.ridge > 0 or malicious.diagonal is not None
        return min(rank, len(values), malicious.width if full else _spanned(malicious))
    above = 0
    if benign.ridge > 0:
        largest = malicious.trace / benign.ridge
        floor = malicious.ridge / benign.ridge
        above = int((values > floor + benign.width * _EPS * max(largest, floor)).sum())
    if above >= rank:
        return rank
    if benign.ridge > 0 and not _fill(benign, malicious):
        return above
    return min(rank, len(values), _spanned(malicious))


def _fill(*covariances: ShrunkCovariance) -> bool:
    """Whether the covariances less their ridges span the space between them."""
    width = covariances[0].width
    columns = sum(width if one.matrix is not None else one.factor.shape[1] for one in covariances)
    return columns >= width and _spanned(*covariances) == width


def _spanned(*covariances: ShrunkCovariance) -> int:
    """Numerical rank of the covariances less their ridges, each scaled to norm 1."""
    factors = [one.factor for one in covariances] + [_root(one.matrix) for one in covariances if one.matrix is not None]
    scaled = [factor / norm for factor in factors if (norm := float(factor.norm())) > 0 and math.isfinite(norm)]
    return int(torch.linalg.matrix_rank(torch.cat(scaled, dim=1))) if scaled else 0


def _root(matrix: Tensor) -> Tensor:
    """A factor of a positive semi-definite matrix, without what is rounding in it."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > len(matrix) * _EPS * values[-1].clamp_min(0)
    return vectors[:, kept] * values[kept].sqrt()
