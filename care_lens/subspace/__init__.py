"""Safety subspaces: moments, shrinkage, generalised eigenproblems, projectors. Pure numerics, no model code.

Method: Fu et al. 2026 (arXiv:2603.27240), with the differences that the docstring of
:meth:`SafetySubspace.fit` states.
Sign convention: larger eigenvalues and positive coordinates mean malicious. Fits are float64, application
float32.
"""

from care_lens.core.arguments import checked
from care_lens.subspace.calibration import ConformalScores
from care_lens.subspace.comparison import SubspaceComparison, compare_bases
from care_lens.subspace.contrast import Contrast, Metric
from care_lens.subspace.controls import edit_norm_ratio, random_isometry, random_like
from care_lens.subspace.directions import classifier_direction, subspace_along
from care_lens.subspace.errors import (
    ConvergenceError,
    IdenticalClassesWarning,
    NonFiniteError,
    RankError,
    RowsNeededError,
    SingularCovarianceError,
    SubspaceError,
    SubspaceFileError,
    SubspaceMismatchError,
    TooFewRowsError,
    WidthError,
)
from care_lens.subspace.families import (
    FamilyFits,
    SharedSubspace,
    compare_references,
    fit_families,
    overlaps,
    pool,
    shared_subspace,
)
from care_lens.subspace.fitting import Projection
from care_lens.subspace.linear_map import LinearMap
from care_lens.subspace.memory import MemoryPlan, plan_memory
from care_lens.subspace.model_identity import Match, ModelIdentity
from care_lens.subspace.moments import Moments
from care_lens.subspace.moments_table import MomentsKey, MomentsTable, fold_of_group
from care_lens.subspace.overlap import DirectionOverlap, overlap_with_directions
from care_lens.subspace.rank_rule import EnergyRank, HeldOutRank, PermutationRank, RankRule
from care_lens.subspace.rank_rules import SpectrumRank
from care_lens.subspace.safety_subspace import Modality, SafetySubspace
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance, Target, shrink, shrinkage_weight
from care_lens.subspace.solvers import PencilSolution, Solver, solve_pencil
from care_lens.subspace.uncertainty import SubspaceUncertainty, measure_uncertainty

__all__ = [
    "ConformalScores",
    "Contrast",
    "ConvergenceError",
    "DirectionOverlap",
    "EnergyRank",
    "FamilyFits",
    "HeldOutRank",
    "IdenticalClassesWarning",
    "LinearMap",
    "Match",
    "MemoryPlan",
    "Metric",
    "Modality",
    "ModelIdentity",
    "Moments",
    "MomentsKey",
    "MomentsTable",
    "NonFiniteError",
    "PencilSolution",
    "PermutationRank",
    "Projection",
    "RankError",
    "RankRule",
    "RowsNeededError",
    "SafetySubspace",
    "SharedSubspace",
    "Shrinkage",
    "ShrunkCovariance",
    "SingularCovarianceError",
    "Solver",
    "SpectrumRank",
    "SubspaceComparison",
    "SubspaceError",
    "SubspaceFileError",
    "SubspaceMismatchError",
    "SubspaceUncertainty",
    "Target",
    "TooFewRowsError",
    "WidthError",
    "classifier_direction",
    "compare_bases",
    "compare_references",
    "edit_norm_ratio",
    "fit_families",
    "fold_of_group",
    "measure_uncertainty",
    "overlap_with_directions",
    "overlaps",
    "plan_memory",
    "pool",
    "random_isometry",
    "random_like",
    "shared_subspace",
    "shrink",
    "shrinkage_weight",
    "solve_pencil",
    "subspace_along",
]

checked(globals(), __all__)
