"""Arguments of the wrong type are refused where they come in, by name, before anything has run.

The rooms of the package call :func:`checked` on what they export. Types are those of the annotations; the check is beartype's, which looks at
one item of a sequence, so that it costs microseconds. Numpy's numbers count as Python's, and whole numbers as floats.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype
from beartype.roar import BeartypeDecorHintException

from care_lens.core.errors import CareLensError


class ArgumentError(CareLensError, TypeError, ValueError):
    """An argument is of another type than the function's signature says. The message names both."""


_check: Any = beartype
_overrides: Any = FrozenDict
_CONF = BeartypeConf(
    violation_type=ArgumentError,
    hint_overrides=_overrides(
        {int: int | np.integer, float: float | int | np.floating | np.integer, bool: bool | np.bool_}
    ),
)


def checked(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Check the arguments of what a room exports: its functions there, and the methods of its own classes.

    Args:
        namespace: The room's ``globals()``; the functions in it are replaced.
        names: What it exports.
    """
    room = namespace["__name__"]
    for name in names:
        value = namespace[name]
        if not callable(value) or not getattr(value, "__module__", "").startswith(room):
            continue
        if isinstance(value, type) and (getattr(value, "_is_protocol", False) or issubclass(value, BaseException)):
            continue
        try:
            namespace[name] = _check(value, conf=_CONF)
        except BeartypeDecorHintException as error:
            raise TypeError(f"{room}.{name} must have annotations that can be checked: {error}") from error
