"""The outcomes of the house: margins between openings of answers, divergences and log probabilities of responses.

All are larger where the model is less safe. Those here say by ``from_last`` that they read nothing before the last prompt token, which
spares the logits of other positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import logsumexp
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.outcome_kinds import BaseOutcome, HasSpans, HasTokens


def require_ids(ids: Sequence[int]) -> None:
    """Refuse what are no ids of tokens.

    Raises:
        ValueError: If one is negative.
    """
    if wrong := [token for token in ids if token < 0]:
        raise ValueError(f"token ids must be 0 or more, got {wrong[0]}; take them from lvlm.tokenizer")


@dataclass(frozen=True)
class UnsafeMargin(BaseOutcome):
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
    from_last = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "comply", tuple(self.comply))
        object.__setattr__(self, "refuse", tuple(self.refuse))
        require_ids((*self.comply, *self.refuse))
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
        log_probs = _at_last(logits, inputs).float().log_softmax(-1)
        comply, refuse = list(self.comply), list(self.refuse)
        return log_probs[:, comply].logsumexp(-1) - log_probs[:, refuse].logsumexp(-1)


@dataclass(frozen=True)
class LogitDifference(BaseOutcome):
    """Logit of one token (mean over several) less that of another, at the last position of the prompt.

    Unlike :class:`UnsafeMargin` it is linear in the logits, so that contributions to the residual stream add up.

    Attributes:
        toward: Ids of the tokens of less safe answers.
        away: Ids of the tokens of safe answers.

    Raises:
        ValueError: If a set is empty, or the two overlap.
    """

    toward: tuple[int, ...]
    away: tuple[int, ...]
    from_last = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "toward", tuple(self.toward))
        object.__setattr__(self, "away", tuple(self.away))
        require_ids((*self.toward, *self.away))
        if not self.toward or not self.away:
            raise ValueError(f"toward and away must each have a token id, got {self.toward} and {self.away}")
        if both := set(self.toward) & set(self.away):
            raise ValueError(f"toward and away must not share token ids, got {sorted(both)} in both")

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], inputs: HasSpans) -> Float[Tensor, "batch"]:
        """The difference of each row.

        Args:
            logits: [batch, pos, vocab] of every position, or of the last ``pos`` of a left-padded batch.
            inputs: The batch they are of.

        Returns:
            [batch] logits.

        Raises:
            ValueError: If the logits leave out the last prompt position of a row.
        """
        last = _at_last(logits, inputs).float()
        return last[:, list(self.toward)].mean(-1) - last[:, list(self.away)].mean(-1)


@dataclass(frozen=True)
class KLDivergence(BaseOutcome):
    """How far the distribution of the first token of the answer is from a reference: KL(reference || run), in nats.

    In mediation the reference of both twins is the safe twin's untouched run, so that Y(x) = 0 and the total effect is
    the divergence of the unsafe run. It says how much changes, not that it gets less safe.

    Attributes:
        reverse: KL(run || reference) instead.
        reference: [batch, vocab] log probabilities, given by :meth:`with_reference`.
    """

    reverse: bool = False
    reference: Float[Tensor, "batch vocab"] | None = field(default=None, repr=False, compare=False)
    from_last = True

    def with_reference(
        self, logits: Float[Tensor, "batch pos vocab"], inputs: HasSpans, rows: Sequence[int]
    ) -> "KLDivergence":
        """The same with a reference for each row.

        Args:
            logits: [batch, pos, vocab] of the runs to compare with.
            inputs: The batch they are of.
            rows: For each row to be measured, its reference's row in ``logits``.
        """
        return replace(self, reference=_at_last(logits, inputs).float().log_softmax(-1)[list(rows)])

    def for_rows(self, rows: Sequence[int]) -> "KLDivergence":
        """The same for some of the rows, in this order."""
        return self if self.reference is None else replace(self, reference=self.reference[list(rows)])

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], inputs: HasSpans) -> Float[Tensor, "batch"]:
        """The divergence of each row.

        Args:
            logits: [batch, pos, vocab] of every position, or of the last ``pos`` of a left-padded batch.
            inputs: The batch they are of.

        Returns:
            [batch] nats, 0 or more.

        Raises:
            ValueError: If there is no reference for each row, or the logits leave out the last prompt position of one.
        """
        run = _at_last(logits, inputs).float().log_softmax(-1)
        if self.reference is None or self.reference.shape != run.shape:
            held = None if self.reference is None else tuple(self.reference.shape)
            raise ValueError(f"reference must be of shape {tuple(run.shape)}, got {held}; give it by with_reference")
        reference = self.reference.to(run.device)
        first, second = (run, reference) if self.reverse else (reference, run)
        return (first.exp() * (first - second)).sum(-1)


@dataclass(frozen=True)
class ResponseLogProb(BaseOutcome):
    """Mean log probability of the teacher-forced response's tokens: how likely the unsafe answer is, in full.

    Give both twins of a pair the unsafe answer as their response, and prepare them with ``responses=True``.

    Attributes:
        responses: True: the batch must be prepared with its responses.
        total: The sum over the tokens instead of their mean.
        end: Whether the end-of-sequence token after the response counts; without it the response is a prefix.
    """

    responses: bool = True
    total: bool = False
    end: bool = True
    from_last = True

    def __call__(self, logits: Float[Tensor, "batch pos vocab"], inputs: HasTokens) -> Float[Tensor, "batch"]:
        """The mean log probability of each row's response.

        Args:
            logits: [batch, pos, vocab] of every position, or of the last ``pos`` of a left-padded batch.
            inputs: The batch they are of.

        Returns:
            [batch] nats a token (nats where ``total``), at most 0.

        Raises:
            ValueError: If a row has no response, or the logits leave out part of one.
        """
        kept = logits.shape[1]
        own = inputs.spans.response & ~inputs.spans.prefill  # the model does not choose a prefill
        response, counts = own[:, -kept:].to(logits.device), own.sum(dim=1).to(logits.device)
        if not bool((counts > 0).all()) or not bool((response[:, 1:].sum(dim=1) == counts).all()):
            raise ValueError(
                "every row must have a response that the logits cover with the token before it; prepare the "
                "batch with responses=True and keep the logits of all its positions"
            )
        targets = inputs.input_ids[:, -kept:].to(logits.device)[:, 1:]
        log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        counted = response[:, 1:]
        if not self.end:
            counts = counts - 1
            counted = counted & (counted.cumsum(dim=1) <= counts[:, None])
        total = (log_probs * counted).sum(dim=1)
        return total if self.total else total / counts


@dataclass(frozen=True)
class PrefixMargin(BaseOutcome):
    """log p(comply) - log p(refuse), each over a set of whole beginnings of an answer, teacher-forced.

    log p of a set is the logsumexp of its prefixes' log probabilities, each the sum over its tokens. No prefix may be the
    beginning of another, or its probability would count twice. It is measured in several sequences a row, one a
    prefix: mediation runs :meth:`responses_for` each example and puts the results together by :meth:`combine`.

    Attributes:
        comply: Texts that compliant answers begin with.
        refuse: Texts that refusals begin with.

    Raises:
        ValueError: If a set is empty, or a prefix begins another.
    """

    comply: tuple[str, ...]
    refuse: tuple[str, ...]
    _one_run: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "comply", tuple(self.comply))
        object.__setattr__(self, "refuse", tuple(self.refuse))
        if not self.comply or not self.refuse:
            raise ValueError(f"comply and refuse must each have a prefix, got {self.comply} and {self.refuse}")
        texts = self.prefixes
        if twice := [a for i, a in enumerate(texts) for j, b in enumerate(texts) if i != j and b.startswith(a)]:
            raise ValueError(
                f"no prefix may be the beginning of another, got {twice}; leave out the longer or the shorter"
            )

    @property
    def prefixes(self) -> tuple[str, ...]:
        """All prefixes, those of compliance first."""
        return (*self.comply, *self.refuse)

    @property
    def single(self) -> ResponseLogProb:
        """What is measured of each sequence."""
        return ResponseLogProb(total=True, end=False)

    def responses_for(self, example: Example) -> list[Example]:
        """The example with each prefix as its response."""
        return [replace(example, response=prefix) for prefix in self.prefixes]

    def combine(self, values: Float[ndarray, "*cells prefixes"]) -> Float[ndarray, "*cells"]:
        """The margin in nats from the log probabilities of all prefixes, in their order."""
        n = len(self.comply)
        parts = (values[..., :n], values[..., n:])
        comply, refuse = (np.asarray(logsumexp(part, axis=-1)) for part in parts)
        return np.asarray(comply - refuse)


def _at_last(logits: Float[Tensor, "batch pos vocab"], inputs: HasSpans) -> Float[Tensor, "batch vocab"]:
    """The logits from which each row's first token of its own is taken: at the last prompt token, or at the end of a prefill."""
    last = inputs.spans.context_end[:, -logits.shape[1] :]
    if not bool(last.any(dim=1).all()):
        raise ValueError(
            f"logits must cover the last prompt position of every row, got the last {logits.shape[1]} "
            "positions; raise logits_to_keep or leave it out"
        )
    return logits[last.to(logits.device)]
