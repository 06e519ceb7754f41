"""Leading eigenpairs of a symmetric matrix that is there: block Lanczos where that is faster, LAPACK else.

What Lanczos found is kept only if its residuals are small and a Cholesky factorisation proves that nothing was missed:
with the pairs taken out of A, ``sigma I - A`` is positive definite just if no eigenvalue above sigma is left.
"""

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor

from care_lens.subspace.solvers import _krylov

_TOLERANCE = 1e-12
_MARGIN = 1e-9


def leading(matrix: Float[Tensor, "n n"], rank: int) -> tuple[Float[Tensor, "k"], Float[Tensor, "n k"]]:
    """The ``min(rank, n)`` leading eigenvalues, descending, and orthonormal eigenvectors; the matrix may be
    written to."""
    order = matrix.shape[0]
    if _krylov.worthwhile(order, rank):
        found = _krylov.top_pairs(matrix.__matmul__, order, rank, tolerance=_TOLERANCE)
        if found.error <= _TOLERANCE and _complete(matrix, found):
            return found.values, found.vectors
    kept = min(rank, order)
    ascending, vectors = eigh(
        matrix.numpy(), subset_by_index=[order - kept, order - 1], check_finite=False, overwrite_a=False
    )
    return torch.from_numpy(ascending).flip(0), torch.from_numpy(vectors).flip(1)


def _complete(matrix: Tensor, found: _krylov.TopPairs) -> bool:
    """Whether no eigenvalue above the last one found is left."""
    shift = float(found.values[-1]) + _MARGIN * float(found.values.abs().max())
    rest = torch.addmm(matrix, found.vectors * (found.values - found.values[-1]), found.vectors.T, beta=-1)
    rest.diagonal().add_(shift)
    return int(torch.linalg.cholesky_ex(rest).info) == 0
