"""What an attack makes small: a function of the model and a batch, one number a row, differentiable where a gradient is wanted.

Any function ``loss(lvlm, inputs) -> [batch]`` will do, smaller where the attacker is nearer to what it wants:

    def loss(lvlm, inputs):
        return -lvlm(inputs, logits_to_keep=1)[:, -1, wanted_token]

It sees the model with the defence on it. Attributes of it, none of which is needed: ``responses = True`` asks for batches with the examples'
responses teacher-forced, ``name`` is what it is called.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.digests import content_digest
from care_lens.core.outcome import BaseOutcome, Outcome, as_outcome, logits_outcome
from care_lens.core.verdicts import named, read_out, require_outcome
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs


@runtime_checkable
class AttackLoss(Protocol):
    """A number for each row of a batch, smaller where the attacker is nearer to what it wants.

    Args:
        lvlm: The model, with the defence on it.
        inputs: The batch; its pixels may have a gradient.

    Returns:
        [batch].
    """

    def __call__(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> Float[Tensor, "batch"]: ...


@dataclass(frozen=True)
class TargetLikelihood:
    """Mean negative log likelihood of the tokens of each row's response, in nats a token.

    Attributes:
        tokens: Count only the first so many tokens; None: all. The end of sequence never counts.

    Raises:
        ValueError: If it is below 1.

    Example:
        >>> from care_lens import organism
        >>> lvlm, (example,) = organism.load(), organism.study().gradient[:1]
        >>> loss = TargetLikelihood(tokens=1)(lvlm, lvlm.prepare(example, responses=True))
        >>> bool(loss[0] > 0)
        True
    """

    tokens: int | None = None
    responses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"target_tokens must be 1 or more, or None for all of them, got {self.tokens}")

    def __call__(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> Float[Tensor, "batch"]:
        """The loss of each row.

        Raises:
            ValueError: If a row has no response.
        """
        counted = counted_tokens(inputs.spans.response & ~inputs.spans.prefill, self.tokens)
        first = int(torch.nonzero(counted.any(dim=0))[0])
        keep = inputs.input_ids.shape[1] - first + 1
        log_probs = lvlm(inputs, logits_to_keep=keep)[:, :-1].float().log_softmax(-1)
        taken = log_probs.gather(-1, inputs.input_ids[:, first:, None]).squeeze(-1)
        mask = counted[:, first:]
        return -(torch.where(mask, taken, 0.0).sum(dim=1) / mask.sum(dim=1))


TARGET_LIKELIHOOD = TargetLikelihood()
"""The default loss."""


@dataclass(frozen=True)
class OutcomeLoss:
    """Minus an outcome, which is larger where an answer is less safe: what an attack without a target answer uses.

    It has batches and not the examples behind them: the outcome's ``with_examples``, ``with_reference`` and ``for_rows`` are not called.

    Attributes:
        outcome: Any :class:`~care_lens.core.Outcome`, such as ``study.outcome`` (an :class:`~care_lens.core.UnsafeMargin`).
    """

    outcome: Outcome | BaseOutcome

    @property
    def responses(self) -> bool:
        """Whether the outcome is of teacher-forced responses."""
        return as_outcome(self.outcome).responses

    @property
    def name(self) -> str:
        """The outcome's."""
        return f"minus {named(self.outcome)}"

    def __call__(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> Float[Tensor, "batch"]:
        """The loss of each row."""
        keep, own = 0, logits_outcome(self.outcome)
        if own.from_last:
            keep = inputs.input_ids.shape[1] - min(inputs.spans.last_index())
        values = read_out(own, lvlm(inputs, logits_to_keep=keep), inputs)
        return -require_outcome(values, inputs.batch_size, outcome=own)


def counted_tokens(response: Bool[Tensor, "batch pos"], limit: int | None) -> Bool[Tensor, "batch pos"]:
    """The response tokens that count: the first ``limit`` of them, never the end of sequence."""
    order = response.long().cumsum(dim=1)
    length = response.sum(dim=1, keepdim=True) - 1
    if bool((length < 1).any()):
        raise ValueError("targets must have a token each, got an empty one")
    return response & (order <= (length if limit is None else length.clamp(max=limit)))


def row_losses(loss: AttackLoss, lvlm: HookedLVLM, inputs: LVLMInputs) -> Float[Tensor, "batch"]:
    """The loss of each row, in float32.

    Raises:
        OutcomeError: If the function returns anything but one finite number a row.
    """
    return require_outcome(loss(lvlm, inputs), inputs.batch_size, outcome=loss).float()


def wants_responses(loss: AttackLoss) -> bool:
    """Whether batches must hold the examples' responses."""
    return bool(getattr(loss, "responses", False))


def loss_settings(loss: AttackLoss) -> dict[str, Any]:
    """What a loss is, JSON-able: its name, its plain fields, and a digest of its code and of what it holds."""
    fields = dataclasses.fields(loss) if dataclasses.is_dataclass(loss) else ()
    plain = {
        f.name: getattr(loss, f.name)
        for f in fields
        if isinstance(getattr(loss, f.name), (int, float, str, type(None)))
    }
    return {"name": named(loss), **plain, "digest": content_digest(loss)}
