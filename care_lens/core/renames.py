"""Arguments and names that are called otherwise now: the earlier name works for one release, and says what it is called now."""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator that takes arguments under their earlier names too, with a ``FutureWarning`` at the caller's line.

    Args:
        **names: The present name of each earlier one.

    Returns:
        The decorator. A call that gives both names raises TypeError.

    Example:
        >>> import warnings
        >>> @renamed(select="positions")
        ... def taken(positions="all"):
        ...     return positions
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     taken(select="last")
        'last'
        >>> print(told[0].message)
        select of taken is called positions now; the earlier name goes with the next release
    """

    def decorate(call: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(call)
        def taking(*args: P.args, **kwargs: P.kwargs) -> T:
            for old in [name for name in names if name in kwargs]:
                new = names[old]
                if new in kwargs:
                    raise TypeError(f"{call.__name__}() got {new} and {old}, its earlier name; give {new} alone")
                warnings.warn(
                    f"{old} of {call.__name__} is called {new} now; the earlier name goes with the next release",
                    FutureWarning,
                    stacklevel=_outside(),
                )
                kwargs[new] = kwargs.pop(old)
            return call(*args, **kwargs)

        return taking

    return decorate


def renamed_fields(**names: str) -> Callable[[type[T]], type[T]]:
    """A decorator of a dataclass that takes and gives fields under their earlier names too, with a ``FutureWarning`` at the caller's line.

    Args:
        **names: The present name of each earlier one.

    Example:
        >>> import warnings
        >>> from dataclasses import dataclass
        >>> @renamed_fields(level="significance")
        ... @dataclass(frozen=True)
        ... class Rule:
        ...     significance: float = 0.05
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     Rule(level=0.1).level
        0.1
        >>> print(told[0].message)
        level of Rule is called significance now; the earlier name goes with the next release
    """

    def decorate(cls: type[T]) -> type[T]:
        make: Any = cls.__init__
        shown = functools.wraps(make)(lambda self, *args, **kwargs: make(self, *args, **kwargs))
        shown.__name__ = cls.__name__
        take = renamed(**names)(shown)

        @functools.wraps(take)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            # replace() gives each present field too; it is the last frame before the caller's.
            if sys._getframe(_outside() - 2).f_globals.get("__name__") == "dataclasses":
                for new in {names[old] for old in names if old in kwargs}:
                    kwargs.pop(new, None)
            take(self, *args, **kwargs)

        setattr(cls, "__init__", init)  # noqa: B010
        for old, new in names.items():
            setattr(cls, old, _earlier(cls.__name__, old, new))
        return cls

    return decorate


def _earlier(owner: str, old: str, new: str) -> property:
    def read(self: Any) -> Any:
        warnings.warn(
            f"{old} of {owner} is called {new} now; the earlier name goes with the next release",
            FutureWarning,
            stacklevel=_outside(),
        )
        return getattr(self, new)

    return property(read)


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that gives some names under their earlier names, with a ``FutureWarning`` at the caller's line.

    Args:
        module: The module's ``__name__``.
        names: Where each earlier name is now, as "module.name".
    """

    def getattr_of(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, present = names[name].rpartition(".")
        warnings.warn(
            f"{module}.{name} is {names[name]} now; the earlier name goes with the next release",
            FutureWarning,
            stacklevel=_outside(),
        )
        return getattr(import_module(home), present)

    return getattr_of


# Without annotations, since the check that the tests put around annotated functions would be one more frame.
def _outside():
    """The ``stacklevel`` of the first frame outside of the package, of the import system and of ``dataclasses``, for a warning of the function
    that calls this one. Frames of ``importlib._bootstrap`` do not count: ``warnings.warn`` passes over them."""
    level, frame = 1, sys._getframe(1)
    while _room(frame) in ("care_lens", "importlib", "dataclasses") and frame.f_back is not None:
        frame = frame.f_back
        level += "importlib._bootstrap" not in str(frame.f_globals.get("__name__", ""))
    return level


def _room(frame):
    return str(frame.f_globals.get("__name__", "")).split(".")[0]
