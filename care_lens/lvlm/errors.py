"""What a hooked model refuses, by name."""

from care_lens.core.errors import CareLensError


class HookError(CareLensError, ValueError, TypeError):
    """A hook, or the place it was given for, cannot be what was meant: what it returned does not fit its activation, it is on a
    model that computes its layers again without it, or it needs a prepared batch."""


class ThreadError(CareLensError, RuntimeError):
    """A model is run in a thread that has no hooks of its own while another thread has hooks or a repair on it."""


class GenerationOptionError(CareLensError, ValueError):
    """Options of generation that contradict one another, or under which the hooks could not act as they should."""
