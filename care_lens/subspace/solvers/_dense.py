"""The pencil as it stands: Cholesky whitening and a symmetric eigenproblem of order d.

Memory O(d^2), time O(d^3). Where C_m has no ridge its factor's whitened singular vectors give the same answer
at the factor's width instead (for one direction this is ``C_b^-1 delta``).
"""

import torch
from jaxtyping import Float
from scipy.linalg import eigh, get_lapack_funcs
from torch import Tensor

from care_lens.subspace.errors import SingularCovarianceError
from care_lens.subspace.shrinkage import ShrunkCovariance

Pairs = tuple[Float[Tensor, "k"], Float[Tensor, "d k"], float, int]
"""Eigenvalues descending, vectors with ``U^T C_b U = I``, condition of C_b, order of the eigenproblem."""


def solve(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> Pairs:
    """The leading ``min(rank, order)`` eigenpairs."""
    lower, condition = _cholesky(benign)
    if malicious.ridge == 0 and malicious.factor.shape[1] < malicious.width:
        whitened = torch.linalg.solve_triangular(lower, malicious.factor, upper=False)
        left, singular, _ = torch.linalg.svd(whitened, full_matrices=False)
        values, whitened_vectors, order = singular[:rank].square(), left[:, :rank], malicious.factor.shape[1]
    else:
        half = torch.linalg.solve_triangular(lower, malicious.dense(), upper=False)
        whole = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
        order, k = malicious.width, min(rank, malicious.width)
        ascending, vectors = eigh(
            ((whole + whole.T) / 2).numpy(),
            subset_by_index=[order - k, order - 1],
            check_finite=False,
            overwrite_a=True,
        )
        values = torch.from_numpy(ascending).flip(0)
        whitened_vectors = torch.from_numpy(vectors).flip(1)
    return values, torch.linalg.solve_triangular(lower.T, whitened_vectors, upper=True), condition, order


def _cholesky(benign: ShrunkCovariance) -> tuple[Tensor, float]:
    """The lower Cholesky factor and LAPACK's estimate of the condition number in the 1-norm."""
    matrix = benign.dense()
    lower, failed = torch.linalg.cholesky_ex(matrix)
    (pocon,) = get_lapack_funcs(("pocon",), dtype="float64")
    norm = float(matrix.abs().sum(dim=0).max())
    reciprocal = 0.0 if int(failed) else float(pocon(lower.T.numpy(), norm, uplo="U")[0])
    if not reciprocal > len(matrix) * torch.finfo(torch.float64).eps:
        raise SingularCovarianceError(
            f"benign covariance must be invertible, got reciprocal condition {reciprocal:.1e} at order "
            f"{len(matrix)} with shrinkage weight {benign.weight:.3g}; give more varied rows, or a larger "
            "shrinkage, e.g. shrinkage=0.1"
        )
    return lower, 1 / reciprocal
