"""The model, the pairs and the outcome of the tests of mediation, which the tests of replay share."""

from twins import margin, model, pairs, pictured  # noqa: F401
