"""The dual pencil by Householder's QR of the factors: for ill-conditioned C_b, and for more columns than the width.

With ``[F G] = Q R`` (which needs no rank decision: the columns of Q span at least span[F G]) the pencil is solved for
``a I + R_F R_F^T`` and ``c I + R_G R_G^T``, and ``u = Q y``. Q is kept as reflectors, and no Gram matrix of the rows is
made: what is factored has the condition of C_b.

Memory O(d (N_b + N_m)), time O(d (N_b + N_m)^2).
"""

import torch

from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _dense
from care_lens.subspace.solvers._dense import Pairs


def solve(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> Pairs:
    """The leading ``min(rank, order)`` eigenpairs whose vectors lie in span[F G]."""
    both = torch.cat([benign.factor, malicious.factor], dim=1)
    width, columns = both.shape
    order, split = min(width, columns), benign.factor.shape[1]
    if order == 0:
        return both.new_zeros(0), both.new_zeros(width, 0), 1.0, 0
    reflectors, tau = torch.geqrf(both)
    triangle = reflectors[:order].triu()
    small = (
        ShrunkCovariance(malicious.ridge, triangle[:, split:], malicious.weight),
        ShrunkCovariance(benign.ridge, triangle[:, :split], benign.weight),
    )
    values, coordinates, condition, small_order = _dense.solve(*small, rank)
    padded = both.new_zeros(width, coordinates.shape[1])
    padded[:order] = coordinates
    return values, torch.ormqr(reflectors[:, :order], tau, padded), condition, small_order
