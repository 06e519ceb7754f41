"""Shrinkage of covariances towards a multiple of the identity, or towards their own diagonal.

``C' = (1 - s) C + s T`` with T the target:

- "identity": ``T = tr(C)/d I``. The weight s is given, or estimated by Ledoit and Wolf (2004, "A well-conditioned
  estimator for large-dimensional covariance matrices") or by Chen et al. (2010, "Shrinkage algorithms for MMSE
  covariance estimation", OAS). Both agree with scikit-learn's.
- "diagonal": ``T = diag(C)``. A few massive activations hold most of tr(C), and with the identity as target they raise
  the floor of every other coordinate; here each keeps its own variance. The weight is given, or estimated as Ledoit
  and Wolf do, over the entries off the diagonal (Schaefer and Strimmer 2005, target D, "A shrinkage approach to
  large-scale covariance matrix estimation", with 1/N).

A coordinate that is constant has no variance of its own to keep, and a metric that gives it none cannot be inverted: with the diagonal
as target and ``floor=True`` it is given the median variance of the others, independent of them.

What comes out is kept in parts, ``ridge I + diag(diagonal) + matrix + factor factor^T``, so that nothing d x d is made
for moments that keep their rows. All weights need moments only.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.moments import Moments

Shrinkage: TypeAlias = Literal["ledoit-wolf", "oas", "diagonal"] | float | int | None
"""A rule, a weight in [0, 1], or None for no shrinkage. "diagonal" is its own target, with an estimated weight."""

Target: TypeAlias = Literal["identity", "diagonal"]
"""What a covariance is shrunk towards."""


@dataclass(frozen=True, eq=False)
class ShrunkCovariance(ShortRepr):
    """``ridge I + diag(diagonal) + matrix + factor factor^T``, never formed unless asked for.

    Attributes:
        ridge: Variance that every direction has at least.
        factor: [d, r] float64; r may be 0.
        weight: The shrinkage weight s that led to it.
        diagonal: [d] float64, not negative, or None for zeros.
        matrix: [d, d] float64, symmetric and positive semi-definite, or None for zeros.
    """

    ridge: float
    factor: Float[Tensor, "d r"]
    weight: float = 0.0
    diagonal: Float[Tensor, "d"] | None = None
    matrix: Float[Tensor, "d d"] | None = None

    @property
    def width(self) -> int:
        """Number of rows of the matrix, d."""
        return self.factor.shape[0]

    @property
    def trace(self) -> float:
        """Trace of the matrix."""
        total = self.ridge * self.width + float(self.factor.square().sum())
        total += 0.0 if self.diagonal is None else float(self.diagonal.sum())
        return total + (0.0 if self.matrix is None else float(self.matrix.trace()))

    @property
    def of_few_columns(self) -> bool:
        """Whether it is diagonal up to a factor with at most half as many columns as rows."""
        return self.matrix is None and 2 * self.factor.shape[1] <= self.width

    @property
    def of_low_rank(self) -> bool:
        """Whether it is a ridge and a factor with fewer columns than rows, and nothing else."""
        return self.diagonal is None and self.matrix is None and self.factor.shape[1] < self.width

    @classmethod
    def identity(cls, width: int) -> "ShrunkCovariance":
        """The identity of order ``width``."""
        return cls(1.0, torch.zeros(width, 0, dtype=torch.float64))

    def plus(self, direction: Float[Tensor, "d"]) -> "ShrunkCovariance":
        """Add ``direction direction^T``."""
        return replace(self, factor=torch.cat([self.factor, direction[:, None]], dim=1))

    def times(self, vectors: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """The product with [d, k] columns, in O(d r k), or O(d^2 k) where there is a matrix."""
        product = self.ridge * vectors
        if self.factor.shape[1]:
            product += self.factor @ (self.factor.T @ vectors)
        if self.diagonal is not None:
            product += self.diagonal[:, None] * vectors
        return product if self.matrix is None else product + self.matrix @ vectors

    def dense(self) -> Float[Tensor, "d d"]:
        """The [d, d] matrix, a new one."""
        whole = self.factor @ self.factor.T
        if self.matrix is not None:
            whole += self.matrix
        whole.diagonal().add_(self.ridge if self.diagonal is None else self.diagonal + self.ridge)
        return whole

    def cpu(self) -> "ShrunkCovariance":
        """In float64 on the CPU, where LAPACK is; itself if it is there already."""
        tensors = {name: getattr(self, name) for name in ("factor", "diagonal", "matrix")}
        moved = {name: None if t is None else t.detach().to("cpu", torch.float64) for name, t in tensors.items()}
        return self if all(moved[name] is tensors[name] for name in tensors) else replace(self, **moved)


def shrink(
    moments: Moments, shrinkage: Shrinkage, *, target: Target = "identity", floor: bool = False
) -> ShrunkCovariance:
    """Shrink the covariance of some rows.

    Args:
        moments: Of the rows.
        shrinkage: "ledoit-wolf", "oas", "diagonal", a weight in [0, 1], or None.
        target: What a given weight, or that of "ledoit-wolf", pulls towards. "diagonal" as shrinkage is
            "ledoit-wolf" with this target.
        floor: Whether a coordinate that is constant gets the median variance of the others, where the target is the diagonal.

    Returns:
        The shrunk covariance, with its weight: with a factor for moments that keep their rows, with a matrix else.

    Raises:
        SubspaceError: If the shrinkage or the target is none of these, or "oas" is asked to pull towards the diagonal.
    """
    towards: Target = "diagonal" if shrinkage == "diagonal" else target
    weight = shrinkage_weight(moments, shrinkage, target=target)
    empty = moments.mean.new_zeros(moments.width, 0)
    ridge, diagonal = weight * moments.trace / moments.width, None
    if towards == "diagonal" and weight > 0:
        ridge, diagonal = 0.0, weight * moments.variances
    if towards == "diagonal" and floor and bool((constant := _constant(moments)).any()) and not bool(constant.all()):
        given = moments.variances[~constant].median()
        diagonal = torch.where(constant, given, 0.0 * given if diagonal is None else diagonal)
    if weight == 1:
        return ShrunkCovariance(ridge, empty, weight, diagonal)
    if moments.rows is None:
        return ShrunkCovariance(ridge, empty, weight, diagonal, moments.covariance() * (1 - weight))
    factor = moments.rows.T * math.sqrt((1 - weight) / moments.count)
    return ShrunkCovariance(ridge, factor, weight, diagonal)


def _constant(moments: Moments) -> Tensor:
    """[d] whether a coordinate varies by no more than the rounding of its mean."""
    return moments.variances <= (32 * torch.finfo(torch.float64).eps * moments.mean.abs()).square()


def shrinkage_weight(moments: Moments, shrinkage: Shrinkage, *, target: Target = "identity") -> float:
    """The weight s of the target, in [0, 1]; arguments and errors as for :func:`shrink`."""
    if target not in ("identity", "diagonal"):
        raise SubspaceError(f"target must be 'identity' or 'diagonal', got {target!r}")
    if shrinkage is None:
        return 0.0
    if isinstance(shrinkage, str):
        if shrinkage == "diagonal" or (shrinkage == "ledoit-wolf" and target == "diagonal"):
            return _off_diagonal(moments)
        if shrinkage == "ledoit-wolf":
            return _ledoit_wolf(moments)
        if shrinkage == "oas":
            if target == "diagonal":
                raise SubspaceError("shrinkage must not be 'oas' with target='diagonal'; use 'ledoit-wolf' or a weight")
            return _oas(moments)
    elif not isinstance(shrinkage, bool) and 0 <= shrinkage <= 1:
        return float(shrinkage)
    raise SubspaceError(f"shrinkage must be 'ledoit-wolf', 'oas', 'diagonal', None or in [0, 1], got {shrinkage!r}")


def _ledoit_wolf(moments: Moments) -> float:
    """Error of the sample covariance over its distance from the target, both estimated."""
    distance = moments.squared_norm - moments.trace**2 / moments.width
    error = (moments.fourth - moments.squared_norm) / moments.count
    return 0.0 if moments.width == 1 else _share(error, distance)


def _off_diagonal(moments: Moments) -> float:
    """The same over the entries off the diagonal, which are all that the target changes."""
    distance = moments.squared_norm - float(moments.variances.square().sum())
    error = (moments.fourth - float(moments.quartics.sum()) - distance) / moments.count
    return 0.0 if moments.width == 1 else _share(error, distance)


def _share(error: float, distance: float) -> float:
    return 0.0 if error <= 0 or distance <= 0 else min(error / distance, 1.0)


def _oas(moments: Moments) -> float:
    """The fixed point of the oracle's iteration, for Gaussian rows."""
    d = moments.width
    if d == 1:
        return 0.0
    size, scale = moments.squared_norm / d**2, (moments.trace / d) ** 2
    denominator = (moments.count + 1) * (size - scale / d)
    return min((size + scale) / denominator, 1.0) if denominator > 0 else 1.0
