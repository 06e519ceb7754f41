"""Mean and covariance of rows, in float64.

Covariances are 1/N throughout. A :class:`Moments` keeps the centred rows, so that nothing d x d is made
unless it is asked for: memory is 8 N d bytes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.errors import NonFiniteError, TooFewRowsError, WidthError


@dataclass(frozen=True, eq=False)
class Moments:
    """First and second moments of a set of rows.

    Attributes:
        mean: [d] float64.
        centred: [n, d] float64, the rows less their mean.
    """

    mean: Float[Tensor, "d"]
    centred: Float[Tensor, "n d"]

    @classmethod
    def from_rows(cls, rows: Float[Tensor, "n d"], *, name: str = "rows", least: int = 2) -> "Moments":
        """Moments of rows of any floating dtype on any device.

        Args:
            rows: [n, d]. Half precision is widened to float64 before anything is computed.
            name: What the rows are called in errors.
            least: How many rows are needed.

        Returns:
            The moments, on the CPU (LAPACK's float64).

        Raises:
            WidthError: If rows are not a floating [n, d] with d of 1 or more.
            TooFewRowsError: If there are fewer than ``least``.
            NonFiniteError: If a row holds NaN or infinity.
        """
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise WidthError(f"{name} must be floating point [n, d], got {rows.dtype} of shape {tuple(rows.shape)}")
        if rows.shape[0] < least:
            raise TooFewRowsError(f"{name} must have {least} rows or more, got {rows.shape[0]}; give more examples")
        wide = rows.detach().to("cpu", torch.float64)
        finite = torch.isfinite(wide).all(dim=1)
        if not bool(finite.all()):
            bad = (~finite).nonzero()[:, 0].tolist()
            raise NonFiniteError(
                f"{name} must be finite, got NaN or infinity in {len(bad)} of {len(wide)} rows (first: row "
                f"{bad[0]}); drop them, or capture in float32 or bfloat16 if float16 overflowed"
            )
        mean = wide.mean(dim=0)
        return cls(mean, wide - mean)

    @property
    def count(self) -> int:
        """Number of rows N."""
        return self.centred.shape[0]

    @property
    def width(self) -> int:
        """Number of columns d."""
        return self.centred.shape[1]

    @cached_property
    def trace(self) -> float:
        """Trace of the covariance."""
        return float(self.centred.square().sum()) / self.count

    @cached_property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the covariance, from the smaller of the two Gram matrices."""
        rows = self.centred
        gram = rows @ rows.T if self.count <= self.width else rows.T @ rows
        return float(gram.square().sum()) / self.count**2

    @cached_property
    def fourth(self) -> float:
        """Mean of ``||x - mean||^4`` over the rows."""
        return float(self.centred.square().sum(dim=1).square().mean())

    def covariance(self) -> Float[Tensor, "d d"]:
        """The [d, d] covariance, ``X^T X / N``; 8 d^2 bytes."""
        return self.centred.T @ self.centred / self.count
