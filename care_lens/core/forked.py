"""Independent pieces of work on a CPU, shared between this process and copies of it.

::

    with in_workers(4):
        evaluate(lvlm, suites, defences, judge=judge)  # batches of answers in four processes

A copy (a fork) has the model, the hooks on it and everything else as they are at that moment, shares their memory, and does its share of the
pieces with one thread of torch. What it changes in its own memory is lost; what a piece returns comes back. At the sizes of small models
threads gain little, since each operation is short.
"""

import contextlib
import ctypes
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

_WORKERS: ContextVar[int] = ContextVar("care_lens_workers", default=1)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl (linux/prctl.h)

Job = TypeVar("Job")
Made = TypeVar("Made")


@contextlib.contextmanager
def in_workers(n: int) -> Iterator[None]:
    """Inside, answers of a model on a CPU are generated in n processes, and a run makes its independent parts in them.

    Where processes cannot be forked (Windows, macOS), and on other devices, this one does all. Inside, what watches a generation from outside (a
    hook that appends to a list, ``repair.recording()``) sees nothing of what the copies do: leave workers at 1 for that.

    Args:
        n: How many processes; 1: this one alone.

    Raises:
        ValueError: If n is below 1.

    Example:
        >>> from care_lens.core.forked import in_workers
        >>> with in_workers(2):
        ...     pass
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n must be a number of processes from 1, got {n!r}")
    token = _WORKERS.set(n)
    try:
        yield
    finally:
        _WORKERS.reset(token)


def workers() -> int:
    """In how many processes :func:`forked` works here: what :func:`in_workers` says, or 1 where processes cannot be forked.

    Example:
        >>> workers()
        1
    """
    return _WORKERS.get() if sys.platform == "linux" and not torch.cuda.is_initialized() else 1


def forked(function: Callable[[Job], Made], jobs: Sequence[Job], *, alone: bool = False) -> Generator[Made, None, None]:
    """What a function makes of each job, in order, by as many processes as :func:`workers` says.

    Args:
        function: What it returns must be picklable; what it raises is raised here.
        jobs: The jobs.
        alone: Whether this process does all, as it must with a GPU.

    Yields:
        One for each job. Where a copy dies (killed for memory, say), this process does what is left. Where a job raises, this process is
        interrupted, or no more is read, copies end at once, in the middle of what they are at.
    """
    n = 1 if alone else min(workers(), len(jobs))
    if n <= 1:
        yield from map(function, jobs)
        return
    # What the copies begin with is not pickled: a fork has it.
    copies = ProcessPoolExecutor(
        n, mp_context=get_context("fork"), initializer=_begin, initargs=(function, jobs, os.getpid())
    )
    done, running = 0, list[BaseProcess]()
    try:
        results = copies.map(_do, range(len(jobs)))
        running += (copies._processes or {}).values()  # a broken pool forgets them
        for made in results:
            done += 1
            yield pickle.loads(made)
    except BrokenProcessPool:
        log.warning("a worker process died; the jobs that are left are done here")
        for copy in running:  # none of them may go on with a job that is begun here again
            copy.kill()
            copy.join()
        yield from map(function, jobs[done:])
    except BaseException:  # nobody reads what the copies are at, which may take minutes
        for copy in running:
            copy.kill()
        raise
    finally:
        copies.shutdown(cancel_futures=True)


_given: tuple[Callable[[Any], Any], Sequence[Any]]


def _begin(function: Callable[[Any], Any], jobs: Sequence[Any], parent: int) -> None:
    """A copy ends with its parent, leaves interrupts from the keyboard to it, and has one thread."""
    global _given
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of the parent's is not for its copies
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it ended in between
        os._exit(1)
    torch.set_num_threads(1)
    _WORKERS.set(1)
    _given = function, jobs


def _do(number: int) -> bytes:
    """Pickled here: torch would have tensors in shared memory, of which there may be little."""
    function, jobs = _given
    return pickle.dumps(function(jobs[number]))
