"""Freed memory is kept for the next tensors instead of being given back to the system."""

import ctypes
import platform

#: mallopt's numbers (malloc.h), and what is set: pieces below 256 MiB come from the heap, which is grown by 256 MiB at a time, and of
#: which up to 1 GiB that is free at its end is kept.
_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2
_KEPT = {_MMAP_THRESHOLD: 1 << 28, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 1 << 28}
#: Most that earlier versions of glibc take for the first.
_MOST_MAPPED = 1 << 25


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory of the sizes of activations; for models on a CPU.

    By default glibc maps a large tensor anew each time, and the kernel clears its pages one by one when they are first written, which takes
    a good part of the time of generation (benchmarks/bench_waiting.py). The numbers that are computed do not change. The commands call it;
    call it once in a notebook, at any time.

    Returns:
        Whether it was set, for pieces up to 32 MiB in earlier versions of glibc; where the C library is another, nothing is done.

    Example:
        >>> from care_lens.core.memory import keep_freed_memory
        >>> keep_freed_memory() in (True, False)
        True
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    done = {option: library.mallopt(option, value) == 1 for option, value in _KEPT.items()}
    if not done[_MMAP_THRESHOLD]:
        done[_MMAP_THRESHOLD] = library.mallopt(_MMAP_THRESHOLD, _MOST_MAPPED) == 1
    return all(done.values())
