"""Rows with a known subspace, and a way past the shape checks of the tests to the errors that users see."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import torch
from torch import Tensor


def planted(
    n_benign: int,
    n_malicious: int,
    width: int,
    *,
    planted: int = 2,
    spread: float = 5.0,
    shift: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Benign and malicious rows of one coloured Gaussian, and the [width, planted] directions planted.

    The malicious rows are wider along those, which have equal benign variance, and shifted along the first.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    colour = torch.linspace(0.5, 2.0, width, dtype=torch.float64)
    colour[:planted] = 1.0
    rotation = torch.linalg.qr(normal(width, width)).Q
    benign, malicious = normal(n_benign, width), normal(n_malicious, width)
    malicious[:, :planted] *= spread
    malicious[:, 0] += shift
    mean = normal(width)
    return (
        (benign * colour) @ rotation.T + mean,
        (malicious * colour) @ rotation.T + mean,
        rotation[:, :planted],
    )


@contextmanager
def unchecked() -> Iterator[None]:
    """Switch the shape checks of the tests off: users run without them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
