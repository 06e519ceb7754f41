"""What can be wrong with the rows of a fit, with a pencil, or with a stored subspace. All are ValueErrors."""

from care_lens.core.errors import ArtifactError, CareLensError


class SubspaceError(CareLensError, ValueError):
    """Base of every error of ``care_lens.subspace``."""


class NonFiniteError(SubspaceError):
    """Rows hold NaN or infinity."""


class TooFewRowsError(SubspaceError):
    """A class has fewer rows, or fewer groups of rows, than its statistics need."""


class WidthError(SubspaceError):
    """The two classes differ in width, or rows are not [n, d]."""


class SingularCovarianceError(SubspaceError):
    """The benign covariance cannot be inverted at working precision."""


class RankError(SubspaceError):
    """More directions were asked for than the rows determine.

    Attributes:
        largest: The largest rank that can be asked for.
    """

    def __init__(self, message: str, *, largest: int) -> None:
        super().__init__(message)
        self.largest = largest


class RowsNeededError(SubspaceError):
    """Rows were asked of moments that keep only sums: permutations and row bootstraps cannot be made from those."""


class ConvergenceError(SubspaceError):
    """An iterative eigensolver stopped before its pairs were accurate."""


class SubspaceMismatchError(SubspaceError):
    """A subspace was about to be used at another site, modality or model width than it was fitted for."""


class SubspaceFileError(SubspaceError, ArtifactError):
    """A stored subspace is damaged, incomplete, of another kind, or of a newer schema."""


class IdenticalClassesWarning(UserWarning):
    """The two classes of a fit have the same rows: whatever direction comes out was picked by rounding."""
