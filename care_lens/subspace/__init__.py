"""Safety subspaces: moments, shrinkage, generalised eigenproblems, projectors. Pure numerics, no model code.

Method: Fu et al. 2026 (arXiv:2603.27240), with the differences that the docstring of
:meth:`SafetySubspace.fit` states.
Sign convention: larger eigenvalues and positive coordinates mean malicious. Fits are float64, application
float32.
"""

from care_lens.subspace.comparison import SubspaceComparison, compare_bases
from care_lens.subspace.contrast import Contrast, Metric
from care_lens.subspace.controls import edit_norm_ratio, random_like
from care_lens.subspace.errors import (
    NonFiniteError,
    RankError,
    SingularCovarianceError,
    SubspaceError,
    SubspaceFileError,
    SubspaceMismatchError,
    TooFewRowsError,
    WidthError,
)
from care_lens.subspace.fitting import Projection
from care_lens.subspace.moments import Moments
from care_lens.subspace.safety_subspace import Modality, SafetySubspace
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance, shrink, shrinkage_weight
from care_lens.subspace.solvers import PencilSolution, Solver, solve_pencil

__all__ = [
    "Contrast",
    "Metric",
    "Modality",
    "Moments",
    "NonFiniteError",
    "PencilSolution",
    "Projection",
    "RankError",
    "SafetySubspace",
    "Shrinkage",
    "ShrunkCovariance",
    "SingularCovarianceError",
    "Solver",
    "SubspaceComparison",
    "SubspaceError",
    "SubspaceFileError",
    "SubspaceMismatchError",
    "TooFewRowsError",
    "WidthError",
    "compare_bases",
    "edit_norm_ratio",
    "random_like",
    "shrink",
    "shrinkage_weight",
    "solve_pencil",
]
