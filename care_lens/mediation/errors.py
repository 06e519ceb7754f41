"""What mediation refuses."""

from care_lens.core.errors import CareLensError


class MediationError(CareLensError, ValueError):
    """An argument of a sweep is not one that it can be run with; nothing has been run."""
