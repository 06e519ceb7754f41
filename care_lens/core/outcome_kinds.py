"""What an outcome is: a number for each answer, larger where the model is less safe, and what it says of itself.

Any function of logits and inputs is an outcome. One that spares work, or needs something of its batch, is a class of its own:

    class RefusalProbability(BaseOutcome):
        from_last = True  # it reads nothing before the last prompt token: the logits of other positions are spared

        def __call__(self, logits, inputs):
            return -logits[:, -1].log_softmax(-1)[:, SORRY]

What runs outcomes asks :class:`BaseOutcome`'s questions of all of them; :func:`as_outcome` answers them for what is no ``BaseOutcome``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.spans import TokenSpans


class OutcomeError(CareLensError, ValueError):
    """An outcome did not return one finite number for each row of its batch, or cannot be read where it is given."""


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


class BaseOutcome:
    """What an outcome says of itself to what runs it. The defaults are those of a plain function of logits and inputs.

    It is a class beside the protocol :class:`Outcome`, not in its place: a function stays an outcome as it is, and
    ``isinstance(function, Outcome)`` asks for no more than that it can be called. A class derived from this one is read off the logits of one
    run if it has ``__call__(logits, inputs)``; :class:`GeneratedOutcome` and :class:`PrefixMargin` are measured otherwise, and have none.

    Attributes:
        from_last: Whether it reads no logits before the last prompt token.
        responses: Whether batches must hold the examples' teacher-forced responses.

    Example:
        >>> import torch
        >>> class Entropy(BaseOutcome):
        ...     from_last = True
        ...
        ...     def __call__(self, logits, inputs):
        ...         last = logits[inputs.spans.context_end[:, -logits.shape[1] :]]
        ...         return torch.distributions.Categorical(logits=last.float()).entropy()
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> from care_lens.mediation import mediate
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> pairs, site = organism.pairs("typographic", "fit", n=2), "blocks.0.hook_mlp_out"
        >>> found = mediate(lvlm, pairs, outcome=Entropy(), sites=[site], positions=("last",), progress=False)
        >>> found.frame.metric.unique().tolist()
        ['Entropy']
    """

    from_last: bool = False
    responses: bool = False
    _one_run: ClassVar[bool] = True  # whether it is read off the logits of one run

    @property
    def compares(self) -> bool:
        """Whether it is told a reference: where :meth:`with_reference` is its own."""
        return getattr(self.with_reference, "__func__", None) is not BaseOutcome.with_reference

    def with_examples(self, examples: Sequence[Example]) -> "BaseOutcome":
        """The same for a batch of these examples.

        Args:
            examples: The batch's, in the order of its rows.
        """
        return self

    def with_reference(
        self, logits: Float[Tensor, "batch pos vocab"], inputs: HasSpans, rows: Sequence[int]
    ) -> "BaseOutcome":
        """The same with a reference for each row, which it is compared with.

        Args:
            logits: [batch, pos, vocab] of the runs to compare with.
            inputs: The batch they are of.
            rows: For each row to be measured, its reference's row in ``logits``.
        """
        return self

    def for_rows(self, rows: Sequence[int]) -> "BaseOutcome":
        """The same for some of the rows that it was bound to, in this order."""
        return self


class GeneratedOutcome(BaseOutcome, ABC):
    """An outcome of the answers that the model generates, which cannot be read off the logits of one run."""

    _one_run: ClassVar[bool] = False

    @abstractmethod
    def generated(
        self, lvlm: Any, inputs: Any, rows: Sequence[int], fwd_hooks: Sequence[Any]
    ) -> Float[Tensor, " rows"]:
        """Generate with hooks on, and measure.

        Args:
            lvlm: The model.
            inputs: The rows.
            rows: Which rows of the batch they are.
            fwd_hooks: Pairs of a place and a function.

        Returns:
            [rows], NaN where there is no answer.
        """


class _Given:
    """What is no :class:`BaseOutcome`, such as a function, with the answers to its questions; what it does not have is as by default."""

    def __init__(self, given: Any) -> None:
        self.given = given
        self.from_last = bool(getattr(given, "from_last", False))
        self.responses = bool(getattr(given, "responses", False))

    @property
    def compares(self) -> bool:
        return hasattr(self.given, "with_reference")

    def _or_self(self, name: str, *args: Any) -> Any:
        own: Callable[..., Any] | None = getattr(self.given, name, None)
        return self if own is None else as_outcome(own(*args))

    def with_examples(self, examples: Sequence[Example]) -> Any:
        return self._or_self("with_examples", examples)

    def with_reference(self, logits: Tensor, inputs: HasSpans, rows: Sequence[int]) -> Any:
        return self._or_self("with_reference", logits, inputs, rows)

    def for_rows(self, rows: Sequence[int]) -> Any:
        return self._or_self("for_rows", rows)


class _GivenFunction(_Given, BaseOutcome):
    def __call__(self, logits: Tensor, inputs: HasTokens) -> Any:
        return self.given(logits, inputs)


class _GivenGenerated(_Given, GeneratedOutcome):
    def generated(self, lvlm: Any, inputs: Any, rows: Sequence[int], fwd_hooks: Sequence[Any]) -> Any:
        return self.given.generated(lvlm, inputs, rows, fwd_hooks)


def as_outcome(outcome: Any) -> BaseOutcome:
    """An outcome of which everything can be asked that :class:`BaseOutcome` answers.

    Args:
        outcome: A :class:`BaseOutcome`, which is returned as it is; a function of logits and inputs; or an object that has some of the
            attributes of a ``BaseOutcome``, or the method ``generated``, without being one.

    Raises:
        OutcomeError: If it is nothing of these.

    Example:
        >>> as_outcome(lambda logits, inputs: logits[:, -1, 5]).from_last
        False
    """
    if isinstance(outcome, BaseOutcome):
        return outcome
    if isinstance(outcome, type):
        raise OutcomeError(
            f"an outcome must be an object, got the class {outcome.__name__}; write {outcome.__name__}(...)"
        )
    if hasattr(outcome, "generated"):
        return _GivenGenerated(outcome)
    if callable(outcome):
        return _GivenFunction(outcome)
    raise OutcomeError(
        f"an outcome must be a function of logits and inputs, got {type(outcome).__name__}; write one, or take "
        "care_lens.core.UnsafeMargin"
    )


def logits_outcome(outcome: Any) -> BaseOutcome:
    """An outcome that is read off the logits of one run, as :func:`as_outcome` gives it.

    Raises:
        OutcomeError: If it is measured otherwise.
    """
    own = as_outcome(outcome)
    name = type(given_outcome(own)).__name__
    if not own._one_run:
        raise OutcomeError(
            f"outcome must be read off the logits of one run, got {name}; use UnsafeMargin, "
            "LogitDifference or ResponseLogProb here, or measure with care_lens.mediation.mediate, which takes it"
        )
    if not callable(own):
        raise OutcomeError(
            f"outcome must have __call__(logits, inputs), got {name} without it; write it, or derive {name} from "
            "care_lens.core.GeneratedOutcome if it reads generated answers"
        )
    return own


def given_outcome(outcome: Any) -> Any:
    """What :func:`as_outcome` was given: it has the user's name, code and settings."""
    return outcome.given if isinstance(outcome, _Given) else outcome
