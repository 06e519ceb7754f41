"""What mediation refuses."""

from care_lens.core.options import MediationError

__all__ = ["MediationError"]
