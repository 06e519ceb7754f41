"""Shrinkage of covariances towards a multiple of the identity.

``C' = (1 - s) C + s tr(C)/d I``, kept as a ridge and a factor: ``C' = ridge I + factor factor^T``. The weight
s is given, or estimated by Ledoit and Wolf (2004, "A well-conditioned estimator for large-dimensional
covariance matrices") or by Chen et al. (2010, "Shrinkage algorithms for MMSE covariance estimation", OAS).
Both agree with scikit-learn's.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.moments import Moments

Shrinkage: TypeAlias = Literal["ledoit-wolf", "oas"] | float | int | None
"""A rule, a weight in [0, 1], or None for no shrinkage."""


@dataclass(frozen=True, eq=False)
class ShrunkCovariance:
    """``ridge I + factor factor^T``, never formed unless asked for.

    Attributes:
        ridge: Variance that every direction has at least.
        factor: [d, r] float64; r may be 0.
        weight: The shrinkage weight s that led to it.
    """

    ridge: float
    factor: Float[Tensor, "d r"]
    weight: float = 0.0

    @property
    def width(self) -> int:
        """Number of rows of the matrix, d."""
        return self.factor.shape[0]

    @classmethod
    def identity(cls, width: int) -> "ShrunkCovariance":
        """The identity of order ``width``."""
        return cls(1.0, torch.zeros(width, 0, dtype=torch.float64))

    def plus(self, direction: Float[Tensor, "d"]) -> "ShrunkCovariance":
        """Add ``direction direction^T``."""
        return ShrunkCovariance(self.ridge, torch.cat([self.factor, direction[:, None]], dim=1), self.weight)

    def times(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """The product with [d, k] columns, in O(d r k)."""
        return self.ridge * vectors + self.factor @ (self.factor.T @ vectors)

    def dense(self) -> Float[Tensor, "d d"]:
        """The [d, d] matrix."""
        matrix = self.factor @ self.factor.T
        matrix.diagonal().add_(self.ridge)
        return matrix


def shrink(moments: Moments, shrinkage: Shrinkage) -> ShrunkCovariance:
    """Shrink the covariance of some rows.

    Args:
        moments: Of the rows.
        shrinkage: "ledoit-wolf", "oas", a weight in [0, 1], or None.

    Returns:
        The shrunk covariance, with its weight.

    Raises:
        SubspaceError: If the shrinkage is none of these.
    """
    weight = shrinkage_weight(moments, shrinkage)
    factor = moments.centred.T * math.sqrt((1 - weight) / moments.count)
    if weight == 1:
        factor = factor[:, :0]
    return ShrunkCovariance(weight * moments.trace / moments.width, factor, weight)


def shrinkage_weight(moments: Moments, shrinkage: Shrinkage) -> float:
    """The weight s of the identity, in [0, 1]; arguments and errors as for :func:`shrink`."""
    if shrinkage is None:
        return 0.0
    if isinstance(shrinkage, str):
        if shrinkage == "ledoit-wolf":
            return _ledoit_wolf(moments)
        if shrinkage == "oas":
            return _oas(moments)
    elif not isinstance(shrinkage, bool) and 0 <= shrinkage <= 1:
        return float(shrinkage)
    raise SubspaceError(f"shrinkage must be 'ledoit-wolf', 'oas', None or in [0, 1], got {shrinkage!r}")


def _ledoit_wolf(moments: Moments) -> float:
    """Error of the sample covariance over its distance from the target, both estimated."""
    distance = moments.squared_norm - moments.trace**2 / moments.width
    error = (moments.fourth - moments.squared_norm) / moments.count
    if moments.width == 1 or error <= 0 or distance <= 0:
        return 0.0
    return min(error / distance, 1.0)


def _oas(moments: Moments) -> float:
    """The fixed point of the oracle's iteration, for Gaussian rows."""
    d = moments.width
    if d == 1:
        return 0.0
    size, scale = moments.squared_norm / d**2, (moments.trace / d) ** 2
    denominator = (moments.count + 1) * (size - scale / d)
    return min((size + scale) / denominator, 1.0) if denominator > 0 else 1.0
