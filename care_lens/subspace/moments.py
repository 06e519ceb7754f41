"""Mean and covariance of rows, in float64: with the rows, or as sums that never grow.

Covariances are 1/N throughout. A :class:`Moments` is in one of two forms:

- rows: the centred rows are kept, 8 N d bytes. Nothing d x d is made unless it is asked for. The form for N < d.
- sums: the [d, d] scatter and the higher sums that shrinkage needs, 8 d^2 + 24 d bytes whatever N is. What needs
  rows (permutations, a bootstrap of rows) raises :class:`RowsNeededError`.

Two are merged exactly (Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances", extended here to the third and fourth order), so that a stream of batches, or all folds but one, give
what their rows together would.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.errors import NonFiniteError, RowsNeededError, TooFewRowsError, WidthError


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over N rows x about their mean; all float64.

    Attributes:
        count: Number of rows N.
        scatter: [d, d] sum of ``x x^T``.
        fourth: Sum of ``||x||^4``.
        third: [d] sum of ``||x||^2 x``.
        cubes: [d] sum of ``x_i^3``.
        quartics: [d] sum of ``x_i^4``.
    """

    count: int
    scatter: Float[Tensor, "d d"]
    fourth: float
    third: Float[Tensor, "d"]
    cubes: Float[Tensor, "d"]
    quartics: Float[Tensor, "d"]

    @classmethod
    def of(cls, centred: Float[Tensor, "n d"]) -> "Sums":
        """The sums of rows that are centred already."""
        squares = centred.square().sum(dim=1)
        return cls(
            count=len(centred),
            scatter=centred.T @ centred,
            fourth=float(squares.square().sum()),
            third=squares @ centred,
            cubes=centred.pow(3).sum(dim=0),
            quartics=centred.pow(4).sum(dim=0),
        )

    def about(self, shift: Float[Tensor, "d"]) -> "Sums":
        """The sums of ``x - shift``, exactly, because the x sum to 0."""
        n, trace, along = self.count, self.scatter.trace(), self.scatter @ shift
        length, diagonal = shift.square().sum(), self.scatter.diagonal()
        return Sums(
            count=n,
            scatter=torch.addr(self.scatter, shift, shift, alpha=n),
            fourth=self.fourth
            + float(-4 * shift @ self.third + 4 * shift @ along + 2 * length * trace + n * length.square()),
            third=self.third - 2 * along - (trace + n * length) * shift,
            cubes=self.cubes - 3 * shift * diagonal - n * shift.pow(3),
            quartics=self.quartics - 4 * shift * self.cubes + 6 * shift.square() * diagonal + n * shift.pow(4),
        )

    def plus(self, other: "Sums") -> "Sums":
        """The sums of both sets of rows, which must be about one centre."""
        return Sums(
            count=self.count + other.count,
            scatter=self.scatter + other.scatter,
            fourth=self.fourth + other.fourth,
            third=self.third + other.third,
            cubes=self.cubes + other.cubes,
            quartics=self.quartics + other.quartics,
        )


@dataclass(frozen=True, eq=False)
class Moments(ShortRepr):
    """First and second moments of a set of rows, with the higher ones that shrinkage needs.

    Attributes:
        mean: [d] float64.
        rows: [n, d] float64, the rows less their mean; None in the form of sums.
        kept: The sums about the mean; None in the form of rows, see :attr:`sums`.

    Example:
        >>> import torch
        >>> batches = torch.arange(12.0).reshape(2, 3, 2)
        >>> stream = Moments.from_rows(batches[0]).without_rows().update(batches[1])
        >>> stream.count, stream.mean.tolist(), round(stream.trace, 3)
        (6, [5.0, 6.0], 23.333)
    """

    mean: Float[Tensor, "d"]
    rows: Float[Tensor, "n d"] | None = None
    kept: Sums | None = None

    @classmethod
    def from_rows(cls, rows: Float[Tensor, "n d"], *, name: str = "rows", least: int = 2) -> "Moments":
        """Moments of rows of any floating dtype on any device.

        Args:
            rows: [n, d]. Half precision is widened to float64 before anything is computed.
            name: What the rows are called in errors.
            least: How many rows are needed, 1 or more.

        Returns:
            The moments in the form of rows, on the CPU (LAPACK's float64).

        Raises:
            WidthError: If rows are not a floating [n, d] with d of 1 or more.
            TooFewRowsError: If there are fewer than ``least``.
            NonFiniteError: If a row holds NaN or infinity.
        """
        if rows.ndim != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
            raise WidthError(f"{name} must be floating point [n, d], got {rows.dtype} of shape {tuple(rows.shape)}")
        least = max(least, 1)
        if rows.shape[0] < least:
            raise TooFewRowsError(f"{name} must have {least} rows or more, got {rows.shape[0]}; give more examples")
        wide = rows.detach().to("cpu", torch.float64)
        mean = wide.mean(dim=0)
        if not bool(torch.isfinite(mean).all()):  # a sum over a column shows what is not finite in it
            _refuse_non_finite(wide, name)
        return cls(mean, wide - mean)

    @property
    def count(self) -> int:
        """Number of rows N."""
        return self.sums.count if self.rows is None else self.rows.shape[0]

    @property
    def width(self) -> int:
        """Number of columns d."""
        return self.mean.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        held = [self.mean, self.rows]
        if self.kept is not None:
            held += [self.kept.scatter, self.kept.third, self.kept.cubes, self.kept.quartics]
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    @property
    def centred(self) -> Float[Tensor, "n d"]:
        """[n, d] the rows less their mean.

        Raises:
            RowsNeededError: If only the sums were kept.
        """
        if self.rows is None:
            raise RowsNeededError(
                f"rows must be kept for permutations, row bootstraps and held-out rows, got the sums of {self.count} "
                "rows alone; fit from the rows, or keep='rows' while capturing"
            )
        return self.rows

    @cached_property
    def sums(self) -> Sums:
        """The sums about the mean; made from the rows (8 d^2 bytes) if those were kept."""
        if self.kept is not None:
            return self.kept
        if self.rows is None:
            raise RowsNeededError("moments must have rows or sums, got neither; make them with Moments.from_rows")
        return Sums.of(self.rows)

    @cached_property
    def trace(self) -> float:
        """Trace of the covariance."""
        if self.rows is None:
            return float(self.sums.scatter.trace()) / self.count
        return float(self.rows.square().sum()) / self.count

    @cached_property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the covariance, from the smaller of the two Gram matrices."""
        if self.rows is None:
            gram = self.sums.scatter
        else:
            gram = self.rows @ self.rows.T if self.count <= self.width else self.rows.T @ self.rows
        return float(gram.square().sum()) / self.count**2

    @cached_property
    def fourth(self) -> float:
        """Mean of ``||x - mean||^4`` over the rows."""
        if self.rows is None:
            return self.sums.fourth / self.count
        return float(self.rows.square().sum(dim=1).square().mean())

    @cached_property
    def variances(self) -> Float[Tensor, "d"]:
        """[d] variance of each coordinate."""
        if self.rows is None:
            return self.sums.scatter.diagonal() / self.count
        return self.rows.square().mean(dim=0)

    @cached_property
    def quartics(self) -> Float[Tensor, "d"]:
        """[d] mean of ``(x_i - mean_i)^4`` of each coordinate."""
        if self.rows is None:
            return self.sums.quartics / self.count
        return self.rows.pow(4).mean(dim=0)

    def covariance(self) -> Float[Tensor, "d d"]:
        """The [d, d] covariance; 8 d^2 bytes."""
        if self.rows is None:
            return self.sums.scatter / self.count
        return self.rows.T @ self.rows / self.count

    def without_rows(self) -> "Moments":
        """The same moments in the form of sums."""
        return self if self.rows is None else Moments(self.mean, None, self.sums)

    def update(self, rows: Float[Tensor, "n d"], *, name: str = "rows") -> "Moments":
        """The moments with further rows; this object is not changed. No rows at all are none to add.

        Args:
            rows: [n, d], as for :meth:`from_rows`.
            name: What they are called in errors.

        Returns:
            New moments in this object's form. In the form of rows all rows are copied; in that of sums a new
            scatter is made.

        Raises:
            SubspaceError: As :meth:`from_rows` and :meth:`merge`.
        """
        if rows.ndim == 2 and rows.shape == (0, self.width):
            return self
        return self.merge(Moments.from_rows(rows, name=name, least=1))

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets of rows.

        Args:
            other: Of other rows of the same width.

        Returns:
            In the form of rows if both are, else in that of sums.

        Raises:
            WidthError: If the widths differ.
        """
        if self.width != other.width:
            raise WidthError(
                f"moments to merge must be equally wide, got {self.width} and {other.width}; take both from one "
                "site of one model"
            )
        total = self.count + other.count
        mean = self.mean + (other.mean - self.mean) * (other.count / total)
        if self.rows is not None and other.rows is not None:
            both = [part + (of.mean - mean) for of, part in ((self, self.rows), (other, other.rows))]
            rows = torch.cat(both)
            return Moments(mean, rows)
        return Moments(mean, None, self.sums.about(mean - self.mean).plus(other.sums.about(mean - other.mean)))


def _refuse_non_finite(wide: Tensor, name: str) -> None:
    bad = (~torch.isfinite(wide).all(dim=1)).nonzero()[:, 0].tolist()
    if not bad:
        raise NonFiniteError(f"{name} must have a mean within float64, got values whose sum overflows; scale them down")
    raise NonFiniteError(
        f"{name} must be finite, got NaN or infinity in {len(bad)} of {len(wide)} rows (first: row "
        f"{bad[0]}); drop them, or capture in float32 or bfloat16 if float16 overflowed"
    )
