"""Step rules of gradient attacks: from a picture, its loss and its gradient to the next picture, within a box.

All of them go down: the loss is smaller where the attacker is nearer to what it wants. Pixels are real numbers here; the picture that is
evaluated is the nearest of whole 8-bit steps. Rows of a batch do not see each other.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor


class StepRule(ABC):
    """One restart of a batch of pictures.

    Args:
        start: [image, channel, height, width] where to start, within the box.
        low: Least pixels.
        high: Largest pixels.

    Attributes:
        pixels: [image, channel, height, width] where each picture is.
    """

    def __init__(self, start: Tensor, low: Tensor, high: Tensor) -> None:
        self.pixels, self.low, self.high = start.clone(), low, high

    @abstractmethod
    def step(
        self,
        rows: Int[Tensor, " kept"],
        losses: Float[Tensor, " kept"],
        gradient: Float[Tensor, "kept channel height width"],
    ) -> None:
        """Move some of the pictures.

        Args:
            rows: Which.
            losses: Of the pictures where they are.
            gradient: Of those losses in the pixels.
        """

    def _boxed(self, rows: Tensor, pixels: Tensor) -> Tensor:
        return pixels.clamp(self.low[rows], self.high[rows])


class SignRule(StepRule):
    """A step of one size along the sign of the gradient (Madry et al. 2018, arXiv:1706.06083).

    Args:
        size: Change of a pixel a step, of 255.
    """

    def __init__(self, start: Tensor, low: Tensor, high: Tensor, *, size: float) -> None:
        super().__init__(start, low, high)
        self._size = size

    def step(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """``x <- P(x - size sign(g))``."""
        self.pixels[rows] = self._boxed(rows, self.pixels[rows] - self._size * gradient.sign())


class MomentumRule(StepRule):
    """Steps along the sign of an accumulated gradient: MI-FGSM (Dong et al. 2018, arXiv:1710.06081).

    Args:
        size: Change of a pixel a step, of 255.
        decay: mu, how much of the accumulated gradient is kept.
    """

    def __init__(self, start: Tensor, low: Tensor, high: Tensor, *, size: float, decay: float) -> None:
        super().__init__(start, low, high)
        self._size, self._decay, self._sum = size, decay, torch.zeros_like(start)

    def step(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """``s <- mu s + g / |g|_1`` and ``x <- P(x - size sign(s))``."""
        norm = gradient.abs().flatten(1).sum(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
        self._sum[rows] = self._decay * self._sum[rows] + gradient / norm[:, None, None, None]
        self.pixels[rows] = self._boxed(rows, self.pixels[rows] - self._size * self._sum[rows].sign())


def checkpoints(steps: int) -> list[int]:
    """The iterations at which auto-PGD looks back: ``ceil(p_j steps)``, p_0 = 0, p_1 = 0.22, p_j+1 = p_j + max(p_j - p_j-1 - 0.03, 0.06).

    Example:
        >>> checkpoints(100)
        [0, 22, 41, 57, 70, 80, 87, 93, 99]
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    found = [math.ceil(round(share * steps, 9)) for share in shares if share <= 1]
    return sorted({k for k in found if k <= steps})


class AutoRule(StepRule):
    """Auto-PGD (Croce and Hein 2020, arXiv:2003.01690, algorithm 1), going down instead of up.

    With eta = 2 epsilon at first and a = 0.75: ``z = P(x_k - eta sign(g))``, ``x_k+1 = P(x_k + a (z - x_k) + (1 - a)(x_k - x_k-1))`` (the
    first step is z alone). At the checkpoints, eta is halved and the search goes on from the best picture so far if (1) fewer than rho of the
    steps since the last checkpoint went down, or (2) neither eta nor the best loss has changed since then.

    Args:
        steps: Steps of the restart; the checkpoints depend on it.
        radius: epsilon, of 255.
        momentum: a.
        rho: Share of the steps.
    """

    def __init__(
        self, start: Tensor, low: Tensor, high: Tensor, *, steps: int, radius: float, momentum: float, rho: float
    ) -> None:
        super().__init__(start, low, high)
        n = len(start)
        self._marks, self._a, self._rho = set(checkpoints(steps)) - {0}, momentum, rho
        self._k, self._mark, self._steps = 0, 0, 0
        full = torch.full((n,), math.inf, device=start.device)
        self.eta = torch.full((n,), 2.0 * radius, device=start.device)
        self._before = start.clone()
        self._best, self._best_gradient, self._best_loss = start.clone(), torch.zeros_like(start), full.clone()
        self._last, self._previous = full.clone(), full.clone()
        self._down, self._counted = torch.zeros(n, device=start.device), torch.zeros(n, device=start.device)
        # eta and the best loss as they were at the last checkpoint
        self._old_eta, self._old_best = self.eta.clone(), full.clone()

    def step(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """Measure x_k; look back where iteration k - 1, which made it, was a checkpoint; make x_k+1."""
        gradient, k = gradient.clone(), self._k
        self._note(rows, losses, gradient)
        if k == 1:  # the best of x_0 and x_1 is what the first checkpoint compares with
            self._old_best[rows] = self._best_loss[rows]
        if k - 1 in self._marks:
            self._look_back(rows, gradient)
        if (
            k in self._marks
        ):  # the steps up to x_k are those that the checkpoint counts; the next one begins a new count
            self._steps, self._mark = k - self._mark, k
            self._counted, self._down = self._down.clone(), torch.zeros_like(self._down)
        x, before = self.pixels[rows], self._before[rows]
        z = self._boxed(rows, x - self.eta[rows, None, None, None] * gradient.sign())
        moved = z if k == 0 else self._boxed(rows, x + self._a * (z - x) + (1 - self._a) * (x - before))
        self._before[rows], self.pixels[rows] = x, moved
        self._k += 1

    def _note(self, rows: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """The loss of x_k: does it go down from that of x_k-1, and is it the best."""
        self._previous[rows] = self._last[rows]
        self._last[rows] = losses
        if self._k:
            self._down[rows] += (losses < self._previous[rows]).to(self._down)
        better = losses < self._best_loss[rows]
        chosen = rows[better]
        self._best[chosen], self._best_gradient[chosen] = self.pixels[chosen], gradient[better]
        self._best_loss[chosen] = losses[better]

    def _look_back(self, rows: Tensor, gradient: Tensor) -> None:
        """Halve eta and put the best picture in the place of x_k where a condition holds; ``gradient`` becomes that of the pictures at hand."""
        slow = self._counted[rows] < self._rho * self._steps
        stuck = (self._old_eta[rows] == self.eta[rows]) & (self._old_best[rows] == self._best_loss[rows])
        self._old_eta[rows], self._old_best[rows] = self.eta[rows], self._best_loss[rows]
        back = slow | stuck
        chosen = rows[back]
        self.eta[chosen] = self.eta[chosen] / 2
        self.pixels[chosen] = self._best[chosen]
        gradient[back] = self._best_gradient[chosen]
        # x_k is another picture now, and so is whether the step to it went down.
        best, previous = self._best_loss[chosen], self._previous[chosen]
        self._down[chosen] += (best < previous).to(self._down) - (self._last[chosen] < previous).to(self._down)
        self._last[chosen] = best
