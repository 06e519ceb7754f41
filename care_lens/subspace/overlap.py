"""How much of given directions lies in a subspace: a refusal direction, SAE features, unembedding rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import beta
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.errors import NonFiniteError, SubspaceError, SubspaceMismatchError


@dataclass(frozen=True, eq=False)
class DirectionOverlap(ShortRepr):
    """Overlap of directions with a subspace of rank k in d dimensions.

    Attributes:
        names: Of the directions.
        shares: [n] share of each direction's squared length that lies in the subspace: the squared cosine of
            its angle to it. float64.
        coordinates: [n, k] cosines with the columns of the basis, float64.
        chance: What a share is on average for a random direction, ``k / d``.
        p_values: [n] how often a uniformly random direction lies in it by as much or more. float64.
    """

    names: tuple[str, ...]
    shares: Float[Tensor, " n"]
    coordinates: Float[Tensor, "n k"]
    chance: float
    p_values: Float[Tensor, " n"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a direction: name, share, angle (radians), chance, p; largest share first."""
        frame = pd.DataFrame(
            {
                "direction": self.names,
                "share": self.shares.numpy(),
                "angle": np.arccos(self.shares.sqrt().numpy().clip(0, 1)),
                "chance": self.chance,
                "p": self.p_values.numpy(),
            }
        )
        return frame.sort_values("share", ascending=False, ignore_index=True, kind="stable")


def overlap_with_directions(
    basis: Float[Tensor, "d k"], directions: Float[Tensor, "n d"], *, names: Sequence[str] | None = None
) -> DirectionOverlap:
    """Shares of directions that lie in a span.

    Args:
        basis: [d, k] orthonormal columns.
        directions: [n, d] rows of any length but 0 and any floating dtype: a refusal direction as one row, an
            SAE's decoder, rows of ``W_U.T``.
        names: Of the directions; None: their indices.

    Returns:
        The overlap, on the CPU.

    Raises:
        SubspaceMismatchError: If the directions are of another width.
        NonFiniteError: If a direction is NaN, infinite or 0.
        SubspaceError: If there are not as many names as directions.

    Notes:
        For a uniformly random direction the share follows Beta(k/2, (d-k)/2), whose upper tail is the p-value.
        It is exact for that null alone: activations and features are not uniform, so a small p says that the
        overlap is more than geometry gives, not why. p-values are not corrected for the number of directions.
    """
    if directions.ndim != 2 or directions.shape[1] != basis.shape[0]:
        raise SubspaceMismatchError(
            f"directions must be rows of width {basis.shape[0]}, got {tuple(directions.shape)}; take them at the "
            "subspace's site, one a row"
        )
    wide = directions.detach().to("cpu", torch.float64)
    lengths = wide.norm(dim=1)
    if not bool((lengths.isfinite() & (lengths > 0)).all()):
        bad = int((~(lengths.isfinite() & (lengths > 0))).nonzero()[0])
        raise NonFiniteError(f"directions must be finite and of length above 0, got one that is not (row {bad})")
    labels = tuple(names) if names is not None else tuple(map(str, range(len(wide))))
    if len(labels) != len(wide):
        raise SubspaceError(f"names must be as many as directions ({len(wide)}), got {len(labels)}")
    own = torch.linalg.qr(basis.detach().to("cpu", torch.float64)).Q
    signs = torch.where((own * basis.detach().to("cpu", torch.float64)).sum(dim=0) < 0, -1.0, 1.0)
    coordinates = (wide / lengths[:, None]) @ (own * signs)
    shares = coordinates.square().sum(dim=1).clamp(max=1)
    width, rank = own.shape
    # With k = d every direction lies in it, and the distribution is a point.
    tail = np.ones(len(wide)) if rank == width else beta.sf(shares.numpy(), rank / 2, (width - rank) / 2)
    return DirectionOverlap(
        labels, shares, coordinates, rank / width, torch.from_numpy(np.asarray(tail, dtype=np.float64))
    )
