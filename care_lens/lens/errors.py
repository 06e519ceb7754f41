"""What the lens refuses."""

from care_lens.core.errors import CareLensError


class LensError(CareLensError, ValueError):
    """A lens cannot be laid on what was given; the message says what to give instead."""
