"""Leading directions of a pencil with diagonal targets and few rows, good enough to choose a rank by: Rayleigh-Ritz.

With ``C_b = D_b + F F^T`` and ``C_m = D_m + G G^T``, in the coordinates ``v = D_b^1/2 u`` the pencil is ``(L + G' G'^T) v = lambda (I +
F' F'^T) v`` with ``L = D_m / D_b``. Where L is a multiple of the identity its vectors lie in span[F' G']; here they nearly do, or along
the axes where L is largest. The pencil is projected on both, and on one product of what comes out (Parlett 1980, "The Symmetric
Eigenvalue Problem", chapter 11). The values found are never above the exact ones. Time O(d (N_b + N_m)^2) where LAPACK takes O(d^3).
"""

import torch
from torch import Tensor

from care_lens.subspace.shrinkage import ShrunkCovariance
from care_lens.subspace.solvers import _symmetric

_AXES = 16
_JITTER = 1e-10
"""Added to the metric of columns of length 1."""


def serves(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> bool:
    """Whether the pencil has a diagonal target, a metric that its diagonal makes definite, and few enough columns."""
    if benign.matrix is not None or malicious.matrix is not None or benign.diagonal is None:
        return False
    columns = benign.factor.shape[1] + malicious.factor.shape[1]
    return (
        columns + _AXES < benign.width and 2 * rank < benign.width and bool((benign.diagonal + benign.ridge > 0).all())
    )


def leading(malicious: ShrunkCovariance, benign: ShrunkCovariance, rank: int) -> Tensor:
    """[d, k] vectors with ``U^T C_b U = I``, by falling Ritz values; k is at most ``rank``."""
    assert benign.diagonal is not None
    scale = (benign.diagonal + benign.ridge).rsqrt()
    floor = torch.zeros_like(scale) if malicious.diagonal is None else malicious.diagonal
    along = (floor + malicious.ridge) * scale.square()
    ours, theirs = scale[:, None] * benign.factor, scale[:, None] * malicious.factor
    axes = torch.zeros(len(scale), _AXES, dtype=scale.dtype)
    axes[along.topk(_AXES).indices, torch.arange(_AXES)] = 1
    found = _project(torch.cat([ours, theirs, axes], dim=1), ours, theirs, along, rank)
    raised = along[:, None] * found + theirs @ (theirs.T @ found)
    inner = torch.eye(ours.shape[1], dtype=scale.dtype) + ours.T @ ours
    raised = raised - ours @ torch.linalg.solve(inner, ours.T @ raised, left=True)
    found = _project(torch.cat([found, raised], dim=1), ours, theirs, along, rank)
    return scale[:, None] * found


def _project(span: Tensor, ours: Tensor, theirs: Tensor, along: Tensor, rank: int) -> Tensor:
    """The leading Ritz vectors in a span, with unit length in the metric."""
    span = span / span.norm(dim=0).clamp_min(torch.finfo(span.dtype).tiny)
    left, right = span.T @ theirs, span.T @ ours
    numerator = torch.addmm((span.T * along) @ span, left, left.T)
    metric = torch.addmm(span.T @ span, right, right.T)
    metric.diagonal().add_(_JITTER)  # columns that depend on the others get a metric, and no energy
    lower = torch.linalg.cholesky(metric)
    half = torch.linalg.solve_triangular(lower, numerator, upper=False)
    whole = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
    _, found = _symmetric.leading((whole + whole.T) / 2, min(rank, len(whole)))
    found = span @ torch.linalg.solve_triangular(lower.T, found, upper=True)
    return found / (found.square().sum(dim=0) + (ours.T @ found).square().sum(dim=0)).sqrt()
