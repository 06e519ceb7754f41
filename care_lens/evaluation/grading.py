"""What a grader is, and the trials that grading answers gives."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from care_lens.core.examples import Example
from care_lens.core.verdicts import JudgeError
from care_lens.evaluation.metrics import TRIAL_COLUMNS
from care_lens.evaluation.store import GenerationStore, StoredAnswer

NAN = float("nan")

log = logging.getLogger(__name__)


@runtime_checkable
class Grader(Protocol):
    """What grades answers.

    Attributes:
        name: What it is called in tables.
        metric: "accuracy" or "circular" (0 or 1), "score" (0 to 1), or another number's name.

    A grader may have a method ``unit(example)``: examples of one unit are one trial, worth the least of their scores. With a method ``unit_size(example)`` it
    says how many examples the unit has: one of which fewer are there is missing.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """A score for each answer; NaN for what cannot be graded."""
        ...


def graded_trials(
    grader: Grader,
    answers: Sequence[StoredAnswer],
    *,
    examples: Sequence[Example] = (),
    scores: Sequence[float] | None = None,
) -> pd.DataFrame:
    """Trials of one grader.

    Args:
        grader: The grader.
        answers: Answers under one defence or several; missing ones are trials that are missing.
        examples: The examples themselves, one an answer; none: made from the answers.
        scores: What :func:`graded_scores` made of them; None: the grader is asked.

    Returns:
        Frame with :data:`~care_lens.evaluation.metrics.TRIAL_COLUMNS`: one row an answer, or a unit where the grader has some: 0 if one of its answers is, NaN if one cannot be graded. A
        unit that lacks examples is NaN whatever the others scored, with a warning that counts them.

    Raises:
        JudgeError: If the grader does not return a number for each answer.
    """
    asked = list(examples) or [answer.to_example() for answer in answers]
    scores = graded_scores(grader, answers, asked) if scores is None else scores
    units: dict[tuple[Any, ...], list[int]] = {}
    unit = getattr(grader, "unit", None)
    for i, answer in enumerate(answers):
        name = answer.id if unit is None else str(unit(asked[i]))
        key = (answer.defence, answer.channel, grader.metric, grader.name, answer.seed, name, answer.group)
        units.setdefault(key, []).append(i)
    lacking = _lacking(grader, units, answers, asked)
    rows = [(*key, NAN if key in lacking else _least([scores[i] for i in of])) for key, of in units.items()]
    return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))


def _lacking(
    grader: Grader,
    units: Mapping[tuple[Any, ...], Sequence[int]],
    answers: Sequence[StoredAnswer],
    examples: Sequence[Example],
) -> dict[tuple[Any, ...], str]:
    """The units of which some examples are not there, with "1 of 4"; a warning counts them.

    A unit is easier to get right with fewer examples. One with a wrong answer is missing too: if only such ones counted, all that count would be wrong.
    """
    size = getattr(grader, "unit_size", None)
    if size is None:
        return {}
    lacking: dict[tuple[Any, ...], str] = {}
    for key, rows in units.items():
        there, wanted = len({answers[i].id for i in rows}), max(size(examples[i]) for i in rows)
        if there < wanted:
            lacking[key] = f"{there} of {wanted}"
    if lacking:
        (defence, channel, *_, name, _), there = next(iter(lacking.items()))
        log.warning(
            "%s: %d of %d questions count as missing, since some of their examples were not answered at all: there are %s of %r in channel %r under %r; "
            "answer them too (a limit on examples may have left them out), or grade each example by itself",
            grader.name, len(lacking), len(units), there, name, channel, defence,
        )  # fmt: skip
    return lacking


def graded_scores(grader: Grader, answers: Sequence[StoredAnswer], examples: Sequence[Example]) -> list[float]:
    """The scores of answers, NaN for missing ones, checked.

    Args:
        grader: The grader.
        answers: The answers; each defence, channel, seed and setting is graded as a set, so that what a grader counts over a set (captions) it counts over that one.
        examples: One an answer.

    Raises:
        JudgeError: If the grader does not return a number for each answer.
        ValueError: If there is not one example for each answer.
    """
    if len(examples) != len(answers):
        raise ValueError(
            f"examples must be one for each of {len(answers)} answers, got {len(examples)}; give all or none"
        )
    scores: list[float] = [NAN] * len(answers)
    sets: dict[tuple[Any, ...], list[int]] = {}
    for i, answer in enumerate(answers):
        sets.setdefault((answer.defence, answer.channel, answer.seed, answer.settings), []).append(i)
    for rows in sets.values():
        texts = [None if answers[i].missing else answers[i].response for i in rows]
        made = grader.scores([examples[i] for i in rows], texts)
        if len(made) != len(rows):
            raise JudgeError(
                f"grader {grader.name!r} must return a number for each of {len(rows)} answers, got {len(made)}"
            )
        for i, text, value in zip(rows, texts, made, strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isinf(value):
                raise JudgeError(f"grader {grader.name!r} must return numbers, got {value!r:.40} for {answers[i].id!r}")
            scores[i] = NAN if text is None else float(value)
    untold = [i for i, answer in enumerate(answers) if not answer.missing and math.isnan(scores[i])]
    if untold:
        first = answers[untold[0]]
        log.warning(
            "%s: %d of %d answers cannot be graded and count as missing, such as that of %r in channel %r: their examples have no truth or reference that %s can use",
            grader.name, len(untold), len(answers), first.id, first.channel, grader.name,
        )  # fmt: skip
    return scores


def _least(values: Sequence[float]) -> float:
    """The least score; a missing one leaves it open, unless another is 0 already."""
    if 0.0 in values:
        return 0.0
    return NAN if any(math.isnan(value) for value in values) else min(values)


def grade_store(
    store: GenerationStore, graders: Mapping[str, Grader], *, settings: Collection[str] | None = None
) -> pd.DataFrame:
    """Grade the answers of a store.

    Args:
        store: The answers.
        graders: Graders by channel; other channels are left alone.
        settings: Only answers generated under these settings (digests); None: all.

    Returns:
        Trials, as :meth:`~care_lens.evaluation.table.DefenceTable.from_trials` takes them.

    Raises:
        ValueError: If the store has no answers in one of the channels.
    """
    answers = store.answers(settings=settings)
    parts = []
    for channel, grader in graders.items():
        here = [answer for answer in answers if answer.channel == channel]
        if not here:
            known = sorted({answer.channel for answer in answers})
            raise ValueError(f"graders must be of channels in the store, some of {known}, got {channel!r}")
        parts.append(graded_trials(grader, here))
    return pd.concat(parts, ignore_index=True)
