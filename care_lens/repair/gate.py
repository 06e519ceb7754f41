"""Gates: from a reader's score to how far a correction opens, between 0 and 1.

A gate is a function of the score that never falls as the score grows, so the running maximum of a row's
scores latches it: generated tokens can open a gate, never close it.

:class:`ConformalGate` is split conformal prediction (Vovk et al. 2005; Lei et al. 2018). Take each benign
calibration prompt's largest score over everything the repair reads, in an unhooked run; the threshold is the
ceil((n + 1)(1 - epsilon))-th smallest. A new benign prompt, exchangeable with them, then exceeds it with
probability at most epsilon, on average over calibration sets. When several corrections are gated, calibrate
one threshold on the row's maximum over their (standardised) readers: that bounds the chance of any of them
opening, and nothing has to be corrected for their number.

A score that is no number says that reading failed: an activation or a sum overflowed. The gate then opens, whatever gate it is
(:func:`openness`), so that a request which breaks the reading is corrected and not let through; a score of -inf says that there
was nothing to read, and leaves a gate closed.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.gates import gradient_wanted, stepped
from care_lens.repair.checks import require_number
from care_lens.repair.errors import RepairError, TooFewCalibrationError
from care_lens.repair.kinds import register_kind

TooFewCalibration = TooFewCalibrationError
"""The former name of :class:`TooFewCalibrationError`."""


@runtime_checkable
class Gate(Protocol):
    """How far a correction opens.

    Args:
        score: Scores of any shape, larger where the request looks more harmful; -inf where nothing was read, NaN where
            reading failed (a repair opens there, whatever the gate returns).

    Returns:
        Numbers in [0, 1] of that shape, which do not fall as the score grows.
    """

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


def openness(gate: Gate, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """How far a gate opens, 1 where its score is NaN.

    Args:
        gate: Any gate.
        score: The scores.

    Returns:
        Numbers in [0, 1] of the shape and dtype of the scores.

    Raises:
        RepairError: If the gate returns another shape, or a number that is not in [0, 1] at a score that is one.
    """
    opened = gate(score)
    if not isinstance(opened, Tensor) or opened.shape != score.shape or opened.is_complex():
        got = list(opened.shape) if isinstance(opened, Tensor) else type(opened).__name__
        raise RepairError(
            f"a {type(gate).__name__} must return real numbers of the shape of its scores {list(score.shape)}, got {got}"
        )
    opened = torch.where(score.isnan(), 1.0, opened.to(score.dtype))
    # Of an attack that sees the repair: the same values, with a gradient (see care_lens.core.gates).
    opened = stepped(opened, score, getattr(gate, "threshold", None)) if gradient_wanted() else opened
    if not isinstance(gate, (AlwaysOpen, ConformalGate, SoftGate)) and not bool(((opened >= 0) & (opened <= 1)).all()):
        raise RepairError(f"a {type(gate).__name__} must return numbers in [0, 1], got others; clamp what it returns")
    return opened


def can_close(gate: Gate) -> bool:
    """Whether there are scores at which a gate leaves a request untouched, as far as its kind tells.

    Args:
        gate: Any gate; of a kind that is not of this module it is supposed.
    """
    return not isinstance(gate, AlwaysOpen) and not (isinstance(gate, SoftGate) and gate.closed_to is None)


@register_kind
@dataclass(frozen=True)
class AlwaysOpen:
    """Corrects everything: the paper's form."""

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1 for every score."""
        return torch.ones_like(score)


@register_kind
@dataclass(frozen=True)
class ThresholdGate:
    """Opens above a score that was set elsewhere, such as a detector's own threshold, and where it is NaN. It bounds nothing by itself.

    Attributes:
        threshold: Closed up to and at this score.

    Raises:
        RepairError: If it is not finite.
    """

    threshold: float | int

    def __post_init__(self) -> None:
        require_number(self.threshold, name="threshold")

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """1 above the threshold, else 0."""
        return (~(score <= self.threshold)).to(score.dtype)


@register_kind
@dataclass(frozen=True)
class ConformalGate:
    """Opens where the score exceeds what benign prompts reach, and where it is NaN.

    Attributes:
        threshold: Closed up to and at this score.
        epsilon: The bound on the probability that a benign prompt opens it.
        n: Number of benign prompts it was calibrated on.
        width: 0: open at once above the threshold. Above 0: opens linearly over so much of the score above
            it, so that a prompt is touched exactly where it would be with 0, only less.

    Raises:
        RepairError: If the threshold or width is not finite, the width is below 0, epsilon is not between 0 and 1 or n is no
            number of prompts.
        TooFewCalibrationError: If n prompts cannot bound such an epsilon: n < 1/epsilon - 1.
    """

    threshold: float
    epsilon: float
    n: int
    width: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.threshold, float) and not math.isfinite(self.threshold):
            raise RepairError(
                f"threshold must be finite, got {self.threshold}; do the benign prompts have what is read?"
            )
        require_number(self.threshold, name="threshold")
        require_number(self.width, name="width", least=0)
        _check_epsilon(self.epsilon)
        _check_count(self.n)
        _check_enough(self.n, self.epsilon)

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """How far it opens at each score."""
        if self.width == 0:
            return (~(score <= self.threshold)).to(score.dtype)
        # A width too small for the dtype would make 0 / 0 of a score at the threshold.
        ramp = ((score - self.threshold) / self.width).clamp(0.0, 1.0)
        return torch.where(score.isnan(), 1.0, torch.where(score <= self.threshold, 0.0, ramp))

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
            RepairError: If epsilon is out of range, a score is not a number, or the threshold would not be finite.
            TooFewCalibrationError: If n < 1/epsilon - 1.

        Example:
            >>> import torch
            >>> from care_lens.repair import ConformalGate
            >>> ConformalGate.calibrate(torch.arange(19.0), epsilon=0.1).threshold
            17.0
        """
        _check_epsilon(epsilon)
        if scores.ndim != 1:
            raise RepairError(f"scores must be [n], one a benign prompt, got shape {list(scores.shape)}")
        if bool(scores.isnan().any()):
            raise RepairError("scores must be numbers, got NaN; leave out prompts that the model cannot be read on")
        n = len(scores)
        above = _check_enough(n, epsilon)
        threshold = float(scores.sort().values[n - above])
        return cls(threshold=threshold, epsilon=epsilon, n=n, width=width)


@register_kind
@dataclass(frozen=True)
class SoftGate:
    """Opens gradually: ``sigmoid((score - threshold) / temperature)``, and not at all up to ``closed_to``.

    A sigmoid alone is never quite 0, so that every request would be touched. With :meth:`calibrate` the gate is shut, to the bit, up to what benign
    prompts reach, which bounds the share of them that is touched at all as a :class:`ConformalGate` does.

    Attributes:
        threshold: Half open at this score.
        temperature: Over so much of the score on either side it opens from 0.27 to 0.73; 1e-6 or more.
        closed_to: Shut, exactly 0, up to and at this score; None: nowhere but where nothing was read.
        epsilon: The bound on the probability that a benign prompt opens it, where ``closed_to`` was calibrated; else None.
        n: Number of benign prompts it was calibrated on, or None.

    Raises:
        RepairError: If a number is not finite, the temperature is below 1e-6, or only one of epsilon and n is given or they are given without closed_to.
        TooFewCalibrationError: If n prompts cannot bound such an epsilon.

    Example:
        >>> import torch
        >>> from care_lens.repair import SoftGate
        >>> SoftGate(threshold=2.0, temperature=0.5, closed_to=1.0)(torch.tensor([1.0, 2.0, 2.5])).tolist()
        [0.0, 0.5, 0.7310585975646973]
    """

    threshold: float | int
    temperature: float | int
    closed_to: float | int | None = None
    epsilon: float | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        require_number(self.threshold, name="threshold")
        require_number(self.temperature, name="temperature", least=1e-6)
        if self.closed_to is not None:
            require_number(self.closed_to, name="closed_to")
        if (self.epsilon is None) != (self.n is None) or (self.n is not None and self.closed_to is None):
            raise RepairError(
                f"epsilon and n must be given together and with closed_to, which they are about, got epsilon={self.epsilon}, n={self.n}, "
                f"closed_to={self.closed_to}; use SoftGate.calibrate"
            )
        if self.epsilon is not None and self.n is not None:
            _check_epsilon(self.epsilon)
            _check_count(self.n)
            _check_enough(self.n, self.epsilon)

    def __call__(self, score: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """How far it opens at each score."""
        opened = torch.sigmoid((score - self.threshold) / self.temperature)
        if self.closed_to is not None:
            opened = torch.where(score <= self.closed_to, 0.0, opened)
        return torch.where(score.isnan(), 1.0, opened)

    @classmethod
    def calibrate(
        cls,
        scores: Float[Tensor, "n"],
        *,
        epsilon: float,
        temperature: float | int,
        threshold: float | int | None = None,
    ) -> "SoftGate":
        """Shut up to what benign prompts reach, on prompts that nothing else was fitted or chosen on; a sigmoid above it.

        Args:
            scores: [n] each benign prompt's largest score.
            epsilon: Largest acceptable probability that a benign prompt opens the gate, between 0 and 1.
            temperature: See the class.
            threshold: Where it is half open; None: four temperatures above where it begins to open, at 0.018 there.

        Returns:
            The gate.

        Raises:
            RepairError: If an option is out of range or a score is not a number.
            TooFewCalibrationError: If n < 1/epsilon - 1.
        """
        hard = ConformalGate.calibrate(scores, epsilon=epsilon)
        require_number(temperature, name="temperature", least=1e-6)
        centre = hard.threshold + 4 * temperature if threshold is None else threshold
        return cls(threshold=centre, temperature=temperature, closed_to=hard.threshold, epsilon=epsilon, n=hard.n)


def _check_epsilon(epsilon: float) -> None:
    require_number(epsilon, name="epsilon", above=0)
    if not epsilon < 1:
        raise RepairError(f"epsilon must be between 0 and 1, got {epsilon}")


def _check_count(n: Any) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise RepairError(f"n must be the number of calibration prompts, 1 or more, got {n!r}")


def needed_for(epsilon: float) -> int:
    """Benign calibration prompts that a gate at epsilon needs: the smallest n >= 1/epsilon - 1.

    Example:
        >>> needed_for(0.02), needed_for(0.01)
        (49, 99)
    """
    return math.ceil(1 / epsilon - 1 - 1e-9)


def _check_enough(n: int, epsilon: float) -> int:
    """How many of n scores may lie above the threshold."""
    above = math.floor((n + 1) * epsilon + 1e-9)
    if above < 1:
        raise TooFewCalibrationError(
            f"scores must be at least {needed_for(epsilon)} for epsilon={epsilon}, got {n}; give more benign prompts "
            "or a larger epsilon"
        )
    return above
