"""Options that are whole numbers, refused by name before anything is run."""

from collections.abc import Mapping
from operator import index
from typing import Any

from care_lens.core.errors import CareLensError


class MediationError(CareLensError, ValueError):
    """An argument of a sweep is not one that it can be run with; nothing has been run."""


def require_options(*, seed: int, least: Mapping[str, int] | None = None, **counts: Any) -> None:
    """Refuse what is no number of a kind that a sweep can use, before anything is run.

    Args:
        seed: Of draws: a whole number, 0 or more.
        least: The smallest value allowed of some counts, by name; 1 of the others.
        counts: Whole numbers by name: batch_size, n_boot, n_permutations.

    Raises:
        MediationError: Naming the first that is none.
    """
    bounds = {**dict.fromkeys(counts, 1), "seed": 0, **(least or {})}
    for name, value in {**counts, "seed": seed}.items():
        try:
            number = bounds[name] - 1 if isinstance(value, bool) else index(value)
        except TypeError:
            number = bounds[name] - 1
        if number < bounds[name]:
            why = "; a pair is two sequences" if name == "batch_size" and bounds[name] == 2 else ""
            raise MediationError(f"{name} must be {bounds[name]} or more, got {value!r}; give a whole number{why}")
