"""The pencil in coordinates of the rows: order at most N_b + N_m whatever the width.

With ``C_b = a I + F F^T`` and ``C_m = c I + G G^T``, and B = [F G], J = diag(-c/a for F, 1 for G), the pencil less c/a
is ``B J B^T u = mu C_b u`` with mu = lambda - c/a. So ``u = C_b^-1 B z`` with ``J S z = mu z``, S = B^T C_b^-1 B, and
with ``S = L L^T`` it is the symmetric eigenproblem ``L^T J L w = mu w``, z = J L w. Woodbury's identity gives S from the
Gram matrices of the rows and one Cholesky factorisation, of ``a I + F^T F``, at order N_b; no Gram matrix is inverted,
and rows that depend on each other do no harm.

What is lost is the condition of C_b in relative error, as in any Cholesky whitening; where that is large, or the
columns are as many as the width, ``_householder`` takes over, which is slower and loses less.

Memory O(d (N_b + N_m)), time O(d (N_b + N_m)^2).
"""

import torch
from scipy.linalg import get_blas_funcs
from torch import Tensor

from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _dense, _householder, _symmetric
from care_lens.subspace.solvers._dense import Pairs

_LARGEST_CONDITION = 1e7
_EPS = torch.finfo(torch.float64).eps


def solve(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> Pairs:
    """The leading ``min(rank, order)`` eigenpairs whose vectors lie in span[F G].

    Raises:
        SubspaceError: If a covariance is not a ridge and a factor.
        SingularCovarianceError: If C_b is singular at working precision.
    """
    for name, one in (("malicious", malicious), ("benign", benign)):
        if one.matrix is not None or one.diagonal is not None:
            what = "the sums of its rows alone" if one.matrix is not None else "a diagonal target"
            raise SubspaceError(
                f"solver='dual' needs rows and the identity as target, got {what} for the {name} class; take "
                "solver='auto', 'dense' or 'iterative'"
            )
    columns = malicious.factor.shape[1] + benign.factor.shape[1]
    if columns and columns < benign.width and benign.ridge > 0:
        found = _from_grams(malicious, benign, rank)
        if found is not None:
            return found
    return _householder.solve(malicious, benign, rank)


def _from_grams(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> Pairs | None:
    """None where the condition of C_b asks for the slower way."""
    a, ratio = benign.ridge, malicious.ridge / benign.ridge
    ours, theirs = benign.factor, malicious.factor
    gram = _gram(ours)
    capacitance = gram.clone()
    capacitance.diagonal().add_(a)
    if len(gram):
        lower, condition = _dense.cholesky(capacitance, weight=benign.weight)
    else:
        lower, condition = capacitance, 1.0
    if condition > _LARGEST_CONDITION:
        return None
    overlap = ours.T @ theirs
    half = torch.linalg.solve_triangular(lower, overlap, upper=False)
    inner = _inner_products(gram, lower, half, theirs, a)
    factor, failed = torch.linalg.cholesky_ex(inner)
    if int(failed):
        return None
    split = len(gram)
    below = factor[split:]
    matrix = below.T @ below
    if ratio:
        # L is lower triangular: the rows of F fill the first columns only.
        first = factor[:split, :split]
        matrix[:split, :split] -= ratio * (first.T @ first)
    values, weights = _symmetric.leading(matrix, rank)
    # What is not above c/a has no vector in the span that could be told from rounding.
    above = values > benign.width * _EPS * max(malicious.trace / a, ratio)
    values, weights = values[above], factor @ weights[:, above]
    if split:
        weights[:split] *= -ratio
    mixed = theirs @ weights[split:]
    if split:
        # C_b^-1 [F G] z, where C_b^-1 F z_F = F (a I + F^T F)^-1 z_F.
        inverse = torch.cholesky_solve(a * weights[:split] - ours.T @ mixed, lower)
        mixed = mixed + ours @ inverse
    # Lengths are set by the Rayleigh-Ritz step at full width that every answer but the dense one goes through.
    return values + ratio, mixed / mixed.norm(dim=0), condition, len(matrix)


def _gram(factor: Tensor) -> Tensor:
    """``F^T F`` with half the multiplications of a product."""
    if factor.shape[1] == 0:
        return factor.new_zeros(0, 0)
    (syrk,) = get_blas_funcs(("syrk",), dtype="float64")
    half = torch.from_numpy(syrk(1.0, factor.T.contiguous().numpy().T, trans=1))
    return half.triu(1).T + half.triu()


def _inner_products(gram: Tensor, lower: Tensor, half: Tensor, theirs: Tensor, a: float) -> Tensor:
    """``[F G]^T C_b^-1 [F G]``, made definite by what rounding leaves uncertain anyway."""
    split, size = len(gram), len(gram) + theirs.shape[1]
    inner = gram.new_empty(size, size)
    if split:
        inner[:split, :split] = torch.cholesky_solve(gram, lower)
        inner[split:, :split] = torch.linalg.solve_triangular(lower.T, half, upper=True).T
        inner[:split, split:] = inner[split:, :split].T
    own = _gram(theirs)
    largest = float(own.diagonal().max()) if len(own) else 0.0
    inner[split:, split:] = (own - half.T @ half) / a
    diagonal = inner.diagonal()
    diagonal[:split] += size * _EPS
    diagonal[split:] += size * _EPS * largest / a
    return inner
