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
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

log = logging.getLogger(__name__)

_WORKERS: ContextVar[int] = ContextVar("care_lens_workers", default=1)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl (linux/prctl.h)

Job = TypeVar("Job")
Made = TypeVar("Made")


@contextlib.contextmanager
def in_workers(n: int) -> Iterator[None]:
    """Inside, answers of a model on a CPU are generated in n processes.

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
        One for each job. Where a copy dies (killed for memory, say), this process does the rest of its jobs.
    """
    n = 1 if alone else min(workers(), len(jobs))
    if n <= 1:
        yield from map(function, jobs)
        return
    context, ends, copies = multiprocessing.get_context("fork"), [], []
    try:
        for rank in range(n):
            ours, theirs = context.Pipe(duplex=False)
            copy = context.Process(
                target=_work, args=(function, jobs[rank::n], theirs, [*ends, ours], os.getpid()), daemon=True
            )
            with warnings.catch_warnings():  # threads of progress bars are none of its business
                warnings.simplefilter("ignore", DeprecationWarning)
                copy.start()
            theirs.close()
            ends.append(ours)
            copies.append(copy)
        dead: set[int] = set()
        for i, job in enumerate(jobs):
            rank = i % n
            if rank not in dead:
                try:
                    made, error = ends[rank].recv()
                except (EOFError, OSError):
                    log.warning("a worker process died; its jobs are done here")
                    dead.add(rank)
                else:
                    if error is not None:
                        raise error
                    yield made
                    continue
            yield function(job)
    finally:
        for end, copy in zip(ends, copies, strict=True):
            end.close()
            copy.kill()
            copy.join()


def _work(function: Callable[[Any], Any], jobs: Sequence[Any], out: Any, foreign: Sequence[Any], parent: int) -> None:
    """The life of a copy: it ends with its parent, and leaves interrupts from the keyboard to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for end in foreign:
        end.close()
    torch.set_num_threads(1)
    _WORKERS.set(1)
    for job in jobs:
        try:
            sent = function(job), None
        except Exception as error:
            sent = None, error
        try:
            out.send(sent)
        except BrokenPipeError:
            return
        except Exception as error:  # what cannot be pickled
            out.send((None, RuntimeError(f"{type(error).__name__}: {error}")))
