"""Freed memory that is kept, and the one thread of iterative fits."""

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from care_lens.core.memory import keep_freed_memory
from care_lens.core.threads import one_blas_thread
from care_lens.subspace import classifier_direction

#: Page faults of ten tensors of 64 MiB, one after the other, before freed memory is kept and after it. Ten more come between: glibc asks
#: for more than a freed piece holds when it aligns a tensor, so that up to seven lie side by side before the first place is taken again.
FAULTS = """
import resource, torch
from care_lens.core.memory import keep_freed_memory
torch.set_num_threads(1)

def faults():
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
assert keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_not_mapped_anew_for_the_next_tensor():
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-W", "ignore", "-c", FAULTS]
    told = subprocess.run(
        command, env=environment | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, check=True
    ).stdout
    given_back, kept = map(int, told.split())
    assert kept * 4 < given_back


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


def test_an_earlier_glibc_that_takes_smaller_pieces_alone_keeps_those(monkeypatch):
    """It refuses a threshold above 32 MiB; all was left undone then."""
    told = {}

    def mallopt(option, value):
        if option == -3 and value > 1 << 25:
            return 0
        told[option] = value
        return 1

    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.31"))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert keep_freed_memory() and told == {-3: 1 << 25, -1: 1 << 30, -2: 1 << 28}


def blas():
    return [one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"]


def test_an_iterative_fit_takes_one_thread_and_gives_the_others_back():
    with threadpool_limits(2, user_api="blas"):
        before = blas()
        assert before and max(before) == 2
        with pytest.raises(ZeroDivisionError), one_blas_thread():
            assert set(blas()) == {1}
            _ = 1 / 0
        assert blas() == before


def test_the_number_of_threads_does_not_change_a_direction():
    benign = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))
    malicious = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)) + 0.1
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            found.append(classifier_direction(benign, malicious))
    assert torch.equal(*found)
