"""The safety subspace: what a fit on benign and malicious activations gives, typed by where it belongs."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site, SiteLike
from care_lens.subspace import applying, belonging, display, hub, set_operations, storage
from care_lens.subspace.calibration import ConformalScores
from care_lens.subspace.comparison import SubspaceComparison, compare_bases
from care_lens.subspace.contrast import Contrast, Metric
from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.fitting import Projection
from care_lens.subspace.linear_map import LinearMap
from care_lens.subspace.model_identity import Match, ModelIdentity
from care_lens.subspace.moments import Moments
from care_lens.subspace.overlap import DirectionOverlap, overlap_with_directions
from care_lens.subspace.rank_rule import RankRule
from care_lens.subspace.ranked_fit import RankName, fit_rows, fit_streamed
from care_lens.subspace.shrinkage import Shrinkage, Target
from care_lens.subspace.solvers import Solver

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from care_lens.subspace.uncertainty import SubspaceUncertainty

Modality = Literal["visual", "textual"]
Score = Literal["energy", "mahalanobis"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SafetySubspace:
    """Directions along which malicious activations stand out from benign ones, and the projector onto them.

    Made by :meth:`fit` or :meth:`load`. Tensors are float32. Float64 are kept: means so far from 0 that float32 would shift
    coordinates by more than 1e-5 benign standard deviations, and projectors so oblique that it would lose more than 1e-4 of them, which
    are then applied in float64. Columns are in the order of the eigenvalues, and
    each span of the first j columns is the subspace of rank j. ``write @ left.T`` is the projector P; for an
    orthogonal one both are ``basis``, for an oblique one ``left`` is ``read`` and ``write`` is ``C_b read``.

    Attributes:
        basis: [d, k] orthonormal basis of the span of the generalised eigenvectors.
        read: [d, k] generalised eigenvectors U with ``U^T C_b U = I`` (``U^T U = I`` with metric="identity");
            the malicious mean is on the positive side of each.
        write: [d, k] what the projector writes along.
        left: [d, k] the coordinates it removes; ``left.T @ write = I``.
        eigenvalues: [k] malicious over benign energy along each column of ``read``, descending; NaN where it
            is not known (unions and intersections).
        mean_benign: [d].
        mean_malicious: [d].
        site: Where the activations were taken, or None.
        modality: "visual", "textual" or None.
        model: The model they were taken from, or None.
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
    model: ModelIdentity | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        benign: Float[Tensor, "n_b d"],
        malicious: Float[Tensor, "n_m d"],
        *,
        rank: int | RankName | RankRule = "auto",
        contrast: Contrast = "second_moment",
        shrinkage: Shrinkage = "ledoit-wolf",
        projection: Projection = "oblique",
        solver: Solver = "auto",
        metric: Metric = "benign",
        site: SiteLike | None = None,
        modality: Modality | None = None,
        model: ModelIdentity | None = None,
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
                about 80 fits, 64 directions at most); "energy" or an ``EnergyRank``: those with a share of the
                fit's excess energy; "permutation" or a ``PermutationRank``: those whose eigenvalues permuted labels
                do not reach (20 fits); or any ``RankRule``, a function of eigenvalues and what they are compared with.
                With contrast="mean" it is 1.
            contrast: "second_moment": malicious second moment about the benign mean, which also sees a shift
                of the mean; "covariance": malicious covariance about its own mean, as in the paper; "mean":
                the difference of the means alone.
            shrinkage: Of both covariances: "ledoit-wolf", "oas", a weight in [0, 1], or None, towards a multiple of the
                identity; "diagonal": by Ledoit and Wolf's rule towards the covariance's own diagonal, where a few
                dimensions are far larger than the others.
            projection: "oblique" removes the coordinates with the least change of benign activations in the
                benign metric; "orthogonal" with the least Euclidean change.
            solver: "dual" (order n_b + n_m; fewer rows than dimensions), "dense" (order d), "iterative" (few directions
                of many rows in many dimensions), or "auto", the cheapest, which ``recipe`` names. They give the same
                subspace.
            metric: "benign": energy is measured against C_b. "identity": against the identity; with
                contrast="mean" the direction is then the difference of the means itself.
            site: Where the rows were taken.
            modality: Which modality's tokens they are.
            model: The model they are of.
            provenance: JSON-able notes: data, selection.
            groups: The item of each benign and of each malicious row, so that rows of one item never sit on
                both sides of the splits of rank="auto", and are relabelled together by a permutation. None: every
                row is an item by itself.
            seed: Of those splits and permutations.

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
            UserWarning: If a rule for the rank finds no direction; rank 1 is kept.
            IdenticalClassesWarning: If the two classes have the same rows, as far as the contrast looks.

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
        tensors, diagnostics = fit_rows(
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
            # Apple's GPUs have no float64.
            **{
                name: (t.float() if benign.device.type == "mps" else t).to(benign.device) for name, t in tensors.items()
            },
            site=None if site is None else Site.parse(site),
            modality=modality,
            model=model,
            diagnostics=diagnostics,
            provenance=dict(provenance or {}),
        )

    @classmethod
    def from_moments(
        cls,
        benign: Moments,
        malicious: Moments,
        *,
        rank: int | Literal["energy"] | RankRule,
        contrast: Contrast = "second_moment",
        shrinkage: Shrinkage = "ledoit-wolf",
        projection: Projection = "oblique",
        solver: Solver = "auto",
        metric: Metric = "benign",
        target: Target = "identity",
        site: SiteLike | None = None,
        modality: Modality | None = None,
        model: ModelIdentity | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> "SafetySubspace":
        """The fit of streamed moments, which never held all rows at once.

        Args:
            benign: Moments of the benign rows, in either form.
            malicious: Of the malicious ones.
            rank: Number of directions, a share of the energy, or a rule of your own with ``evidence`` "floor". What looks at
                rows (held-out ratios, permutations) needs :meth:`fit`.
            contrast: As for :meth:`fit`; likewise shrinkage, projection, solver, metric, site, modality, model and
                provenance.
            shrinkage: See :meth:`fit`.
            projection: See :meth:`fit`.
            solver: See :meth:`fit`.
            metric: See :meth:`fit`.
            target: What both covariances are shrunk towards, see ``care_lens.subspace.shrink``.
            site: See :meth:`fit`.
            modality: See :meth:`fit`.
            model: See :meth:`fit`.
            provenance: See :meth:`fit`.

        Returns:
            The subspace, on the CPU; that of :meth:`fit` on the same rows.

        Raises:
            SubspaceError: As for :meth:`fit`, and if the rank is a rule that needs rows.

        Warns:
            UserWarning: If the energy rule finds no direction; rank 1 is kept.

        Example:
            >>> import torch
            >>> from care_lens.subspace import Moments, SafetySubspace
            >>> rows = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
            >>> streamed = [Moments.from_rows(part[:30]).without_rows().update(part[30:]) for part in rows]
            >>> SafetySubspace.from_moments(*streamed, rank=2).equals(SafetySubspace.fit(*rows, rank=2))
            True
        """
        tensors, diagnostics = fit_streamed(
            benign,
            malicious,
            rank=rank,
            contrast=contrast,
            shrinkage=shrinkage,
            projection=projection,
            solver=solver,
            metric=metric,
            target=target,
        )
        return cls(
            **tensors,
            site=None if site is None else Site.parse(site),
            modality=modality,
            model=model,
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

    def projection(self) -> LinearMap:
        """P as a small linear map: ``P P = P``, its trace is k, and ``read^T P = read^T``."""
        return LinearMap(scale=0.0, write=self.write, left=self.left)

    def removal(self, alpha: float = 1.0) -> LinearMap:
        """``I - alpha P``, the linear part of :meth:`correction`.

        At alpha = 1 it is the complementary projector; in general its eigenvalues are 1 - alpha, k times, and 1.
        What it takes from benign activations, on average over their distribution as shrunk and in its metric,
        ``E ||alpha P (h - mean_benign)||^2`` in ``C_b^-1``, is ``alpha^2 k`` for an oblique P, the least of all
        projectors that remove these coordinates; in Euclidean length it is ``alpha^2 ||write||_F^2`` for an oblique
        P and ``alpha^2 tr(basis^T C_b basis)``, the least, for an orthogonal one.
        """
        return LinearMap(scale=1.0, write=-alpha * self.write, left=self.left)

    def correction(
        self, *, alpha: float = 1.0, beta: float = 1.0, target: Float[Tensor, "d"] | None = None
    ) -> LinearMap:
        """What :meth:`apply` does, as a map about its target; arguments, errors and warnings are those of it."""
        return applying.correction(self, alpha=alpha, beta=beta, target=target)

    def project(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """P h, without forming P: O(d k) a row.

        Args:
            h: [..., d] activations of any floating dtype.

        Returns:
            [..., d] in float32, or float64 if h is.

        Raises:
            SubspaceMismatchError: If h is of another width.
        """
        return applying.project(self, h)

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
        return applying.coordinates(self, h, centre=centre)

    def energy(self, h: Float[Tensor, "*batch d"], *, centre: bool = True) -> Float[Tensor, "*batch"]:
        """``||read^T (h - mean_benign)||^2``, k on average over the benign distribution of the fit (as
        shrunk).

        Args, Returns ([...]) and Raises are those of :meth:`coordinates`.
        """
        return self.coordinates(h, centre=centre).square().sum(dim=-1)

    def mahalanobis(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Mahalanobis distance from the benign mean within the subspace: the square root of :meth:`energy`.

        Among all activations with the same coordinates it is the distance of the nearest one, in the benign metric
        of the fit (as shrunk).

        Args, Returns ([...]) and Raises are those of :meth:`coordinates`, and:

        Raises:
            SubspaceError: If the fit or the operation that made it knows no benign metric.
        """
        if self.diagnostics.get("metric", "benign") != "benign":
            raise SubspaceError("metric must be 'benign' for a Mahalanobis distance, got 'identity'; use energy()")
        return self.energy(h).sqrt()

    def score(self, h: Float[Tensor, "*batch d"], kind: Score = "mahalanobis") -> Float[Tensor, "*batch"]:
        """:meth:`mahalanobis` or :meth:`energy`, by name; larger is less benign."""
        if kind not in get_args(Score):
            raise SubspaceError(f"score must be one of {get_args(Score)}, got {kind!r}")
        return self.mahalanobis(h) if kind == "mahalanobis" else self.energy(h)

    def calibrate(
        self, benign: Float[Tensor, "n d"], *, groups: Sequence[str] | None = None, score: Score = "mahalanobis"
    ) -> ConformalScores:
        """Scores of benign rows that the fit did not see, for p-values.

        Args:
            benign: [n, d] rows held out of the fit.
            groups: The item of each; an item counts with its largest score. None: every row is an item.
            score: Which score; p-values do not depend on it, since one is a function of the other.

        Returns:
            The calibration: ``calibrated.p_values(subspace.score(h))``. See ``care_lens.subspace.calibration``.

        Raises:
            SubspaceMismatchError: If the rows are of another width.
            TooFewRowsError: If there are none.
            NonFiniteError: If a row holds NaN or infinity.

        Example:
            >>> import torch
            >>> from care_lens.subspace import SafetySubspace
            >>> rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
            >>> malicious = rows[200:] * torch.tensor([9.0] + [1.0] * 7)
            >>> subspace = SafetySubspace.fit(rows[:100], malicious, rank=1)
            >>> calibrated = subspace.calibrate(rows[100:200])
            >>> float(calibrated.p_values(subspace.score(1e3 * malicious[:1]))[0]) == 1 / 101
            True
        """
        return ConformalScores.from_scores(self.score(benign, score), groups=groups)

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
            NonFiniteError: If the target is not finite.
            SubspaceError: If h is not of a floating dtype, alpha is negative or not finite, or beta not in [0, 1].

        Warns:
            UserWarning: If alpha is above 1.

        Notes:
            At alpha = 1 this is the paper's ``P_safe h + beta (I - P_safe) mean_benign`` with
            ``P_safe = I - P``.
        """
        return applying.apply(self, h, alpha=alpha, beta=beta, target=target)

    def truncate(self, rank: int) -> "SafetySubspace":
        """The subspace of the leading ``rank`` directions, as a fit of that rank would give.

        Raises:
            RankError: If rank is not between 1 and this subspace's.
        """
        return set_operations.leading(self, rank)

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

    def overlap(self, directions: Float[Tensor, "n d"], *, names: Sequence[str] | None = None) -> DirectionOverlap:
        """How much of given directions (refusal direction, SAE features, unembedding rows) lies in the subspace.

        Args, Returns and Raises are those of ``care_lens.subspace.overlap_with_directions``.
        """
        return overlap_with_directions(self.basis, directions, names=names)

    def equals(self, other: "SafetySubspace", *, tolerance: float = 1e-4) -> bool:
        """Whether the two do the same: place, projector, energy and means, whatever the basis of the span.

        Args:
            other: Of any site, modality and width.
            tolerance: Relative difference allowed, in Frobenius norm, of P, of ``read read^T`` (which decides the
                energy) and of the two means.

        Returns:
            True if site, modality, width, rank and all of these agree. Signs, order and rotations of columns,
            eigenvalues, model and notes do not count. The relation is not transitive, for which reason it is no
            ``==``.
        """
        return set_operations.equal(self, other, tolerance)

    def union(self, other: "SafetySubspace") -> "SafetySubspace":
        """The subspace of everything in either: its span is that of all directions of both.

        Two oblique fits on the same benign rows (attack families against one reference) give an oblique union in
        their common benign metric. Otherwise (visual and textual, orthogonal fits) no common metric is known: the
        union projects orthogonally, and ``read`` is the basis, so that energy is in the activations' own units.

        Args:
            other: Of the same width and site.

        Returns:
            The union. The benign mean is this subspace's where the two have one, else, as the
            malicious one, the average; modality and
            model are kept where they agree; eigenvalues are NaN, not known.

        Raises:
            SubspaceMismatchError: If width or site differ.
        """
        return set_operations.union(self, other)

    def intersect(self, other: "SafetySubspace", *, least_cosine: float = 0.9) -> "SafetySubspace":
        """The directions that the two nearly share, as midpoints of their principal vectors.

        Args:
            other: Of the same width and site.
            least_cosine: Pairs of principal vectors with this cosine or more are shared. 0.9 is 26 degrees;
                compare with what fits on resampled rows give (``uncertainty``).

        Returns:
            The intersection; metric, means and eigenvalues as for :meth:`union`.

        Raises:
            SubspaceMismatchError: If width or site differ.
            RankError: If no direction is shared.
            SubspaceError: If ``least_cosine`` is not in (0, 1].
        """
        return set_operations.intersect(self, other, least_cosine)

    def uncertainty(
        self,
        benign: Float[Tensor, "n_b d"],
        malicious: Float[Tensor, "n_m d"],
        *,
        groups: tuple[Sequence[str], Sequence[str]] | None = None,
        n_boot: int = 200,
        n_halves: int = 50,
        confidence: float = 0.95,
        seed: int = 0,
    ) -> "SubspaceUncertainty":
        """Intervals of the eigenvalues, stability of the span and energy on held-out rows, from repeated fits.

        Args, Returns and Raises are those of ``care_lens.subspace.measure_uncertainty``; the rows are those of the fit.
        """
        from care_lens.subspace.uncertainty import measure_uncertainty

        return measure_uncertainty(
            self,
            benign,
            malicious,
            groups=groups,
            n_boot=n_boot,
            n_halves=n_halves,
            confidence=confidence,
            seed=seed,
        )

    def with_uncertainty(self, measured: "SubspaceUncertainty") -> "SafetySubspace":
        """The same subspace with the summary of what was measured in its diagnostics, table, files and card."""
        return dataclasses.replace(self, diagnostics={**self.diagnostics, "uncertainty": measured.summary()})

    def check(
        self,
        *,
        site: SiteLike | None = None,
        modality: Modality | None = None,
        width: int | None = None,
        model: ModelIdentity | None = None,
        match: Match = "exact",
    ) -> None:
        """Refuse to be used where it does not belong; what is not given is not checked.

        Args:
            site: The site it is about to be used at; likewise modality and width, which must be those of the fit at
                every level of ``match``.
            modality: See above.
            width: See above.
            model: The model it is about to be used on.
            match: How much of the model must agree: "exact" (name, revision, architecture), "architecture", or
                "width" (nothing but the width, if given).

        Raises:
            SubspaceMismatchError: If one is not that of the fit, or the fit named none.
        """
        belonging.require(self, site=site, modality=modality, width=width, model=model, match=match)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SafetySubspace":
        """Move or cast the tensors; a new object."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device=device, dtype=dtype) for name in storage.TENSORS}
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
        return storage.save(self, directory)

    @classmethod
    def load(
        cls,
        directory: str | Path,
        *,
        site: SiteLike | None = None,
        modality: Modality | None = None,
        width: int | None = None,
        model: ModelIdentity | None = None,
        match: Match = "exact",
    ) -> "SafetySubspace":
        """Read what :meth:`save` wrote, in this version or an older one.

        Args:
            directory: Where.
            site: The site it will be used at; likewise modality, width and model. What is not given is not checked.
            modality: See above.
            width: See above.
            model: See above.
            match: How much of the model must agree, see :meth:`check`.

        Returns:
            The subspace, on the CPU.

        Raises:
            FileNotFoundError: If a file is not there.
            SubspaceFileError: If the files are damaged or of a newer schema.
            SubspaceMismatchError: If it was fitted for another site, modality, width or model.
        """
        subspace = cls(**storage.load_fields(directory))
        subspace.check(site=site, modality=modality, width=width, model=model, match=match)
        return subspace

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        license: str | None = None,
        description: str = "",
    ) -> str:
        """Upload to the Hugging Face hub, with a generated card; the repository is made if it does not exist.

        Args:
            repo_id: "owner/name".
            subfolder: Folder within the repository, such as "blocks.12/visual", for several in one.
            private: Whether a new repository is private.
            revision: Branch to commit to; None: the main one.
            message: Of the commit.
            license: Hub identifier of the license you give it; None: not stated.
            description: What it is for, for the card.

        Returns:
            The address of the commit.

        Raises:
            SubspaceError: If the subfolder is no plain path within the repository.
            huggingface_hub.errors.HfHubHTTPError: If the hub refuses; log in with ``hf auth login``.
        """
        return hub.push(
            self,
            repo_id,
            subfolder=subfolder,
            private=private,
            revision=revision,
            message=message,
            license=license,
            description=description,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        site: SiteLike | None = None,
        modality: Modality | None = None,
        width: int | None = None,
        model: ModelIdentity | None = None,
        match: Match = "exact",
    ) -> "SafetySubspace":
        """Load from the Hugging Face hub, or from a directory.

        Args:
            name_or_dir: "owner/name" on the hub, or a directory (which goes first).
            subfolder: Folder within it.
            revision: Branch, tag or commit on the hub; a commit is the only one that never changes.
            site: What it will be used for; likewise modality, width, model and match. See :meth:`load`.
            modality: See :meth:`load`.
            width: See :meth:`load`.
            model: See :meth:`load`.
            match: See :meth:`load`.

        Returns:
            The subspace, on the CPU.

        Raises:
            SubspaceFileError: If there is no subspace, or it is damaged or of a newer schema.
            SubspaceMismatchError: If it was fitted for another site, modality, width or model.
        """
        directory = hub.fetch(name_or_dir, subfolder=subfolder, revision=revision)
        return cls.load(directory, site=site, modality=modality, width=width, model=model, match=match)

    def card(self, *, repo_id: str | None = None, license: str | None = None, description: str = "") -> str:
        """The README that :meth:`push_to_hub` writes beside the files; markdown."""
        from care_lens.subspace.card import make_card

        return make_card(self, repo_id=repo_id, license=license, description=description)

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
