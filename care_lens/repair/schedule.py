"""Schedules: how strongly a correction acts at each token of the answer, ``h' = h - alpha g s(k) W L^T (h - target)``.

k counts the tokens of the answer: 0 in the prompt, 1 at the first token of the answer, whether the model wrote it or it was given (a prefill,
or a teacher-forced response). So a run over a whole answer and generation with a cache are edited alike, row by row.

    Correction(writer=writer, reader=reader, gate=gate, schedule=LinearDecay(tokens=8))
    Correction(writer=writer, schedule=FirstTokens(30))

A schedule of your own is any function of the counts that returns numbers in [0, 1] of their shape; register its class
(:func:`~care_lens.repair.register_kind`) to have it saved.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from care_lens.repair.checks import require_number
from care_lens.repair.errors import RepairError
from care_lens.repair.kinds import register_kind
from care_lens.repair.positions import BatchView


@runtime_checkable
class Schedule(Protocol):
    """How strongly a correction acts as the answer grows.

    Args:
        step: Of any shape: 0 in the prompt, k at the k-th token of the answer.

    Returns:
        Numbers in [0, 1] of that shape, by which the strength is multiplied; 0 leaves the activation as it is, to the bit.
    """

    def __call__(self, step: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]: ...


def strength_at(schedule: Schedule, step: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What a schedule gives, checked.

    Args:
        schedule: Any schedule.
        step: The counts.

    Raises:
        RepairError: If it returns another shape, or a number that is not in [0, 1].
    """
    strength = schedule(step)
    if not isinstance(strength, Tensor) or strength.shape != step.shape or not strength.is_floating_point():
        got = list(strength.shape) if isinstance(strength, Tensor) else type(strength).__name__
        raise RepairError(
            f"a {type(schedule).__name__} must return floating numbers of the shape of its steps {list(step.shape)}, got {got}"
        )
    if not isinstance(schedule, _Own) and not bool(((strength >= 0) & (strength <= 1)).all()):
        raise RepairError(
            f"a {type(schedule).__name__} must return numbers in [0, 1], got others; give the strength as the writer's alpha"
        )
    return strength


class _Own(ABC):
    """Base of the schedules of this module, which stay in [0, 1]."""

    def __call__(self, step: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The strength at each step."""
        return self._at(step.to(torch.float32)).clamp(0.0, 1.0)

    @abstractmethod
    def _at(self, step: Tensor) -> Tensor: ...


def _require_count(value: Any, *, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RepairError(f"{name} must be a whole number of {least} or more, got {value!r}")


def _require_share(value: Any, *, name: str) -> None:
    require_number(value, name=name, least=0)
    if value > 1:
        raise RepairError(f"{name} must be in [0, 1], got {value!r}; give the strength as the writer's alpha")


@register_kind
@dataclass(frozen=True)
class ConstantSchedule(_Own):
    """The same at every token.

    Attributes:
        strength: In [0, 1].

    Raises:
        RepairError: If it is not.
    """

    strength: float | int = 1.0

    def __post_init__(self) -> None:
        _require_share(self.strength, name="strength")

    def _at(self, step: Tensor) -> Tensor:
        return torch.full_like(step, self.strength)

    def __str__(self) -> str:
        return f"strength {self.strength:g} at every token"


@register_kind
@dataclass(frozen=True)
class LinearDecay(_Own):
    """``1 - (1 - end) min(k / tokens, 1)``: full in the prompt, and falling by equal steps over the answer.

    Attributes:
        tokens: The token of the answer at which ``end`` is reached.
        end: In [0, 1]; it stays at that.

    Raises:
        RepairError: If tokens is no number of 1 or more, or end is not in [0, 1].

    Example:
        >>> import torch
        >>> from care_lens.repair import LinearDecay
        >>> LinearDecay(tokens=4)(torch.arange(6)).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    tokens: int
    end: float | int = 0.0

    def __post_init__(self) -> None:
        _require_count(self.tokens, name="tokens", least=1)
        _require_share(self.end, name="end")

    def _at(self, step: Tensor) -> Tensor:
        done = (step / self.tokens).clamp(max=1.0)
        return torch.where(done < 1, 1 - (1 - self.end) * done, self.end)

    def __str__(self) -> str:
        return f"falls by equal steps to {self.end:g} over {self.tokens} answer tokens"


@register_kind
@dataclass(frozen=True)
class FirstTokens(_Own):
    """Full in the prompt and at the first ``tokens`` tokens of the answer, nothing after them.

    Attributes:
        tokens: Number of answer tokens; 0: the prompt alone.

    Raises:
        RepairError: If it is no number of 0 or more.
    """

    tokens: int

    def __post_init__(self) -> None:
        _require_count(self.tokens, name="tokens", least=0)

    def _at(self, step: Tensor) -> Tensor:
        return (step <= self.tokens).to(step.dtype)

    def __str__(self) -> str:
        return f"until answer token {self.tokens}"


@register_kind
@dataclass(frozen=True)
class ExponentialDecay(_Own):
    """``2 ^ -(k / half_life)``: full in the prompt, halved after every ``half_life`` tokens of the answer.

    Attributes:
        half_life: In tokens; 0.001 or more.

    Raises:
        RepairError: If it is not.
    """

    half_life: float | int

    def __post_init__(self) -> None:
        require_number(self.half_life, name="half_life", least=1e-3)

    def _at(self, step: Tensor) -> Tensor:
        return torch.exp2(-step / self.half_life)

    def __str__(self) -> str:
        return f"halved after every {self.half_life:g} answer tokens"


class AnswerSteps:
    """Counts the tokens of the answer at one site, as the forward passes of a batch go by.

    Args:
        view: The batch.
    """

    def __init__(self, view: BatchView) -> None:
        self._view = view
        self._given: Tensor | None = None
        self._decoded = 0

    def next(self, activation: Float[Tensor, "batch pos d"]) -> Int[Tensor, "batch pos"]:
        """The counts for the pass under way; to be called once for each pass.

        Args:
            activation: [batch, pos, d]: the whole batch, which starts afresh, or one generated token a row.
        """
        if self._view.is_prefill(activation.shape):
            answer = self._view.mask("response", prefill=True).to(activation.device)
            counts = answer.long().cumsum(dim=1)
            self._given, self._decoded = counts[:, -1:], 0
            return counts.masked_fill(~answer, 0)
        assert self._given is not None  # a generated token comes after its prompt
        self._decoded += 1
        return self._given + self._decoded


def schedule_words(schedule: Schedule | None) -> str:
    """A schedule in words, for a plan; empty for none."""
    if schedule is None:
        return ""
    return type(schedule).__name__ if type(schedule).__str__ is object.__str__ else str(schedule)
