"""Fitting again with the options of a fit: what resampling, permutation and cross-validation repeat."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.contrast import Contrast, Metric, class_moments, pencil
from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.fitting import floor_of
from care_lens.subspace.moments import Moments
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance, Target
from care_lens.subspace.solvers import PencilSolution, Solver, solve_pencil

LARGEST_RANK = 64
"""Directions that a rule for the rank looks at, at most."""


@dataclass(frozen=True)
class Recipe:
    """The options of a fit that decide its eigenvectors; see ``SafetySubspace.fit``."""

    contrast: Contrast
    metric: Metric
    shrinkage: Shrinkage
    solver: Solver
    target: Target = "identity"

    @classmethod
    def of(cls, diagnostics: Mapping[str, Any]) -> "Recipe":
        """The recipe of a fit, from its diagnostics.

        Raises:
            SubspaceError: If they are not those of a fit (as for a union or an intersection).
        """
        if missing := [name for name in ("contrast", "metric", "shrinkage", "n_benign") if name not in diagnostics]:
            raise SubspaceError(
                f"subspace must be a fit to be fitted again, its diagnostics lack {missing}; use the fits that it "
                "was made of"
            )
        return cls(
            diagnostics["contrast"],
            diagnostics["metric"],
            diagnostics["shrinkage"],
            "auto",
            diagnostics.get("shrinkage_target", "identity"),
        )

    def pencil(self, benign: Moments, malicious: Moments) -> tuple[ShrunkCovariance, ShrunkCovariance]:
        """C_m and C_b of the moments."""
        return pencil(
            benign,
            malicious,
            contrast=self.contrast,
            metric=self.metric,
            shrinkage=self.shrinkage,
            # shrinkage="diagonal" says its target itself.
            target="identity" if self.shrinkage == "diagonal" else self.target,
        )

    def spectrum(self, benign: Moments, malicious: Moments, rank: int) -> tuple[PencilSolution, float]:
        """The leading eigenpairs, fewer where the rows determine fewer, and the eigenvalue of the directions that
        no row speaks of (0 where there is no single one)."""
        numerator, denominator = self.pencil(benign, malicious)
        solution = solve_pencil(numerator, denominator, rank=min(rank, numerator.width), solver=self.solver, clip=True)
        return solution, floor_of(numerator, denominator) or 0.0

    def moments(self, benign: Float[Tensor, "n_b d"], malicious: Float[Tensor, "n_m d"]) -> tuple[Moments, Moments]:
        """Of rows; errors as for ``SafetySubspace.fit``."""
        return class_moments(benign, malicious, self.contrast, self.metric)

    def solve(self, benign: Float[Tensor, "n_b d"], malicious: Float[Tensor, "n_m d"], rank: int) -> PencilSolution:
        """The leading eigenpairs for rows, fewer where they determine fewer."""
        return self.spectrum(*self.moments(benign, malicious), rank)[0]

    def directions(
        self, benign: Float[Tensor, "n_b d"], malicious: Float[Tensor, "n_m d"], rank: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[d, k] eigenvectors, and the [d] centres of benign and of malicious energy."""
        moments = self.moments(benign, malicious)
        solution = self.spectrum(*moments, rank)[0]
        centre = moments[1].mean if self.contrast == "covariance" else moments[0].mean
        return solution.vectors, moments[0].mean, centre

    def leading(
        self, benign: Float[Tensor, "n_b d"], malicious: Float[Tensor, "n_m d"]
    ) -> tuple[float, Float[Tensor, "d 1"]]:
        """The first eigenvalue, and ``C_b u`` of its eigenvector; 0 and 0 if the rows determine no direction."""
        numerator, denominator = self.pencil(*self.moments(benign, malicious))
        solution = solve_pencil(numerator, denominator, rank=1, solver=self.solver, clip=True)
        if len(solution.eigenvalues) == 0:
            return 0.0, torch.zeros(numerator.width, 1, dtype=torch.float64)
        return float(solution.eigenvalues[0]), denominator.times(solution.vectors)
