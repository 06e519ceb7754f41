"""A model and an outcome for the tests of the lens."""

from twins import margin, model  # noqa: F401
