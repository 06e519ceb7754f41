"""How far a step is: a bar where somebody can see it, one line in the log where nobody can, and a word on how to go on after Ctrl-C.

with Steps(total=20, desc="capturing", resume="give checkpoint='rows' again") as steps:
    for batch in batches:
        ...
        steps.update()
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
log = logging.getLogger(__name__)


def bars_are_seen() -> bool:
    """Whether a progress bar would be drawn for somebody: standard error is a terminal, or this is a notebook."""
    if sys.stderr is not None and sys.stderr.isatty():
        return True
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def resume_from(checkpoint: Any) -> str:
    """How a step with ``checkpoint=`` goes on, for :class:`Steps`.

    Args:
        checkpoint: What the call was given; None: nothing is kept.
    """
    if checkpoint is None:
        return "start again with checkpoint='folder', in which finished batches are kept"
    return f"make the same call with checkpoint={str(checkpoint)!r} again"


def resume_from_store(path: Any) -> str:
    """How a step with a store of answers goes on, for :class:`Steps`.

    Args:
        path: The store's file; None: it is in memory.
    """
    if path is None:
        return "start again with store=GenerationStore('answers.jsonl'), in which finished answers are kept"
    return f"make the same call with store=GenerationStore({str(path)!r}) again"


class Steps(Generic[Item]):
    """A progress bar, or where there is no terminal and no notebook one line in the log at the end.

    A ``with`` block around the loop is what sees Ctrl-C: the log then says how far the step was and how to go on.

    Args:
        items: What is gone through; None: :meth:`update` is called.
        total: Number of steps; None: as many as there are items.
        desc: What is being done.
        disable: Whether to show nothing and to log nothing.
        initial: How many steps were done before.
        resume: How the work goes on after it was stopped, an imperative clause; empty: nothing is said.
    """

    def __init__(
        self,
        items: Iterable[Item] = (),
        *,
        total: int | None = None,
        desc: str = "",
        disable: bool = False,
        initial: int = 0,
        resume: str = "",
    ) -> None:
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        self.n, self.total, self.desc, self.resume = initial, total, desc, resume
        self._items, self._silent, self._begun, self._open = items, disable, time.monotonic(), True
        self._bar = tqdm(total=total, desc=desc, initial=initial, disable=disable or not bars_are_seen())

    def __iter__(self) -> Iterator[Item]:
        for item in self._items:
            yield item
            self.update()
        self.close()

    def update(self, n: int = 1) -> None:
        """Note that ``n`` more steps are done."""
        self.n += n
        self._bar.update(n)

    def set_description(self, desc: str) -> None:
        """Say what is being done now."""
        self.desc = desc
        self._bar.set_description(desc)

    def set_postfix(self, **figures: Any) -> None:
        """Show figures behind the bar."""
        self._bar.set_postfix(**figures)

    def set_postfix_str(self, text: str) -> None:
        """Show a text behind the bar."""
        self._bar.set_postfix_str(text)

    def __enter__(self) -> "Steps[Item]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._open = False
        self._bar.close()
        if issubclass(kind, KeyboardInterrupt) and self.resume and not self._silent:
            log.warning("%s was stopped at %s; to go on, %s", self.desc, self._far(), self.resume)

    def close(self) -> None:
        """End the bar; where none is seen, the log gets its line."""
        if self._open and self._bar.disable and not self._silent and self.n:
            log.info("%s: %s in %.1f s", self.desc, self._far(), time.monotonic() - self._begun)
        self._open = False
        self._bar.close()

    def _far(self) -> str:
        return f"{self.n}" if self.total is None else f"{self.n} of {self.total}"
