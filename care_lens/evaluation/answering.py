"""Verdicts on what a model answers under a defence, for searches on validation: generated once, judged, counted."""

from collections.abc import Sequence

from care_lens.core.examples import Example
from care_lens.core.outcome import Judge, Repair, Verdict
from care_lens.evaluation.generate import Ask, generate_several
from care_lens.evaluation.judging import judge_answers
from care_lens.evaluation.store import GenerationStore
from care_lens.lvlm import HookedLVLM

CANDIDATE = "candidate"
"""What answers under a defence that is being tried are stored by; the defence itself is known by its fingerprint."""


def answer_verdicts(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    defence: Repair | None,
    judge: Judge,
    *,
    store: GenerationStore | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    watched: Sequence[Repair] = (),
) -> list[Verdict]:
    """A verdict on the answer to each example.

    Args:
        lvlm: The model.
        examples: With ids.
        defence: What is on the model; None: nothing.
        judge: Says what an answer is.
        store: Where answers are kept, so that a rerun generates only what is missing; None: in memory.
        max_new_tokens: Most tokens of an answer; None: as the model's own configuration says, else 32.
        batch_size: Examples at a time.
        watched: Gated defences that will be asked the same examples from the same store: their gates are read on the way, so that only
            what they open for is generated again.
    """
    return several_verdicts(
        lvlm,
        examples,
        [defence],
        judge,
        store=store,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        watched=watched,
        progress=False,
    )[0]


def several_verdicts(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    defences: Sequence[Repair | None],
    judge: Judge,
    *,
    store: GenerationStore | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    watched: Sequence[Repair] = (),
    progress: bool = True,
    desc: str | None = None,
) -> list[list[Verdict]]:
    """:func:`answer_verdicts` of each of several defences; processes that share the work have all of it before them.

    Args:
        lvlm: The model.
        examples: With ids.
        defences: What is on the model; None: nothing.
        judge: Says what an answer is.
        store: Where answers are kept; None: in memory.
        max_new_tokens: Most tokens of an answer.
        batch_size: Examples at a time.
        watched: Gated defences whose gates are read on the way.
        progress: Whether to show a progress bar.
        desc: What it says.
    """
    asked = list(examples)
    answers = generate_several(
        lvlm,
        [Ask(asked, CANDIDATE, defence) for defence in defences],
        store=GenerationStore() if store is None else store,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        desc=desc,
        watched=watched,
    )
    return [judge_answers(given, judge, examples=asked) for given in answers]


def share(verdicts: Sequence[Verdict], wanted: Verdict) -> float:
    """Share of a verdict among those that are not missing; NaN if all are.

    Args:
        verdicts: Of any examples; none: 0.
        wanted: The one that is counted.

    Example:
        >>> from care_lens import Verdict
        >>> from care_lens.evaluation import share
        >>> share([Verdict.COMPLIED, Verdict.REFUSED, Verdict.MISSING], Verdict.COMPLIED)
        0.5
    """
    known = sum(v is not Verdict.MISSING for v in verdicts)
    if verdicts and not known:
        return float("nan")
    return sum(v is wanted for v in verdicts) / max(known, 1)


def missing_share(verdicts: Sequence[Verdict]) -> float:
    """Share of verdicts that are missing; 0 of none.

    Example:
        >>> from care_lens import Verdict
        >>> missing_share([Verdict.COMPLIED, Verdict.MISSING])
        0.5
    """
    return sum(v is Verdict.MISSING for v in verdicts) / max(len(verdicts), 1)


def within_loss(after: float, before: float, loss: float) -> bool:
    """Whether a share fell by no more than a loss; a loss of exactly so much is within it, whatever the last bits of the two shares say.

    Args:
        after: The share now.
        before: The share it is compared with.
        loss: Most that it may fall by.

    Example:
        >>> within_loss(7 / 10, 8 / 10, 0.1), 7 / 10 >= 8 / 10 - 0.1
        (True, False)
    """
    return after >= before - loss - 1e-9


def require_max_missing(max_missing: float | int) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: If it is below 0 or above 1.
    """
    if not 0 <= max_missing <= 1:
        raise ValueError(f"max_missing must be a share from 0 to 1, got {max_missing}")


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """n examples taken at even distances, so that every channel has its share; all of them where there are fewer.

    Args:
        examples: In the order of their channels.
        n: How many.

    Example:
        >>> from care_lens import Example
        >>> [e.prompt for e in spread([Example(str(i)) for i in range(6)], 3)]
        ['0', '2', '4']
    """
    n = min(n, len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]
