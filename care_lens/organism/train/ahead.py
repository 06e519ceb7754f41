"""Batches made in processes of their own while the optimiser takes its steps: a graphics card would wait for the pictures otherwise."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch

Batch = TypeVar("Batch")


def _one_thread() -> None:
    torch.set_num_threads(1)


class Ahead(AbstractContextManager, Generic[Batch]):
    """``(argument, make(argument))`` of each argument in order, made by processes that keep two batches each ahead.

    An argument is asked for when its batch is begun, not when it is used: with `workers` above 0 what an argument says of the state of the
    training is that of some steps before.

    Args:
        make: draws a batch; a function of a module, since processes call it.
        workers: processes; 0 makes each batch when it is asked for, in this process.
    """

    def __init__(self, make: Callable[[Any], Batch], *, workers: int) -> None:
        self.make, self.workers = make, workers
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) if workers else None

    def __call__(self, arguments: Iterable[Any]) -> Iterator[tuple[Any, Batch]]:
        if self.pool is None:
            for argument in arguments:
                yield argument, self.make(argument)
            return
        waiting: deque = deque()
        for argument in arguments:
            waiting.append((argument, self.pool.submit(self.make, argument)))
            if len(waiting) > 2 * self.workers:
                ready, made = waiting.popleft()
                yield ready, made.result()
        while waiting:
            ready, made = waiting.popleft()
            yield ready, made.result()

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
