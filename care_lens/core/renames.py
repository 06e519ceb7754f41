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
        setattr(cls, "__init__", renamed(**names)(shown))  # noqa: B010
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


def _outside() -> int:
    """The ``stacklevel`` of the first frame outside of the package and of the import system, for a warning of the function that calls this one."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        # warnings.warn counts no frame of the import system itself; ``from package import name`` asks the package out of one.
        counted = not ("importlib" in frame.f_code.co_filename and "_bootstrap" in frame.f_code.co_filename)
        room = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if counted and room not in ("care_lens", "importlib"):
            break
        level, frame = level + counted, frame.f_back
    return level
