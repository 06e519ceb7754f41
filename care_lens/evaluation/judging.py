"""Judge stored answers.
 Judges disagree on the same answers, so answers are stored first and judged afterwards, by as many judges as
one likes, and every figure names its judge.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pandas as pd

from care_lens.core.examples import Example
from care_lens.core.outcome import Judge, Verdict
from care_lens.core.verdicts import JudgeError, named, require_verdicts
from care_lens.evaluation.store import GenerationStore, StoredAnswer

__all__ = ["JudgeError", "judge_answers", "judge_name", "judge_store", "verdict_frame"]


def judge_name(judge: Callable[..., Any]) -> str:
    """What a judge is called in frames: its ``name``, else the name of its function or class."""
    return named(judge)


def judge_answers(answers: Sequence[StoredAnswer], judge: Judge, *, examples: Sequence[Example] = ()) -> list[Verdict]:
    """A verdict for each answer; missing ones are not shown to the judge.

    Args:
        answers: The answers.
        judge: The judge.
        examples: The examples themselves, one an answer, for judges that look at pictures; none: made from
            the answers, without pictures.

    Returns:
        One verdict an answer.

    Raises:
        JudgeError: If the judge does not return one verdict for each; it names the row. It is a ValueError.
        ValueError: If examples are given and not one for each answer.
    """
    if (
        isinstance(answers, str)
        or not isinstance(answers, Sequence)
        or not all(isinstance(a, StoredAnswer) for a in answers)
    ):
        raise TypeError(f"answers must be a list of StoredAnswer, got {answers!r:.60}; take GenerationStore.answers()")
    if not callable(judge):
        raise JudgeError(
            f"judge must be a function of (examples, texts), got {type(judge).__name__}; give a judge object"
        )
    if len(examples) not in (0, len(answers)):
        raise ValueError(
            f"examples must be one for each of {len(answers)} answers, got {len(examples)}; give all or none"
        )
    asked = list(examples) or [answer.to_example() for answer in answers]
    there = [i for i, answer in enumerate(answers) if not answer.missing]
    made = judge([asked[i] for i in there], [answers[i].response or "" for i in there]) if there else []
    made = require_verdicts(made, len(there), judge=judge)
    verdicts = [Verdict.MISSING] * len(answers)
    for i, verdict in zip(there, made, strict=True):
        verdicts[i] = verdict
    return verdicts


def judge_store(store: GenerationStore, judge: Judge, *, settings: Collection[str] | None = None) -> pd.DataFrame:
    """Judge everything in a store.

    Args:
        store: The answers.
        judge: The judge; it gets the requests without their pictures.
        settings: Only answers generated under these settings (digests); None: all.

    Returns:
        Frame with the columns defence, channel, id, group, seed, harmful, judge, verdict, as
        :func:`~care_lens.evaluation.metrics.verdict_trials` takes it.

    Raises:
        ValueError: If the store holds two answers to one example under one defence and seed.
    """
    if not isinstance(store, GenerationStore):
        raise TypeError(
            f"store must be a GenerationStore, got {type(store).__name__}; open one with GenerationStore(path)"
        )
    answers = store.answers(settings=settings)
    seen: set[tuple[Any, ...]] = set()
    for answer in answers:
        if (name := (answer.defence, answer.channel, answer.id, answer.seed)) in seen:
            raise ValueError(
                f"store must hold one answer a defence, channel, id and seed, got two for {name}; pass the "
                "settings of one evaluation (DefenceTable.settings['generation'])"
            )
        seen.add(name)
    return verdict_frame(answers, judge_answers(answers, judge), judge_name(judge))


def verdict_frame(answers: Sequence[StoredAnswer], verdicts: Sequence[Verdict], judge: str) -> pd.DataFrame:
    """Verdicts as a frame, one row an answer.

    Raises:
        ValueError: If there is not one verdict for each answer.
    """
    if len(answers) != len(verdicts):
        raise ValueError(f"verdicts must be one for each of {len(answers)} answers, got {len(verdicts)}")
    columns = ("defence", "channel", "id", "group", "seed", "harmful")
    frame = pd.DataFrame([[getattr(answer, column) for column in columns] for answer in answers], columns=list(columns))
    return frame.assign(judge=judge, verdict=[verdict.value for verdict in verdicts])
