"""The base of the package's own errors: ``except CareLensError`` catches what care_lens refuses, and nothing else's faults.

An error that says that an argument is wrong is a ValueError (or TypeError) too, so that code which catches those goes on working.
"""


class CareLensError(Exception):
    """Base of the named errors of care_lens."""


class ArtifactError(CareLensError, ValueError):
    """A file that care_lens wrote is damaged, incomplete, of another kind, of a newer schema, or not care_lens's at all."""


class InUseError(CareLensError, RuntimeError):
    """Another process works in this folder or on this file."""
