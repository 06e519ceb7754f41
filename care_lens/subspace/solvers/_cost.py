"""What each solver would multiply, so that "auto" can take the one with least."""

import torch

from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _krylov

_PRODUCTS = 30
"""Blocks that Lanczos multiplies until it has converged, as a rule of thumb."""


def cheapest(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> str:
    """The name of the solver with the fewest multiplications among those that can take this pencil."""
    costs = multiplications(malicious, benign, rank)
    return min(costs, key=lambda name: costs[name])


def multiplications(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> dict[str, float]:
    """Rough number of multiplications by solver, in the order of preference where they are equal.

    Only leading terms count, and only those solvers are listed that can take the pencil: "dual" needs ridges and
    factors with fewer columns than the width between them; "iterative" is not offered where k is no small part of d.
    """
    width = benign.width
    columns = [one.factor.shape[1] for one in (benign, malicious)]
    costs: dict[str, float] = {}
    if benign.of_low_rank and malicious.of_low_rank and sum(columns) < width:
        costs["dual"] = width * sum(columns) ** 2 + 3 * sum(columns) ** 3
    costs["dense"] = width**2 * sum(columns) + 4 * width**3
    if _krylov.worthwhile(width, rank):
        vectors = _PRODUCTS * _krylov.block_size(rank)
        # Products with the triangle or factor of C_b and with C_m, and keeping the vectors orthogonal.
        whitening = 4 * columns[0] if benign.of_few_columns else width
        numerator = width if malicious.matrix is not None else 2 * columns[1]
        start = width * columns[0] ** 2 if benign.of_few_columns else width**2 * columns[0] + width**3 / 3
        costs["iterative"] = start + vectors * width * (whitening + numerator + 40 * _krylov.block_size(rank))
    return {name: float(cost) for name, cost in costs.items()}


def solver_workspace(
    width: int, benign: int | None, malicious: int | None, *, rank: int, solver: str
) -> tuple[str, int]:
    """The solver that will be taken, and about how many bytes it needs beside the moments.

    Args:
        width: d.
        benign: Number of benign rows; None where only their sums were kept.
        malicious: Likewise.
        rank: Number of directions.
        solver: "auto" or a solver.

    Returns:
        Its name and bytes: the factors or matrices of the covariances, what is factored, and the vectors.
    """
    shapes = [_shape(width, count) for count in (benign, malicious)]
    chosen = cheapest(shapes[1], shapes[0], rank) if solver == "auto" else solver
    columns = [count or 0 for count in (benign, malicious)]
    factors = 8 * width * sum(columns) + 8 * width**2 * (benign, malicious).count(None)
    block = _krylov.block_size(rank)
    if chosen == "dual":
        order = min(sum(columns), width)
        return chosen, factors + 8 * (width * max(columns) + 4 * order**2 + 6 * width * rank)
    if chosen == "dense":
        return chosen, factors + 8 * (6 * width**2 + 4 * width * rank)
    inverse = 2 * width * columns[0] if shapes[0].of_few_columns else 2 * width**2
    return chosen, factors + 8 * (inverse + 3 * _krylov.BLOCKS * block * width)


def _shape(width: int, count: int | None) -> ShrunkCovariance:
    """A covariance that has the form of one with so many rows, and holds nothing."""
    nothing = torch.empty((), dtype=torch.float64)
    if count is None:
        return ShrunkCovariance(1.0, nothing.expand(width, 0), matrix=nothing.expand(width, width))
    return ShrunkCovariance(1.0, nothing.expand(width, count))
