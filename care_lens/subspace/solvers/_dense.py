"""The pencil as it stands: Cholesky whitening and a symmetric eigenproblem of order d.

Memory O(d^2), time O(d^3). Where C_m has no ridge its factor's whitened singular vectors give the same answer
at the factor's width instead (for one direction this is ``C_b^-1 delta``).
"""

import torch
from jaxtyping import Float
from scipy.linalg import get_lapack_funcs
from torch import Tensor

from care_lens.subspace.errors import SingularCovarianceError
from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _symmetric

Pairs = tuple[Float[Tensor, "k"], Float[Tensor, "d k"], float, int]
"""Eigenvalues descending, vectors with ``U^T C_b U = I``, condition of C_b, order of the eigenproblem."""


def solve(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> Pairs:
    """The leading ``min(rank, order)`` eigenpairs."""
    lower, condition = cholesky(benign.dense(), weight=benign.weight)
    if malicious.ridge == 0 and malicious.of_low_rank:
        whitened = torch.linalg.solve_triangular(lower, malicious.factor, upper=False)
        left, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
        values, whitened_vectors, order = singular[:rank].square(), left[:, :rank], malicious.factor.shape[1]
    else:
        half = torch.linalg.solve_triangular(lower, malicious.dense(), upper=False)
        whole = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
        order = malicious.width
        values, whitened_vectors = _symmetric.leading((whole + whole.T) / 2, rank)
    return values, torch.linalg.solve_triangular(lower.T, whitened_vectors, upper=True), condition, order


def cholesky(matrix: Float[Tensor, "n n"], *, weight: float) -> tuple[Float[Tensor, "n n"], float]:
    """The lower Cholesky factor and LAPACK's estimate of the condition number in the 1-norm.

    Args:
        matrix: [n, n] symmetric.
        weight: Shrinkage weight that led to it, for the message.

    Returns:
        The factor and the condition.

    Raises:
        SingularCovarianceError: If the matrix is singular at working precision.
    """
    lower, failed = torch.linalg.cholesky_ex(matrix)
    (pocon,) = get_lapack_funcs(("pocon",), dtype="float64")
    norm = float(matrix.abs().sum(dim=0).max())
    reciprocal = 0.0 if int(failed) else float(pocon(lower.T.numpy(), norm, uplo="U")[0])
    if not reciprocal > len(matrix) * torch.finfo(torch.float64).eps:
        raise singular(reciprocal, len(matrix), weight)
    return lower, 1 / reciprocal


def singular(reciprocal: float, order: int, weight: float) -> SingularCovarianceError:
    """The error for a benign covariance that cannot be inverted."""
    return SingularCovarianceError(
        f"benign covariance must be invertible, got reciprocal condition {reciprocal:.1e} at order "
        f"{order} with shrinkage weight {weight:.3g}; give more varied rows, or a larger "
        "shrinkage, e.g. shrinkage=0.1"
    )
