"""Writers: what a repair does to an activation.

``h' = h - alpha W L^T (h - target)`` with ``L^T W = I``: the coordinates of h along L are moved towards those
of the target, all the way at alpha = 1, and nothing else changes. W L^T is a projector, orthogonal where W =
L has orthonormal columns, else oblique. It is never formed: cost and memory are O(d k) a token.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site, SiteLike
from care_lens.repair.checks import require_number, require_tensor
from care_lens.repair.errors import RepairError
from care_lens.repair.kinds import register_kind
from care_lens.repair.placed import PlacedTensors
from care_lens.repair.positions import Positions, check_positions, check_site
from care_lens.repair.reader import fitted_site
from care_lens.subspace import SafetySubspace
from care_lens.subspace.affine import along, working_dtype

_SAME_LINE = 1e-4
_DUALITY_TOLERANCE = 1e-2


@register_kind
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
        RepairError: If shapes, ``left.T @ write``, alpha, site or scope are not as said, or a tensor is not finite.
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
        require_number(self.alpha, name="alpha", least=0)
        require_tensor(self.write, name="write", shape=(None, None), where=self.site)
        require_tensor(self.left, name="left", shape=(self.width, self.rank), where=self.site)
        require_tensor(self.target, name="target", shape=(self.width,), where=self.site)
        if self.rank > self.width:
            raise RepairError(
                f"rank must be at most the width {self.width}, got {self.rank}; take both from one SafetySubspace"
            )
        gap = self.left.double().T @ self.write.double() - torch.eye(
            self.rank, dtype=torch.float64, device=self.left.device
        )
        if not float(gap.abs().max()) < _DUALITY_TOLERANCE:
            raise RepairError(
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
            RepairError: If the activation's width is not the writer's, or its dtype is not floating.
        """
        if not activation.is_floating_point():
            raise RepairError(
                f"activation at {self.site} must be floating point, got {activation.dtype}; give it as float32"
            )
        if activation.shape[-1] != self.width:
            raise RepairError(
                f"activation at {self.site} must be {self.width} wide for this writer, got "
                f"{activation.shape[-1]}; fit it on this model and site"
            )
        # In the dtype that the activation is given in: whoever applies several edits has widened it already.
        wide = activation.to(working_dtype(activation.dtype, self.write, self.left, least=activation.dtype))
        write, left = self.placed("write", "left", like=wide)
        edit = along(wide, write=write, left=left, centre=self.parted("target", like=wide), back=True)
        return edit.to(activation.dtype)

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
            RepairError: If the subspace does not say which site it belongs to, or an option is out of range.
        """
        require_number(beta, name="beta")
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
        source: Float[Tensor, "d"] | Float[Tensor, "k d"],
        alpha: float = 1.0,
        scope: Positions = "all",
    ) -> "Writer":
        """Move the coordinate along ``target - source`` to the target's: rank 1, orthogonal. Of several sources, the coordinates along
        all these lines: rank at most k.

        Args:
            site: Where to write.
            target: [d] mean activation to go to, e.g. over requests that were refused.
            source: [d] mean activation to come from, e.g. over requests that were complied with; or [k, d], one for each token of the
                answer. Lines that are the same but for one part in 10^4 of the longest count once.
            alpha: Strength.
            scope: Which tokens are edited.

        Returns:
            The writer.

        Raises:
            RepairError: If target and source are the same, or not finite [d] of one width.
        """
        site = Site.parse(site)
        require_tensor(target, name="target", shape=(None,), where=site)
        _warn_beyond(alpha)
        if isinstance(source, Tensor) and source.ndim == 2:
            require_tensor(source, name="source", shape=(None, len(target)), where=site)
            return cls._towards_several(site, target, source, alpha, scope)
        require_tensor(source, name="source", shape=(len(target),), where=site)
        difference = target.double() - source.double()
        norm = difference.norm()
        if not norm > 0:
            raise RepairError(
                "target and source must differ, got the same activation; there is no direction between them"
            )
        direction = (difference / norm).to(target.dtype)[:, None]
        return cls(site=site, write=direction, left=direction, target=target, alpha=alpha, scope=scope)

    @classmethod
    def _towards_several(cls, site: Site, target: Tensor, sources: Tensor, alpha: float, scope: Positions) -> "Writer":
        lines, lengths, _ = torch.linalg.svd((target.double() - sources.double()).T, full_matrices=False)
        kept = lengths > _SAME_LINE * lengths.max()
        if not len(lengths) or not float(lengths.max()) > 0:
            raise RepairError(
                "target and source must differ, got the same activation; there is no direction between them"
            )
        # The sign of a singular vector is arbitrary: each points from the sources to the target.
        lines = lines[:, kept]
        towards = lines.T @ (target.double() - sources.double().mean(0))
        lines = (lines * torch.where(towards < 0, -1.0, 1.0)).to(target.dtype)
        return cls(site=site, write=lines, left=lines, target=target, alpha=alpha, scope=scope)


def _warn_beyond(alpha: float) -> None:
    require_number(alpha, name="alpha", least=0)
    if alpha > 1:
        warnings.warn(
            f"alpha={alpha} moves the coordinates past their target (at 2 they are reflected about it)",
            stacklevel=3,
        )
