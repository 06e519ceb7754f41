"""Names that are not there: an error that lists those that are, the nearest first."""

import difflib
import re
from collections.abc import Iterable
from typing import Any, TypeVar

from care_lens.core.errors import CareLensError

Value = TypeVar("Value")

_MOST = 12


class NotHeldError(CareLensError, KeyError):
    """What was asked for by name is not there. The message says what is."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows its message in quotes


def not_held(what: str, wanted: Any, held: Iterable[Any], *, advice: str = "") -> NotHeldError:
    """The error for a name that is not there.

    Args:
        what: What the names are of, in the singular: "site", "pair set".
        wanted: The name that was asked for.
        held: Those that are there.
        advice: What to do, where it is more than to take one of them.
    """
    names = [str(name) for name in held]
    near = difflib.get_close_matches(str(wanted), names, n=3, cutoff=0.6)
    # another number is another layer or item, no slip of the pen
    other_number = bool(near) and _numberless(near[0]) == _numberless(str(wanted))
    shown = [*near, *(name for name in names if name not in near)][:_MOST]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    there = f"one of {', '.join(map(repr, shown))}{more}" if names else "one that is there, and there is none"
    hint = f"; did you mean {near[0]!r}?" if near and not other_number else ""
    return NotHeldError(f"{what} must be {there}, got {wanted!r}{f'; {advice}' if advice else ''}{hint}")


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


class Named(dict[str, Value]):
    """A dictionary whose error for a name that is not there lists those that are.

    Args:
        given: As for a dictionary.
        what: What the names are of, in the singular.
    """

    def __init__(self, given: Any = (), *, what: str = "name") -> None:
        super().__init__(given)
        self._what = what

    def __missing__(self, name: Any) -> Value:
        raise not_held(self._what, name, self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _named, (self._what, dict(self))

    def copy(self) -> "Named[Value]":
        """A copy that has the same error."""
        return type(self)(self, what=self._what)


def _named(what: str, given: dict[str, Any]) -> Named[Any]:
    return Named(given, what=what)
