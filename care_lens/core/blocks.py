"""``with`` blocks that say so when they are forgotten: ``repair.on(lvlm)`` alone puts nothing on a model.

    @with_block("repair.on(lvlm)")
    def on(self, lvlm):
        ...
        yield lvlm

It is ``contextlib.contextmanager`` with two differences: what is made and thrown away without having been entered warns, and what is
asked of it as if it were the model is answered with what to write.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from types import TracebackType
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar

Inside = TypeVar("Inside", covariant=True)
Args = ParamSpec("Args")


class UnusedBlockWarning(UserWarning):
    """A context manager was made and thrown away without a ``with`` block: nothing has been done."""


class WithBlock(ContextDecorator, AbstractContextManager[Inside], Generic[Inside]):
    """A context manager that was made by a function under :func:`with_block`; it may be entered several times, one after the other.

    Args:
        make: Makes the context manager that does the work; called on entering.
        written: How the call is written, for messages.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Inside]], written: str) -> None:
        self._used, self._written, self._make = False, written, make
        self._open: list[AbstractContextManager[Inside]] = []

    def __enter__(self) -> Inside:
        self._used = True
        block = self._make()
        inside = block.__enter__()
        self._open.append(block)
        return inside

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.pop().__exit__(kind, error, trace)

    def __call__(self, func: Any) -> Any:
        self._used = True
        return super().__call__(func)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        written = self.__dict__.get("_written", "it")
        raise AttributeError(
            f"{written} must be entered before anything is done with it, got {name!r} asked of it; write `with {written} as inside:`"
        )

    def __repr__(self) -> str:
        return f"<{self._written}, to be entered: `with {self._written}: ...`>"

    def __del__(self) -> None:
        if not self.__dict__.get("_used", True):
            warnings.warn(
                f"{self._written} was made and not entered, so that nothing was done; write `with {self._written}: ...`",
                UnusedBlockWarning,
                stacklevel=2,
            )


def with_block(
    written: str,
) -> Callable[[Callable[Args, Iterator[Inside]]], Callable[Args, WithBlock[Inside]]]:
    """Make a generator function one that gives a context manager, as ``contextlib.contextmanager`` does, which warns if it is forgotten.

    Args:
        written: How a call of it is written, for messages.

    Example:
        >>> @with_block("lamp.on()")
        ... def on():
        ...     yield "light"
        >>> with on() as seen:
        ...     print(seen)
        light
    """

    def decorate(function: Callable[Args, Iterator[Inside]]) -> Callable[Args, WithBlock[Inside]]:
        managed = contextmanager(function)

        @functools.wraps(function)
        def made(*args: Args.args, **kwargs: Args.kwargs) -> WithBlock[Inside]:
            return WithBlock(lambda: managed(*args, **kwargs), written)

        return made

    return decorate
