"""How an attack sees through a gate that is a step.

A gate opens where a score passes a threshold. As a function of the score it is flat on both sides, so that a gradient attack learns
nothing from it: what it then fails to break may only have been hidden. In a block of :func:`gates_with_gradient` every gate of the
package computes what it always does, and has the gradient of the line from where its score stands to its threshold: d gate / d score
= 1 / |score - threshold| (Athalye et al. 2018, arXiv:1802.00420, call such a stand-in BPDA). That slope has no unit of its own, so that
it neither vanishes where a gate is wide open nor depends on how a reader was scaled. The block also keeps by how much each row's scores pass
their thresholds, so that a loss can ask for closed gates.

    with gates_with_gradient() as seen:
        loss = loss_of(lvlm(inputs)) + seen.excess(rows)

Outside of such a block nothing changes, to the bit. A defence of one's own takes part with one call where it decides:

    opened = stepped(score > self.threshold, score, self.threshold)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_NEAREST = 0.05
"""Least distance from the threshold that the slope counts with, as a share of the largest distance in the batch."""


class GatesSeen:
    """The gates of the forward passes in a block of :func:`gates_with_gradient`."""

    def __init__(self) -> None:
        self._now: list[Tensor] = []
        self._units: list[Tensor] = []

    def clear(self) -> None:
        """Forget the scores of the last forward pass; call it before each."""
        self._now = []

    @property
    def count(self) -> int:
        """How many gates have been asked since :meth:`clear`."""
        return len(self._now)

    def add(self, excess: Float[Tensor, "*shape"]) -> None:
        """Note by how much scores pass their threshold; -inf or NaN where nothing was read."""
        rows = torch.where(excess.isfinite(), excess, torch.full_like(excess, -torch.inf))
        rows = rows.reshape(len(rows), -1).amax(dim=1)
        self._now.append(rows)
        if len(self._units) < len(self._now):
            sizes = rows.detach().abs()
            finite = sizes[sizes.isfinite()]
            unit = finite.max() if len(finite) else sizes.new_ones(())
            self._units.append(torch.where(unit > 0, unit, torch.ones_like(unit)))

    def excess(self, rows: int, *, device: torch.device | str = "cpu") -> Float[Tensor, "batch"]:
        """How far each row's scores pass the thresholds, over all gates of the last forward pass.

        Args:
            rows: Size of the batch.
            device: Where to.

        Returns:
            [batch] sums over the gates of ``max(0, score - threshold)`` in units of the largest distance at each gate's first
            pass; 0 for a row whose gates are all closed. Differentiable in the activations.
        """
        total = torch.zeros(rows, device=device)
        for gate, unit in zip(self._now, self._units, strict=False):
            if len(gate) == rows:
                open_by = torch.where(gate > 0, gate, torch.zeros_like(gate)) / unit
                total = total + open_by.to(total)
        return total


_SEEN: ContextVar[GatesSeen | None] = ContextVar("gates_seen", default=None)


@contextmanager
def gates_with_gradient() -> Iterator[GatesSeen]:
    """Give gates that are steps a gradient in a ``with`` block; what they compute stays the same.

    Yields:
        The gates as they are asked.
    """
    token = _SEEN.set(GatesSeen())
    seen = _SEEN.get()
    assert seen is not None
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def gradient_wanted() -> bool:
    """Whether a block of :func:`gates_with_gradient` is open: closed gates must then stay in the graph."""
    return _SEEN.get() is not None


def stepped(
    opened: Bool[Tensor, "*shape"] | Float[Tensor, "*shape"],
    score: Float[Tensor, "*shape"],
    threshold: float | int | None,
    *,
    above: bool = True,
) -> Float[Tensor, "*shape"]:
    """A gate's values, with a gradient in a block of :func:`gates_with_gradient`.

    Args:
        opened: What the gate computes: booleans, or numbers between 0 and 1; first axis: rows of the batch.
        score: The scores it computes them from.
        threshold: Where it opens; None: it is no step, and keeps the gradient that it has.
        above: Whether it opens above the threshold; else below it.

    Returns:
        The same values in the scores' dtype.

    Example:
        >>> score = torch.tensor([1.0, 5.0], requires_grad=True)
        >>> with gates_with_gradient() as seen:
        ...     opened = stepped(score > 3.0, score, 3.0)
        >>> opened.tolist(), torch.autograd.grad(opened.sum(), score)[0].tolist(), seen.excess(2).tolist()
        ([0.0, 1.0], [0.5, 0.5], [0.0, 1.0])
    """
    values = opened.to(score.dtype)
    seen = _SEEN.get()
    if seen is None or threshold is None:
        return values
    excess = (score - threshold) if above else (threshold - score)
    seen.add(excess)
    finite = excess.isfinite()
    excess = torch.where(finite, excess, torch.zeros_like(excess))
    size = excess.detach().abs()
    least = _NEAREST * size.max() if size.numel() else size.new_zeros(())
    slope = 1 / torch.maximum(size, torch.where(least > 0, least, torch.ones_like(least)))
    line = excess * slope
    return values.detach() + torch.where(finite, line - line.detach(), torch.zeros_like(line))
