"""Gates: from a reader's score to how far a correction opens, between 0 and 1.

A gate is a function of the score that never falls as the score grows, so the running maximum of a row's
scores latches it: generated tokens can open a gate, never close it.

:class:`ConformalGate` is split conformal prediction (Vovk et al. 2005; Lei et al. 2018). Take each benign
calibration prompt's largest score over everything the repair reads, in an unhooked run; the threshold is the
ceil((n + 1)(1 - epsilon))-th smallest. A new benign prompt, exchangeable with them, then exceeds it with
probability at most epsilon, on average over calibration sets. When several corrections are gated, calibrate
one threshold on the row's maximum over their (standardised) readers: that bounds the chance of any of them
opening, and nothing has to be corrected for their number.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


class TooFewCalibration(ValueError):
    """There are too few benign scores for the epsilon asked for."""


@runtime_checkable
class Gate(Protocol):
    """How far a correction opens.

    Args:
        score: Scores of any shape, larger where the request looks more harmful; -inf where nothing was read.

    Returns:
        Numbers in [0, 1] of that shape, which do not fall as the score grows.
    """

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


@dataclass(frozen=True)
class AlwaysOpen:
    """Corrects everything: the paper's form."""

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1 for every score."""
        return torch.ones_like(score)


@dataclass(frozen=True)
class ConformalGate:
    """Opens where the score exceeds what benign prompts reach.

    Attributes:
        threshold: Closed up to and at this score.
        epsilon: The bound on the probability that a benign prompt opens it.
        n: Number of benign prompts it was calibrated on.
        width: 0: open at once above the threshold. Above 0: opens linearly over so much of the score above
            it, so that a prompt is touched exactly where it would be with 0, only less.

    Raises:
        ValueError: If the threshold is not finite, or the width is below 0.
    """

    threshold: float
    epsilon: float
    n: int
    width: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.threshold):
            raise ValueError(
                f"threshold must be finite, got {self.threshold}; do the benign prompts have what is read?"
            )
        if not self.width >= 0:
            raise ValueError(f"width must be 0 or more, got {self.width}")

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """How far it opens at each score."""
        if self.width == 0:
            return (score > self.threshold).to(score.dtype)
        return ((score - self.threshold) / self.width).clamp(0.0, 1.0)

    @classmethod
    def calibrate(cls, scores: Float[Tensor, "n"], *, epsilon: float, width: float = 0.0) -> "ConformalGate":
        """Set the threshold on benign prompts that nothing else was fitted or chosen on.

        Args:
            scores: [n] each benign prompt's largest score (:func:`~care_lens.repair.reading.read_scores`).
            epsilon: Largest acceptable probability that a benign prompt opens the gate, between 0 and 1.
            width: See the class.

        Returns:
            The gate.

        Raises:
            ValueError: If epsilon is out of range, a score is not a number, or n < 1/epsilon - 1.

        Example:
            >>> import torch
            >>> from care_lens.repair import ConformalGate
            >>> ConformalGate.calibrate(torch.arange(19.0), epsilon=0.1).threshold
            17.0
        """
        if not 0 < epsilon < 1:
            raise ValueError(f"epsilon must be between 0 and 1, got {epsilon}")
        if bool(scores.isnan().any()):
            raise ValueError("scores must be numbers, got NaN")
        n = len(scores)
        above = math.floor((n + 1) * epsilon + 1e-9)
        if above < 1:
            needed = math.ceil(1 / epsilon - 1 - 1e-9)
            raise TooFewCalibration(
                f"scores must be at least {needed} for epsilon={epsilon}, got {n}; give more benign prompts "
                "or a larger epsilon"
            )
        threshold = float(scores.sort().values[n - above])
        return cls(threshold=threshold, epsilon=epsilon, n=n, width=width)
