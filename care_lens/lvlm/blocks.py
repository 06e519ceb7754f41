"""Whose hooks are whose: blocks that threads have open on one model, and the turns in which they run it.

A block is what ``with lvlm.hooks(...)`` or ``with repair.on(lvlm)`` opens. It belongs to the thread that opened it, and it is closed
by what it is, not by when it was opened. Running a model keeps state in its hook points, so that threads run it one after another.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from care_lens.lvlm.advice import HOOKED
from care_lens.lvlm.errors import ThreadError

CARRIED = (
    "the block whose hooks were carried must be open while the function runs, got one that was left; wait for the thread "
    "(thread.join()) before leaving the block or removing the repair"
)


@dataclass(eq=False)
class Block:
    """What one ``with`` block put on a model.

    Attributes:
        make: From a batch to its hooks; None for a block of fixed hooks.
        threads: The threads for which it acts.
        everywhere: Whether it acts in every thread.
    """

    make: Callable[..., Any] | None = None
    threads: set[threading.Thread] = field(default_factory=set)
    everywhere: bool = False

    @property
    def acts(self) -> bool:
        """Whether it acts in the thread that asks."""
        return self.everywhere or threading.current_thread() in self.threads


class Blocks:
    """The open blocks of one model, and the lock under which it runs.

    Args:
        advice: What a thread that is refused is told to do.
    """

    def __init__(self, advice: str = HOOKED.threads) -> None:
        self._advice = advice
        self.lock = threading.RLock()
        self._open: list[Block] = []
        self._here = threading.local()

    @property
    def mine(self) -> list[Block]:
        """Those that act in this thread, in the order in which they were opened."""
        return [] if self._muted else [block for block in self._open if block.acts]

    @property
    def makers(self) -> list[Callable[..., Any]]:
        """What makes hooks for each batch in this thread."""
        return [block.make for block in self.mine if block.make is not None]

    @property
    def _muted(self) -> bool:
        return getattr(self._here, "muted", False)

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Have no block act in this thread, in the middle of a run too."""
        before = self._muted
        self._here.muted = True
        try:
            yield
        finally:
            self._here.muted = before

    @contextmanager
    def for_every_thread(self) -> Iterator[None]:
        """Have the blocks that this thread opens meanwhile act in every thread."""
        before = getattr(self._here, "everywhere", False)
        self._here.everywhere = True
        try:
            yield
        finally:
            self._here.everywhere = before

    @property
    def open(self) -> int:
        """How many blocks are open."""
        return len(self._open)

    @property
    def running(self) -> bool:
        """Whether this thread is inside a run whose hooks are on already."""
        return getattr(self._here, "depth", 0) > 0

    @contextmanager
    def opened(self, make: Callable[..., Any] | None = None) -> Iterator[Block]:
        """Open a block for this thread, until it is left, from whichever thread and in whichever order."""
        block = Block(make, {threading.current_thread()}, getattr(self._here, "everywhere", False))
        with self.lock:
            self._open.append(block)
        try:
            yield block
        finally:
            with self.lock:
                self._open = [other for other in self._open if other is not block]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread runs the model, and keep others waiting.

        Raises:
            ThreadError: If this thread has no block and another one has.
        """
        with self.lock:
            self.require_mine()
            yield

    @contextmanager
    def run(self) -> Iterator[None]:
        """Mark this thread's run, so that the model's own forward passes inside it ask for nothing more."""
        self._here.depth = getattr(self._here, "depth", 0) + 1
        try:
            yield
        finally:
            self._here.depth -= 1

    def require_mine(self) -> None:
        """Refuse a thread without blocks where another has one, and one whose carried blocks were left.

        Raises:
            ThreadError: As said.
        """
        if self.running or self._muted:
            return
        if [block for block in getattr(self._here, "carried", ()) if block not in self._open]:
            raise ThreadError(CARRIED)
        if not self._open or self.mine:
            return
        others = {t.name for block in self._open for t in block.threads if t.is_alive()}
        if others:
            raise ThreadError(
                f"hooks or a repair are on this model in thread {sorted(others)}, and they belong to the thread that put them "
                f"there; thread {threading.current_thread().name!r} has none, so that nobody can say whether they are meant here. "
                f"{self._advice}"
            )

    @contextmanager
    def lent(self, blocks: list[Block]) -> Iterator[None]:
        """Have another thread's blocks act in this one.

        Raises:
            ThreadError: If one of them is closed.
        """
        thread, before = threading.current_thread(), getattr(self._here, "carried", ())
        with self.lock:
            if [block for block in blocks if block not in self._open]:
                raise ThreadError(CARRIED)
            added = [block for block in blocks if thread not in block.threads]
            for block in added:
                block.threads.add(thread)
            self._here.carried = (*before, *blocks)
        try:
            yield
        finally:
            with self.lock:
                self._here.carried = before
                for block in added:
                    block.threads.discard(thread)
