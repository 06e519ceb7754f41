"""Writers: what a repair does to an activation.

``h' = h - alpha W L^T (h - target)`` with ``L^T W = I``: the coordinates of h along L are moved towards those
of the target, all the way at alpha = 1, and nothing else changes. W L^T is a projector, orthogonal where W =
L has orthonormal columns, else oblique. It is never formed: cost and memory are O(d k) a token.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site, SiteLike
from care_lens.repair.placed import PlacedTensors
from care_lens.repair.positions import Positions, check_positions, check_site
from care_lens.repair.reader import fitted_site
from care_lens.subspace import SafetySubspace

_DUALITY_TOLERANCE = 1e-2


@dataclass(frozen=True, eq=False, kw_only=True)
class Writer(PlacedTensors):
    """Moves some coordinates of an activation towards a target.

    Attributes:
        site: Where it writes; a [batch, pos, d] site of the language tower.
        write: [d, k] W, what is added.
        left: [d, k] L, which coordinates are meant; ``left.T @ write`` is the identity.
        target: [d] tau, the activation whose coordinates are aimed at; zeros: they are removed.
        alpha: Strength. 0 does nothing, 1 puts the coordinates on the target, above 1 they go past it.
        scope: Which tokens are edited; padding never is.

    Raises:
        ValueError: If shapes, ``left.T @ write``, alpha, site or scope are not as said.
    """

    site: Site
    write: Float[Tensor, "d k"]
    left: Float[Tensor, "d k"]
    target: Float[Tensor, "d"]
    alpha: float = 1.0
    scope: Positions = "all"

    def __post_init__(self) -> None:
        check_site(self.site, name="site of a writer")
        check_positions(self.scope, name="scope")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be 0 or more, got {self.alpha}")
        gap = self.left.double().T @ self.write.double() - torch.eye(
            self.rank, dtype=torch.float64, device=self.left.device
        )
        if not float(gap.abs().max()) < _DUALITY_TOLERANCE:
            raise ValueError(
                f"left.T @ write must be the identity, got entries off by {float(gap.abs().max()):.2g}; "
                "take both from one SafetySubspace"
            )

    @property
    def rank(self) -> int:
        """Number of coordinates it moves."""
        return self.write.shape[1]

    @property
    def width(self) -> int:
        """Size of the last axis of the activations it edits."""
        return self.write.shape[0]

    def delta(self, activation: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """The edit at alpha = 1: ``-W L^T (h - target)``.

        Args:
            activation: [..., d] at the site.

        Returns:
            [..., d] what to add to it.

        Raises:
            ValueError: If the activation's width is not the writer's.
        """
        if activation.shape[-1] != self.width:
            raise ValueError(
                f"activation at {self.site} must be {self.width} wide for this writer, got "
                f"{activation.shape[-1]}; fit it on this model and site"
            )
        write, left, target = self.placed("write", "left", "target", like=activation)
        return -((activation - target) @ left) @ write.T

    @classmethod
    def from_subspace(
        cls,
        subspace: SafetySubspace,
        *,
        target: Float[Tensor, "d"] | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        scope: Positions = "all",
    ) -> "Writer":
        """Write a fitted subspace's coordinates, at the site it was fitted on.

        Args:
            subspace: The subspace.
            target: [d] the activation aimed at, e.g. the mean over refusals; None: ``beta`` times the benign
                mean.
            alpha: Strength.
            beta: How much of the benign mean to aim at when there is no target; 0: the coordinates are
                removed.
            scope: Which tokens are edited.

        Returns:
            The writer. Alpha above 1 is allowed with a warning: the coordinates are reflected rather than
            removed.

        Raises:
            ValueError: If the subspace does not say which site it belongs to, or an option is out of range.
        """
        _warn_beyond(alpha)
        return cls(
            site=fitted_site(subspace),
            write=subspace.write,
            left=subspace.left,
            target=beta * subspace.mean_benign if target is None else target,
            alpha=alpha,
            scope=scope,
        )

    @classmethod
    def towards(
        cls,
        site: SiteLike,
        *,
        target: Float[Tensor, "d"],
        source: Float[Tensor, "d"],
        alpha: float = 1.0,
        scope: Positions = "all",
    ) -> "Writer":
        """Move the one coordinate along ``target - source`` to the target's: rank 1, orthogonal.

        Args:
            site: Where to write.
            target: [d] mean activation to go to, e.g. over requests that were refused.
            source: [d] mean activation to come from, e.g. over requests that were complied with.
            alpha: Strength.
            scope: Which tokens are edited.

        Returns:
            The writer.

        Raises:
            ValueError: If target and source are the same.
        """
        _warn_beyond(alpha)
        difference = target.double() - source.double()
        norm = difference.norm()
        if not norm > 0:
            raise ValueError("target and source must differ, got the same activation")
        direction = (difference / norm).to(target.dtype)[:, None]
        return cls(site=Site.parse(site), write=direction, left=direction, target=target, alpha=alpha, scope=scope)


def _warn_beyond(alpha: float) -> None:
    if alpha > 1:
        warnings.warn(
            f"alpha={alpha} moves the coordinates past their target (at 2 they are reflected about it)",
            stacklevel=3,
        )
