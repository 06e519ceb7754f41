"""The safety subspace: what a fit on benign and malicious activations gives, typed by where it belongs."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site, SiteLike
from care_lens.subspace import display, storage
from care_lens.subspace.comparison import SubspaceComparison, compare_bases
from care_lens.subspace.contrast import Contrast, Metric
from care_lens.subspace.errors import RankError, SubspaceError, SubspaceMismatchError
from care_lens.subspace.fitting import Projection, fit_tensors
from care_lens.subspace.shrinkage import Shrinkage
from care_lens.subspace.solvers import Solver

if TYPE_CHECKING:
    import plotly.graph_objects as go

Modality = Literal["visual", "textual"]

_TENSORS = ("basis", "read", "write", "left", "eigenvalues", "mean_benign", "mean_malicious")
_BY_COLUMN = ("basis", "read", "write", "left")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SafetySubspace:
    """Directions along which malicious activations stand out from benign ones, and the projector onto them.

    Made by :meth:`fit` or :meth:`load`. Tensors are float32. Columns are in the order of the eigenvalues, and
    each span of the first j columns is the subspace of rank j. ``write @ left.T`` is the projector P; for an
    orthogonal one both are ``basis``, for an oblique one ``left`` is ``read`` and ``write`` is ``C_b read``.

    Attributes:
        basis: [d, k] orthonormal basis of the span of the generalised eigenvectors.
        read: [d, k] generalised eigenvectors U with ``U^T C_b U = I`` (``U^T U = I`` with metric="identity");
            the malicious mean is on the positive side of each.
        write: [d, k] what the projector writes along.
        left: [d, k] the coordinates it removes; ``left.T @ write = I``.
        eigenvalues: [k] malicious over benign energy along each column of ``read``, descending.
        mean_benign: [d].
        mean_malicious: [d].
        site: Where the activations were taken, or None.
        modality: "visual", "textual" or None.
        diagnostics: How the fit went, JSON-able: row counts, shrinkage weights, solver, condition, residual,
            rank choice.
        provenance: What the caller says of the rows, JSON-able.
    """

    basis: Float[Tensor, "d k"]
    read: Float[Tensor, "d k"]
    write: Float[Tensor, "d k"]
    left: Float[Tensor, "d k"]
    eigenvalues: Float[Tensor, "k"]
    mean_benign: Float[Tensor, "d"]
    mean_malicious: Float[Tensor, "d"]
    site: Site | None = None
    modality: Modality | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        benign: Float[Tensor, "n_b d"],
        malicious: Float[Tensor, "n_m d"],
        *,
        rank: int | Literal["auto"] = "auto",
        contrast: Contrast = "second_moment",
        shrinkage: Shrinkage = "ledoit-wolf",
        projection: Projection = "oblique",
        solver: Solver = "auto",
        metric: Metric = "benign",
        site: SiteLike | None = None,
        modality: Modality | None = None,
        provenance: Mapping[str, Any] | None = None,
        groups: tuple[Sequence[str], Sequence[str]] | None = None,
        seed: int = 0,
    ) -> "SafetySubspace":
        """Fit the leading generalised eigenvectors of malicious against benign activations.

        Args:
            benign: [n_b, d] activations, one row an example, of any floating dtype on any device; computed in
                float64.
            malicious: [n_m, d].
            rank: Number of directions, or "auto": the leading ones whose held-out malicious/benign energy
                ratio is above what benign rows against benign rows give (``care_lens.subspace.auto_rank``;
                about 80 fits, 64 directions at most). With contrast="mean" it is 1.
            contrast: "second_moment": malicious second moment about the benign mean, which also sees a shift
                of the mean; "covariance": malicious covariance about its own mean, as in the paper; "mean":
                the difference of the means alone.
            shrinkage: Of both covariances: "ledoit-wolf", "oas", a weight in [0, 1], or None.
            projection: "oblique" removes the coordinates with the least change of benign activations in the
                benign metric; "orthogonal" with the least Euclidean change.
            solver: "dual" (order n_b + n_m), "dense" (order d), or "auto", the smaller. They give the same
                subspace.
            metric: "benign": energy is measured against C_b. "identity": against the identity; with
                contrast="mean" the direction is then the difference of the means itself.
            site: Where the rows were taken.
            modality: Which modality's tokens they are.
            provenance: JSON-able notes: model, data, selection.
            groups: The item of each benign and of each malicious row, so that rows of one item never sit on
                both sides of the splits of rank="auto". None: every row is an item by itself.
            seed: Of those splits.

        Returns:
            The subspace, on the device of ``benign``.

        Raises:
            WidthError: If the classes differ in width or are not floating [n, d].
            TooFewRowsError: If a class has too few rows, or too few groups for rank="auto".
            NonFiniteError: If rows hold NaN or infinity.
            SingularCovarianceError: If the benign covariance is singular, as without shrinkage when n_b <= d.
            RankError: If the rows do not determine so many directions; the message says how many they do.
            SubspaceError: If an option is unknown; the base of all of these.

        Warns:
            UserWarning: If rank="auto" finds no direction; rank 1 is kept.

        Notes:
            Solves ``C_m u = lambda C_b u`` for the largest lambda, with ``C' = (1 - s) C + s tr(C)/d I`` and
            1/N covariances; "second_moment" adds ``delta delta^T`` after shrinking, "mean" has
            ``C_m = delta delta^T``, so that u is the LDA direction ``C_b^-1 delta`` and lambda the squared
            Mahalanobis distance of the means. P = Q Q^T with Q = qr(U), or P = C_b U U^T. Fu et al. 2026
            (arXiv:2603.27240) for the subspace, Belrose et al. 2023 (LEACE) for the geometry of the oblique
            projector.

        Example:
            >>> import torch
            >>> from care_lens.subspace import SafetySubspace
            >>> generator = torch.Generator().manual_seed(0)
            >>> benign = torch.randn(200, 32, generator=generator)
            >>> malicious = torch.randn(200, 32, generator=generator)
            >>> malicious[:, 5] *= 4
            >>> subspace = SafetySubspace.fit(benign, malicious, rank=1, site="blocks.3.hook_mlp_out")
            >>> int(subspace.basis[:, 0].abs().argmax())
            5
            >>> repaired = subspace.apply(malicious)
            >>> bool(subspace.energy(repaired).max() < 1e-6)
            True
        """
        tensors, diagnostics = fit_tensors(
            benign,
            malicious,
            rank=rank,
            contrast=contrast,
            shrinkage=shrinkage,
            projection=projection,
            solver=solver,
            metric=metric,
            groups=groups,
            seed=seed,
        )
        return cls(
            **{name: tensor.to(benign.device) for name, tensor in tensors.items()},
            site=None if site is None else Site.parse(site),
            modality=modality,
            diagnostics=diagnostics,
            provenance=dict(provenance or {}),
        )

    @property
    def width(self) -> int:
        """Width d of the activations it belongs to."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Number of directions k."""
        return self.basis.shape[1]

    def projector(self) -> Float[Tensor, "d d"]:
        """The [d, d] projector ``P = write @ left.T``; ``P P = P``, and its rank is k."""
        return self.write @ self.left.T

    def project(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """P h, without forming P: O(d k) a row.

        Args:
            h: [..., d] activations of any floating dtype.

        Returns:
            [..., d] in float32, or float64 if h is.

        Raises:
            SubspaceMismatchError: If h is of another width.
        """
        wide, (left, write) = self._wide(h, self.left, self.write)
        return (wide @ left) @ write.T

    def coordinates(self, h: Float[Tensor, "*batch d"], *, centre: bool = True) -> Float[Tensor, "*batch k"]:
        """``read^T (h - mean_benign)``: how many benign standard deviations along each direction; malicious
        is positive.

        Args:
            h: [..., d] activations of any floating dtype.
            centre: Whether the benign mean is subtracted.

        Returns:
            [..., k] in float32, or float64 if h is.

        Raises:
            SubspaceMismatchError: If h is of another width.
        """
        wide, (read, mean) = self._wide(h, self.read, self.mean_benign)
        return (wide - mean if centre else wide) @ read

    def energy(self, h: Float[Tensor, "*batch d"], *, centre: bool = True) -> Float[Tensor, "*batch"]:
        """``||read^T (h - mean_benign)||^2``, k on average over the benign distribution of the fit (as
        shrunk).

        Args, Returns ([...]) and Raises are those of :meth:`coordinates`.
        """
        return self.coordinates(h, centre=centre).square().sum(dim=-1)

    def apply(
        self,
        h: Float[Tensor, "*batch d"],
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        target: Float[Tensor, "d"] | None = None,
    ) -> Float[Tensor, "*batch d"]:
        """Move the coordinates of h in the subspace to those of a target: ``h - alpha P (h - target)``.

        Args:
            h: [..., d] activations of any floating dtype; never written to.
            alpha: 0 returns h itself, 1 puts the coordinates on the target, above 1 they go past it (with a
                warning).
            beta: Share of the benign mean that is the target, in [0, 1]; 0 removes the coordinates.
            target: [d] another target, e.g. the mean over refusals; beta is then not used.

        Returns:
            [..., d] of h's dtype; computed in float32, or float64 if h is.

        Raises:
            SubspaceMismatchError: If h or the target is of another width.
            SubspaceError: If alpha is negative or not finite, or beta not in [0, 1].

        Warns:
            UserWarning: If alpha is above 1.

        Notes:
            At alpha = 1 this is the paper's ``P_safe h + beta (I - P_safe) mean_benign`` with
            ``P_safe = I - P``.
        """
        if not 0 <= alpha < float("inf"):
            raise SubspaceError(f"alpha must be 0 or more, got {alpha!r}")
        if not 0 <= beta <= 1:
            raise SubspaceError(f"beta must be in [0, 1], got {beta!r}; give a target to aim elsewhere")
        self.check(width=h.shape[-1])
        if target is not None:
            self.check(width=target.shape[-1])
        if alpha == 0:
            return h
        if alpha > 1:
            warnings.warn(
                f"alpha={alpha} is above 1: coordinates are reflected through the target, not removed",
                stacklevel=2,
            )
        wide, (aim,) = self._wide(h, beta * self.mean_benign if target is None else target)
        return (wide - alpha * self.project(wide - aim)).to(h.dtype)

    def truncate(self, rank: int) -> "SafetySubspace":
        """The subspace of the leading ``rank`` directions, as a fit of that rank would give.

        Raises:
            RankError: If rank is not between 1 and this subspace's.
        """
        if not 1 <= rank <= self.rank:
            raise RankError(
                f"rank must be between 1 and {self.rank}, got {rank}; fit again for more", largest=self.rank
            )
        columns = {name: getattr(self, name)[:, :rank].clone() for name in _BY_COLUMN}
        return dataclasses.replace(self, **columns, eigenvalues=self.eigenvalues[:rank].clone())

    def compare(self, other: "SafetySubspace") -> SubspaceComparison:
        """Principal angles to another subspace of the same width, and TransformerLens's projection kernel.

        Args:
            other: Of any rank, site and modality.

        Returns:
            Cosines, angles, kernel, and what random subspaces would give.

        Raises:
            SubspaceMismatchError: If the widths differ.
        """
        self.check(width=other.width)
        return compare_bases(self.basis, other.basis.to(self.basis))

    def check(
        self, *, site: SiteLike | None = None, modality: Modality | None = None, width: int | None = None
    ) -> None:
        """Refuse to be used where it does not belong; what is not given is not checked.

        Raises:
            SubspaceMismatchError: If the site, modality or width is not that of the fit, or the fit named
                none.
        """
        wanted = {"site": None if site is None else Site.parse(site), "modality": modality, "width": width}
        for name, value in wanted.items():
            own = getattr(self, name)
            if value is not None and value != own:
                known = f"fitted for {name} {own}" if own is not None else f"fitted without a {name}"
                raise SubspaceMismatchError(
                    f"{name} must be the one the subspace was fitted for, got {value} for a subspace "
                    f"{known}; fit one on activations of that place"
                )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SafetySubspace":
        """Move or cast the tensors; a new object."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device=device, dtype=dtype) for name in _TENSORS}
        )

    def save(self, directory: str | Path) -> Path:
        """Write ``subspace.safetensors`` and ``subspace.json`` (schema, versions, types, checksums) into a
        directory.

        Args:
            directory: Made if it does not exist.

        Returns:
            The directory.

        Raises:
            TypeError: If the provenance is not JSON-able.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS}
        site = None if self.site is None else str(self.site)
        notes = {"modality": self.modality, "diagnostics": self.diagnostics, "provenance": self.provenance}
        return storage.save(directory, tensors, {"site": site, "width": self.width, "rank": self.rank, **notes})

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        site: SiteLike | None = None,
        modality: Modality | None = None,
        width: int | None = None,
    ) -> "SafetySubspace":
        """Read what :meth:`save` wrote.

        Args:
            directory: Where.
            site: The site it will be used at; likewise modality and width. What is not given is not checked.

        Returns:
            The subspace, on the CPU.

        Raises:
            FileNotFoundError: If a file is not there.
            SubspaceFileError: If the files are damaged or of a newer schema.
            SubspaceMismatchError: If it was fitted for another site, modality or width.
        """
        tensors, manifest = storage.load_checked(directory, _TENSORS)
        subspace = cls(
            **tensors,
            site=None if manifest["site"] is None else Site.parse(manifest["site"]),
            modality=manifest["modality"],
            diagnostics=manifest["diagnostics"],
            provenance=manifest["provenance"],
        )
        subspace.check(site=site, modality=modality, width=width)
        return subspace

    def plot(self) -> "go.Figure":
        """The spectrum as a plotly figure; it is returned and never shows itself."""
        from care_lens.plots import plot_spectrum

        return plot_spectrum(self)

    def __repr__(self) -> str:
        return display.as_text(self.summary(), self.eigenvalues)

    def _repr_html_(self) -> str:
        return display.as_html(self.summary(), self.eigenvalues)

    def summary(self) -> dict[str, str]:
        """What it is, in words: the rows of its notebook table."""
        return display.summary(self)

    def _wide(self, h: Tensor, *own: Tensor) -> tuple[Tensor, list[Tensor]]:
        """h in float32 or wider, and own tensors beside it."""
        self.check(width=h.shape[-1])
        dtype = torch.promote_types(h.dtype, torch.float32)
        return h.to(dtype), [tensor.to(device=h.device, dtype=dtype) for tensor in own]
