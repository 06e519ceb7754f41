"""Small linear maps of activations: a multiple of the identity and a few directions, about a centre.

``A(h) = c + (s I + W L^T) (h - c)`` is what every operator of a subspace is: the projector (s = 0, W L^T = P,
c = 0), its complement (s = 1, -P, 0), the correction (s = 1, -alpha P, the target). Nothing d x d is formed
unless it is asked for: O(d k) a row, 2 d k numbers kept.

Activations are row vectors; a map acts on the last axis.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.affine import along, working_dtype
from care_lens.subspace.centring import split, subtract
from care_lens.subspace.errors import SubspaceError, SubspaceMismatchError


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearMap(ShortRepr):
    """``A(h) = c + (s I + W L^T) (h - c)``.

    Attributes:
        scale: s, the multiple of the identity.
        write: [d, k] W, what it adds along.
        left: [d, k] L, what it reads; k may be 0.
        centre: [d] c, which A leaves where it is; None: the origin, and A is linear.

    Raises:
        SubspaceMismatchError: If the shapes of the tensors disagree.
    """

    scale: float
    write: Float[Tensor, "d k"]
    left: Float[Tensor, "d k"]
    centre: Float[Tensor, "d"] | None = None

    def __post_init__(self) -> None:
        if self.write.shape != self.left.shape or (self.centre is not None and len(self.centre) != self.width):
            raise SubspaceMismatchError(
                f"write and left must be of one shape [d, k] and centre [d], got {tuple(self.write.shape)}, "
                f"{tuple(self.left.shape)} and {None if self.centre is None else tuple(self.centre.shape)}"
            )

    @property
    def width(self) -> int:
        """Width d of the activations."""
        return self.write.shape[0]

    def __call__(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The map of activations.

        Args:
            h: [..., d] of any floating dtype, on any device.

        Returns:
            [..., d] of the dtype of h, computed in float32, or float64 if h or the map is. Where the map is the identity
            (s = 1 and W or L is 0) h itself.

        Raises:
            SubspaceMismatchError: If h is of another width.
            SubspaceError: If h is not of a floating dtype.
        """
        if not h.is_floating_point():
            raise SubspaceError(f"activations must be of a floating dtype, got {h.dtype}; give h.float()")
        if h.shape[-1] != self.width:
            raise SubspaceMismatchError(
                f"activations must be of width {self.width}, got {h.shape[-1]}; take them where the subspace was fitted"
            )
        if self.is_identity:
            return h
        wide = h.to(working_dtype(h.dtype, self.left))
        centre = None if self.centre is None else split(self.centre, wide)
        moved = along(wide, write=self.write, left=self.left, centre=centre)
        if self.scale == 1:
            return (wide + moved).to(h.dtype)
        moved = moved + self.scale * (wide if centre is None else subtract(wide, *centre))
        return (moved if self.centre is None else moved + self.centre.to(wide)).to(h.dtype)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is changed, whatever the activations."""
        return self.scale == 1 and not (bool(self.write.any()) and bool(self.left.any()))

    def matrix(self) -> Float[Tensor, "d d"]:
        """The linear part ``s I + W L^T``, [d, d]."""
        matrix = self.write @ self.left.T
        matrix.diagonal().add_(self.scale)
        return matrix

    def trace(self) -> float:
        """Trace of the linear part: for a projector, its rank."""
        return self.scale * self.width + float((self.write.double() * self.left.double()).sum())

    @property
    def T(self) -> "LinearMap":
        """The transpose of a linear map, which acts on gradients as the map acts on activations.

        Raises:
            SubspaceError: If the map has a centre.
        """
        if self.centre is not None:
            raise SubspaceError("a map must be linear to have a transpose, got one about a centre; take its linear()")
        return LinearMap(scale=self.scale, write=self.left, left=self.write)

    def linear(self) -> "LinearMap":
        """The linear part: the same map about the origin."""
        return LinearMap(scale=self.scale, write=self.write, left=self.left)

    def __matmul__(self, other: "LinearMap") -> "LinearMap":
        """The map that first does ``other`` and then this one.

        Args:
            other: Of the same width, about the same centre.

        Returns:
            The product; its number of directions is the sum of the two.

        Raises:
            SubspaceMismatchError: If the widths differ.
            SubspaceError: If the centres differ.
        """
        if other.width != self.width:
            raise SubspaceMismatchError(f"maps must be of one width to be composed, got {self.width} and {other.width}")
        centres = [self.centre, other.centre]
        if any(centre is None for centre in centres):
            same = all(centre is None for centre in centres)
        else:
            same = torch.equal(*(centre for centre in centres if centre is not None))
        if not same:
            raise SubspaceError("maps must have one centre to be composed, got two; apply one after the other instead")
        # (a I + W L^T)(b I + V K^T) = ab I + W (b L + K (V^T L))^T + a V K^T
        left = other.scale * self.left + other.left @ (other.write.T @ self.left)
        return LinearMap(
            scale=self.scale * other.scale,
            write=torch.cat([self.write, self.scale * other.write], dim=1),
            left=torch.cat([left, other.left], dim=1),
            centre=self.centre,
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "LinearMap":
        """Move or cast the tensors; a new object."""
        centre = None if self.centre is None else self.centre.to(device=device, dtype=dtype)
        write, left = (part.to(device=device, dtype=dtype) for part in (self.write, self.left))
        return LinearMap(scale=self.scale, write=write, left=left, centre=centre)
