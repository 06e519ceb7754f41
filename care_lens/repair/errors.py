"""What can be wrong with a repair: with its parts, with what it is put on, and with its files. All are ValueErrors."""

from collections.abc import Mapping

from care_lens.core.errors import ArtifactError, CareLensError


class RepairError(CareLensError, ValueError):
    """Base of the errors of ``care_lens.repair``: a part or an option of a repair makes no sense."""


class TooFewCalibrationError(RepairError):
    """There are too few benign scores for the epsilon asked for."""


class RepairMismatchError(RepairError):
    """A repair was about to be put on another model than it was made for."""


class RepairFileError(RepairError, ArtifactError):
    """A stored repair is damaged, incomplete, of a kind that is not registered, or of a newer schema."""


class AttachError(RepairError):
    """A defence cannot be attached to a plain model; the message says why."""


class BakeError(RepairError):
    """A repair, or parts of it, cannot be folded into weights; ``reasons`` says why, part by part.

    Attributes:
        reasons: Part ("visual[0] at blocks.3.hook_mlp_out") to why it cannot be.
    """

    def __init__(self, message: str, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = dict(reasons or {})


class KindError(CareLensError, TypeError, ValueError):
    """A class cannot be registered, or a part of a repair is of a class that is not."""


class FlatScoresError(RepairError):
    """A reader's scores of benign examples are not finite or do not vary, as where short answers have no such token: it has no unit."""
