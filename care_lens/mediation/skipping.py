"""Leaving whole blocks of a tower out, as the scan of Fu et al. 2026 (arXiv:2603.27240) does with two at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from care_lens.core import Site, Tower

BLOCK = "block"
"""A whole block as a component of an ablation with mode "skip"."""


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks that are skipped together.

    Attributes:
        tower: "language" or "vision".
        first, last: Layers of the first and the last of them.
    """

    tower: Tower
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.tower} blocks {self.first} to {self.last}"

    @property
    def ends(self) -> tuple[Site, Site]:
        """Where the residual stream comes in and where it goes out."""
        return Site(self.tower, self.first, "hook_resid_pre"), Site(self.tower, self.last, "hook_resid_post")


def left_out(blocks: Blocks) -> list[tuple[Site, Callable[..., Any]]]:
    """Hooks that hand what comes into the first block on as what the last one gives."""
    kept: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        kept[:] = [activation]

    def give(activation: Tensor, hook: Any) -> Tensor:
        return kept[0].to(activation.device).clone()

    first, last = blocks.ends
    return [(first, keep), (last, give)]
