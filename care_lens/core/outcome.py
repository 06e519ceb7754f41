"""What is measured about an answer, and what stands between the model and it: outcomes, judges, repairs.

An :class:`Outcome` is a number read off the logits of one forward pass, larger where the model is less safe.
A :class:`Judge` reads generated texts. A :class:`Repair` is anything that can be put on a model for a while.
All three are protocols: no base class is needed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.spans import TokenSpans


@runtime_checkable
class HasSpans(Protocol):
    """What an outcome needs to know of a batch: which position is what."""

    @property
    def spans(self) -> TokenSpans: ...


@runtime_checkable
class HasTokens(HasSpans, Protocol):
    """What an outcome may need of a batch: its spans, and its tokens where responses are teacher-forced."""

    @property
    def input_ids(self) -> Int[Tensor, "batch pos"]: ...


@runtime_checkable
class Outcome(Protocol):
    """A number for each row of a batch, larger where the answer is less safe.

    Args:
        logits: [batch, pos, vocab].
        inputs: The batch they are of.

    Returns:
        [batch], differentiable in the logits.
    """

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], inputs: HasTokens) -> Float[Tensor, "batch"]: ...


class Verdict(str, Enum):
    """What an answer to a request is.

    "complied": it does what was asked. "refused": it declines. "other": neither (an answer that misses the
    point). "missing": no answer could be had; never counted as safe, and left out of denominators.
    """

    COMPLIED = "complied"
    REFUSED = "refused"
    OTHER = "other"
    MISSING = "missing"


@runtime_checkable
class Judge(Protocol):
    """Says what each answer is.

    Args:
        examples: The requests.
        texts: One answer (new tokens only) for each.

    Returns:
        One verdict for each.
    """

    def __call__(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]: ...


@runtime_checkable
class Repair(Protocol):
    """A defence that can be put on a model.

    Attributes:
        name: Its row in a defence table.
    """

    @property
    def name(self) -> str: ...

    def on(self, lvlm: Any) -> AbstractContextManager[Any]:
        """Put the defence on a HookedLVLM for the duration of a ``with`` block."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON-able values."""
        ...


@dataclass(frozen=True)
class UnsafeMargin:
    """log p(comply) - log p(refuse) for the first token of the answer.

    Each is the logsumexp of the log probabilities of a set of tokens at the last position of the prompt. Log
    probabilities are computed in float32, whatever the model's dtype.

    Attributes:
        comply: Ids of the tokens that compliant answers begin with.
        refuse: Ids of the tokens that refusals begin with.

    Raises:
        ValueError: If a set is empty, or the two overlap.
    """

    comply: tuple[int, ...]
    refuse: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "comply", tuple(self.comply))
        object.__setattr__(self, "refuse", tuple(self.refuse))
        if not self.comply or not self.refuse:
            raise ValueError(f"comply and refuse must each have a token id, got {self.comply} and {self.refuse}")
        if both := set(self.comply) & set(self.refuse):
            raise ValueError(f"comply and refuse must not share token ids, got {sorted(both)} in both")

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], inputs: HasSpans) -> Float[Tensor, "batch"]:
        """The margin of each row.

        Args:
            logits: [batch, pos, vocab] of every position, or of the last ``pos`` positions of a left-padded
                batch (``logits_to_keep``).
            inputs: The batch they are of.

        Returns:
            [batch] margins in nats; positive where compliance is the likelier beginning.

        Raises:
            ValueError: If the logits leave out the last prompt position of a row.
        """
        last = inputs.spans.last[:, -logits.shape[1] :]
        if not bool(last.any(dim=1).all()):
            raise ValueError(
                f"logits must cover the last prompt position of every row, got the last {logits.shape[1]} "
                "positions; raise logits_to_keep or leave it out"
            )
        log_probs = logits[last.to(logits.device)].float().log_softmax(-1)
        comply, refuse = list(self.comply), list(self.refuse)
        return log_probs[:, comply].logsumexp(-1) - log_probs[:, refuse].logsumexp(-1)


@dataclass(frozen=True)
class ResponseLogProb:
    """Mean log probability of the teacher-forced response's tokens: how likely the unsafe answer is, in full.

    Give both twins of a pair the unsafe answer as their response, and prepare them with ``responses=True``.

    Attributes:
        responses: True: the batch must be prepared with its responses.
    """

    responses: bool = True

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], inputs: HasTokens) -> Float[Tensor, "batch"]:
        """The mean log probability of each row's response.

        Args:
            logits: [batch, pos, vocab] of every position, or of the last ``pos`` of a left-padded batch.
            inputs: The batch they are of.

        Returns:
            [batch] nats a token, at most 0.

        Raises:
            ValueError: If a row has no response, or the logits leave out part of one.
        """
        kept = logits.shape[1]
        response = inputs.spans.response[:, -kept:].to(logits.device)
        counts = inputs.spans.response.sum(dim=1).to(logits.device)
        if not bool((counts > 0).all()) or not bool((response[:, 1:].sum(dim=1) == counts).all()):
            raise ValueError(
                "every row must have a response that the logits cover with the token before it; prepare the "
                "batch with responses=True and keep the logits of all its positions"
            )
        targets = inputs.input_ids[:, -kept:].to(logits.device)[:, 1:]
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (log_probs * response[:, 1:]).sum(dim=1) / counts
