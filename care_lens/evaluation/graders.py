"""Graders of utility benchmarks: how right is an answer, from 0 to 1?

A grader has a ``name``, a ``metric`` and ``scores(examples, texts)``, a number for each answer. The truth is read off the examples as :mod:`care_lens.data.benchmarks` makes them, and off
stored answers, which keep it. NaN stands for what cannot be graded: a missing answer, or an example without a truth. An answer that says nothing, refuses or names no choice is graded, and is wrong:
leaving it out would make a defence that breaks the model look harmless.

    grade_store(store, {"mmbench": ChoiceGrader(circular=True), "vqav2": VQAGrader()})
    evaluate(lvlm, suites, defences, judge=judge, graders={"vqav2": VQAGrader()})
"""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from care_lens.core.examples import Example
from care_lens.core.verdicts import JudgeError, require_texts
from care_lens.evaluation.metrics import TRIAL_COLUMNS
from care_lens.evaluation.normalise import plain_words, vqa_normalised
from care_lens.evaluation.refusal import own_words, says_something
from care_lens.evaluation.store import GenerationStore, StoredAnswer

NAN = float("nan")

_OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)
_ALONG = r"or|and|nor|is|was|are|because|since|as|but|not|which|that|this|the|it|if|in|on|so|due|from|for|with|according|would|could|should|must|can|seems|looks|fits"
# "A" and "I" before another small letter are an article and a pronoun; a small letter is one only where nothing else could be meant.
_LETTER = rf"(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:{_ALONG})\b)[a-z])|(?<=[(\[])([a-z])(?=[)\]]))"
_NOUN = r"(?i:\b(?:answer|option|choice)\b)"
_MARKS = r"[\s:*\"'(\[]*"
_STATED = re.compile(
    rf"{_NOUN}\**\s*(?:(?i:(?:is|are|would be|should be|must be)\b)|[:=])[\s:*\"'(\[]*(?:(?i:option|choice|letter|answer)\s*)?{_MARKS}{_LETTER}"
)
_DENIED = re.compile(
    rf"{_NOUN}\s+(?i:(?:is|are)\s*(?:not|n't|neither))\b{_MARKS}(?:(?i:option|choice|letter)\s*)?{_MARKS}{_LETTER}"
)
_MENTIONED = re.compile(rf"{_NOUN}{_MARKS}{_LETTER}")
_REJECTED_BEFORE = re.compile(
    r"(?i:\b(?:not|than|neither|nor|exclude|excludes|reject|rejects|eliminate|eliminates)|n't)\s+(?:the\s+)?$"
)
_REJECTED_AFTER = re.compile(r"(?i:\b(?:not|incorrect|wrong|false|neither)\b|n't\b)")
_WRONG_NOUN = re.compile(r"(?i:\b(?:wrong|incorrect|false|other|worst)\s*)$")
_CLAUSE = re.compile(r"[.!?\n;,]|\b(?:because|since|but|while|whereas)\b")
_OFFERED = re.compile(r"[\s*\"')\]]*(?:or|and|/|,)\s*(?:option\s+)?[(\[*\"']*[A-Z](?![\w'])")
_FIRST = re.compile(r"^[\s(\[*\"']*([A-Z])(?:[)\].:,;*\"']|$)")
_MARKED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])\*\*|\\boxed\{([A-Z])\}")
_ALONE = re.compile(r"(?<![\w'])(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:or|and|nor|is)\b)[a-z]))")


@runtime_checkable
class Grader(Protocol):
    """What grades answers.

    Attributes:
        name: What it is called in tables.
        metric: "accuracy" or "circular" (0 or 1), "score" (0 to 1), or another number's name.

    A grader may have a method ``unit(example)``: examples of one unit are one trial, worth the least of their scores.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str: ...

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """A score for each answer; NaN for what cannot be graded."""
        ...


class ChoiceGrader:
    """Multiple choice: right if the letter that the answer names is the example's ``response``. For MMBench and ScienceQA.

    The choices are the lines "A. ..." at the end of the prompt, as the readers of both write them. :func:`chosen_letter` says how a letter is read.

    Args:
        circular: MMBench's circular evaluation: a question is asked with its choices turned, and is right only if every turn is. The turns are
            the examples of one group, which each must have.
        extract: Another way to read a letter: called with the text and the choices by letter; returns a letter or None.
        name: Its name in tables.

    Attributes:
        metric: "accuracy", or "circular".

    Example:
        >>> asked = Example("Question: which?\\nOptions:\\nA. cat\\nB. dog\\nPick one.", response="B")
        >>> ChoiceGrader().scores([asked] * 4, ["The answer is (B).", "a dog", "A", None])
        [1.0, 1.0, 0.0, nan]
    """

    def __init__(
        self,
        *,
        circular: bool = False,
        extract: Callable[[str, Mapping[str, str]], str | None] | None = None,
        name: str = "choice",
    ) -> None:
        self.circular, self.name, self.metric = circular, name, "circular" if circular else "accuracy"
        self._extract = extract or chosen_letter

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """1 for the right letter, 0 for another or none; NaN for a missing answer or an example without a right letter.

        Raises:
            JudgeError: If there is not one text for each example, or the right letter is not among the choices.
        """
        require_texts(examples, texts)
        return [
            self._score(example, text, row) for row, (example, text) in enumerate(zip(examples, texts, strict=True))
        ]

    def unit(self, example: Example) -> str:
        """What makes one trial: the question where evaluation is circular, else the example.

        Raises:
            JudgeError: If evaluation is circular and the example has no group, so that its question is not known.
        """
        if not self.circular:
            return example.id
        if not example.group:
            raise JudgeError(
                f"group must name the question of an example in circular evaluation, got none in {example.id!r}; give the turns of a question "
                "one group, or take circular=False"
            )
        return example.group

    def _score(self, example: Example, text: str | None, row: int) -> float:
        if text is None or example.response is None:
            return NAN
        choices, right = choices_of(example), example.response.strip().strip("().").upper()
        if right not in choices:
            raise JudgeError(
                f"response must be the letter of a choice in the prompt, one of {[*choices]}, got {example.response!r:.40} in row {row} ({example.id!r}); take the "
                "readers of care_lens.data.benchmarks, or write the choices as lines 'A. ...'"
            )
        return float(self._extract(own_words(example, text) or "", choices) == right)


def choices_of(example: Example) -> dict[str, str]:
    """The choices of a question by letter: the lines "A. ..." after the last line "Options:", else of the whole prompt."""
    _, _, after = example.prompt.rpartition("Options:")
    return dict(_OPTION.findall(after))


def chosen_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or None.

    In this order: a letter that is stated ("the answer is B", "choice: B", the last one where there are several); one that it begins with ("B.", "(B) dog"); the only
    one that is marked ("(B)", "**B**", "\\boxed{B}"); the only option that is mentioned ("option B") and not rejected ("not option B", "option B is wrong"); the only
    letter that stands alone and is not of a rejected option; the only choice whose text is in it, leaving out choices that are part of another one in it. "A" before
    a small letter is an article; a letter beside another one ("B or C") is not stated.

    Args:
        text: An answer.
        choices: The texts of the choices by their letters.

    Example:
        >>> chosen_letter("It is a dog, not a fish", {"A": "cat", "B": "dog", "C": "hot dog"})
        'B'
    """
    text = text.strip()
    stated = [
        letter
        for found in _STATED.finditer(text)
        if (letter := _letter(found)) in choices
        and not _WRONG_NOUN.search(text, 0, found.start())
        and not _OFFERED.match(text, found.end())
    ]
    if stated:
        return stated[-1]
    first = _FIRST.match(text)
    if first and first[1] in choices:
        return first[1]
    marked = {letter for groups in _MARKED.findall(text) for letter in groups if letter in choices}
    if len(marked) == 1:
        return marked.pop()
    mentioned, rejected = _mentioned(text)
    named = (mentioned - rejected) & {*choices}
    if len(named) == 1:
        return named.pop()
    alone = {letter for groups in _ALONE.findall(text) for letter in groups if letter in choices}
    if len(alone - rejected) == 1:
        return (alone - rejected).pop()
    if marked or alone - rejected:
        return None
    said = f" {plain_words(text)} "
    within = {
        letter: words for letter, choice in choices.items() if (words := plain_words(choice)) and f" {words} " in said
    }
    whole = [
        letter
        for letter, words in within.items()
        if not any(f" {words} " in f" {other} " and words != other for other in within.values())
    ]
    return whole[0] if len(whole) == 1 else None


def _letter(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def _mentioned(text: str) -> tuple[set[str], set[str]]:
    """Letters that stand behind "option" and the like, and those of them that are called wrong in the same clause."""
    mentioned: set[str] = set()
    rejected: set[str] = set()
    rejected |= {_letter(found) for found in _DENIED.finditer(text)}
    rejected |= {_letter(found) for found in _STATED.finditer(text) if _WRONG_NOUN.search(text, 0, found.start())}
    for found in _MENTIONED.finditer(text):
        mentioned.add(_letter(found))
        end = _CLAUSE.search(text, found.end())
        before = _REJECTED_BEFORE.search(text, 0, found.start()) or _WRONG_NOUN.search(text, 0, found.start())
        if before or _REJECTED_AFTER.search(text, found.end(), end.start() if end else len(text)):
            rejected.add(_letter(found))
    return mentioned, rejected


class VQAGrader:
    """VQA accuracy: the share of people who gave this answer, over 3, at most 1 (Antol et al. 2015, Goyal et al. 2017).

    As the official evaluation computes it: averaged over leaving out each of the ten people, with punctuation, articles, numbers and contractions normalised, on both sides. The truth is ``meta["answers"]``, as JSON.

    Args:
        leave_one_out: False: min(n / 3, 1) of all answers, as the formula is often printed.
        name: Its name in tables.

    Attributes:
        metric: "score".

    Example:
        >>> people = ["two"] * 2 + ["2"] * 1 + ["three"] * 7
        >>> asked = Example("how many?", meta={"answers": json.dumps(people)})
        >>> [round(score, 2) for score in VQAGrader().scores([asked, asked], ["Two.", "three"])]
        [0.9, 1.0]
    """

    metric = "score"

    def __init__(self, *, leave_one_out: bool = True, name: str = "vqa-accuracy") -> None:
        self.leave_one_out, self.name = leave_one_out, name

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """The accuracy of each answer; NaN for a missing one or an example without answers.

        Raises:
            JudgeError: If there is not one text for each example, or ``meta["answers"]`` is no JSON list of texts.
        """
        require_texts(examples, texts)
        return [
            self._score(example, text, row) for row, (example, text) in enumerate(zip(examples, texts, strict=True))
        ]

    def _score(self, example: Example, text: str | None, row: int) -> float:
        people = listed(example, "answers", row)
        if text is None or not people:
            return NAN
        said, people = vqa_normalised(own_words(example, text) or ""), [vqa_normalised(answer) for answer in people]
        same = [answer == said for answer in people]
        if len(people) == 1:
            return float(same[0])
        if not self.leave_one_out:
            return min(sum(same) / 3, 1.0)
        return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(people)


class OpenAnswerGrader:
    """Open answers with a short truth, without asking a model: the share of the parts of the truth that the answer holds. In the way of MM-Vet (Yu et al. 2023).

    ``response`` is the truth; <AND> joins parts that must all be there, <OR> ways to say it. A part is held if its words stand in the answer in a row, case, punctuation and
    articles aside. It sees no synonyms, and figures are not those of MM-Vet's own grader, a language model: that is
    :class:`~care_lens.evaluation.asked.MMVetGrader`.

    Args:
        name: Its name in tables.

    Attributes:
        metric: "score".

    Example:
        >>> asked = Example("which colours?", response="red <AND> blue <OR> purple")
        >>> OpenAnswerGrader().scores([asked] * 4, ["The red one.", "Purple!", "blue and RED", "redder"])
        [0.5, 1.0, 1.0, 0.0]
    """

    metric = "score"

    def __init__(self, *, name: str = "open-answer") -> None:
        self.name = name

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """The share of the truth in each answer; NaN for a missing one or an example without a truth.

        Raises:
            JudgeError: If there is not one text for each example.
        """
        require_texts(examples, texts)
        return [self._score(example, text) for example, text in zip(examples, texts, strict=True)]

    def _score(self, example: Example, text: str | None) -> float:
        ways = [
            [plain_words(part) for part in way.split("<AND>") if says_something(part)]
            for way in (example.response or "").split("<OR>")
        ]
        ways = [way for way in ways if way]
        if text is None or not ways:
            return NAN
        said = f" {plain_words(own_words(example, text) or '')} "
        return max(sum(f" {part} " in said for part in way) / len(way) for way in ways)


def listed(example: Example, key: str, row: int) -> list[str]:
    """A list of texts that the metadata holds as JSON; empty if it holds none.

    Raises:
        JudgeError: If it is something else; the message names the row.
    """
    held = example.meta.get(key)
    if held is None:
        return []
    try:
        found = json.loads(held)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise JudgeError(
            f"meta[{key!r}] must be a JSON list of texts, got {held!r:.40} in row {row} ({example.id!r}); write json.dumps([...])"
        )
    return found


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
        Frame with :data:`~care_lens.evaluation.metrics.TRIAL_COLUMNS`: one row an answer, or a unit where the grader has some: 0 if one of its answers is, NaN if one cannot be graded.

    Raises:
        JudgeError: If the grader does not return a number for each answer.
    """
    asked = list(examples) or [answer.to_example() for answer in answers]
    scores = graded_scores(grader, answers, asked) if scores is None else scores
    units: dict[tuple[Any, ...], list[float]] = {}
    unit = getattr(grader, "unit", None)
    for i, answer in enumerate(answers):
        name = answer.id if unit is None else str(unit(asked[i]))
        key = (answer.defence, answer.channel, grader.metric, grader.name, answer.seed, name, answer.group)
        units.setdefault(key, []).append(scores[i])
    return pd.DataFrame([(*key, _least(values)) for key, values in units.items()], columns=list(TRIAL_COLUMNS))


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
