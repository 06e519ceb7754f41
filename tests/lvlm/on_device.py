"""The device that the tests of GPUs run on: CUDA, or what ``CARE_LENS_TEST_DEVICE`` says (``cpu`` tries the tests themselves)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DEVICE = os.environ.get("CARE_LENS_TEST_DEVICE", "cuda")

#: cuBLAS gives the same bits every time only with a workspace of its own, which it reads when it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

needs_device = pytest.mark.skipif(
    DEVICE.startswith("cuda") and not torch.cuda.is_available(), reason="needs a GPU, or CARE_LENS_TEST_DEVICE=cpu"
)


@contextmanager
def exact() -> Iterator[None]:
    """Float32 without TF32, and no sums in an order that changes from run to run: two models can be compared bit by bit."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    strict, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    for backend in backends:
        backend.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warned)
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def require_equal(ours: Tensor, theirs: Tensor, what: str = "logits") -> None:
    """To the bit; otherwise the message says how far apart they are.

    On CUDA, float32 is allowed a rounding (largest seen on an H100: 9.5e-7): its matrix products take another kernel where a tensor lies
    differently in memory. Half precision was equal to the bit there, and so is everything on a CPU.
    """
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.device == theirs.device
    differs = int((ours != theirs).sum())
    gap = (ours.double() - theirs.double()).abs().max()
    if ours.is_cuda and ours.dtype == torch.float32:
        assert gap <= 2e-6 * max(1.0, theirs.abs().max().item()), (
            f"{what}: {differs} of {ours.numel()} numbers differ, by at most {gap:.3e}"
        )
        return
    assert torch.equal(ours, theirs), f"{what}: {differs} of {ours.numel()} numbers differ, by at most {gap:.3e}"
