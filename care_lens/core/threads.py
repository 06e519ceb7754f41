"""One thread of torch, or of the linear algebra under numpy and scipy, which torch's own number of threads does not reach.

OpenBLAS's threads wait for each other in a loop that uses their cores, and OMP_WAIT_POLICY is not theirs. An iterative fit, which makes
thousands of small products, takes five times as long with two of them as with one where another process is busy (benchmarks/bench_waiting.py),
and is no faster with two on a quiet machine. Large eigenproblems keep their threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """One thread of torch inside, and the earlier number after it: the last bits of a sum depend on how many add it up.

    Example:
        >>> with one_torch_thread():
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_blas_thread() -> threadpool_limits:
    """For an iterative fit: numpy and scipy take one thread each inside, and their earlier number after it.

    Example:
        >>> with one_blas_thread():
        ...     pass
    """
    return threadpool_limits(limits=1, user_api="blas")
