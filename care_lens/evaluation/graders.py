"""Graders of utility benchmarks: how right is an answer, from 0 to 1?

A grader has a ``name``, a ``metric`` and ``scores(examples, texts)``, a number for each answer. The truth is read off the examples as :mod:`care_lens.data.benchmarks` makes them, and off
stored answers, which keep it. NaN stands for what cannot be graded: a missing answer, or an example without a truth. An answer that says nothing, refuses or names no choice is graded, and is wrong:
leaving it out would make a defence that breaks the model look harmless.

    grade_store(store, {"mmbench": ChoiceGrader(circular=True), "vqav2": VQAGrader()})
    evaluate(lvlm, suites, defences, judge=judge, graders={"vqav2": VQAGrader()})
"""

import json
import logging
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from care_lens.core.display import ShortRepr, brief
from care_lens.core.examples import Example
from care_lens.core.verdicts import JudgeError, require_texts
from care_lens.evaluation.choice_letters import choices_of, chosen_letter
from care_lens.evaluation.grading import NAN
from care_lens.evaluation.normalise import plain_words, vqa_normalised
from care_lens.evaluation.refusal import own_words, says_something

log = logging.getLogger(__name__)


class ChoiceGrader(ShortRepr):
    """Multiple choice: right if the letter that the answer names is the example's ``response``. For MMBench and ScienceQA.

    The choices are the lines "A. ..." at the end of the prompt, as the readers of both write them. :func:`chosen_letter` says how a letter is read.

    Args:
        circular: MMBench's circular evaluation: a question is asked with its choices turned, as many times as it has choices, and is right only if
            every turn is. The turns are the examples of one group, which each must have. A question that lacks turns (a limit, or a file with one turn of each) is
            missing, with a warning.
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

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its name and settings."""
        return type(self).__name__, {
            "name": brief(self.name),
            "metric": brief(self.metric),
        }

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """1 for the right letter, 0 for another or none; NaN for a missing answer or an example without a right letter.

        An example whose right letter is not among its choices is NaN too, with a warning.

        Raises:
            JudgeError: If there is not one text for each example, or none has its right letter among its choices.
        """
        require_texts(examples, texts)
        return each_score(self.name, self._score, examples, texts)

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

    def unit_size(self, example: Example) -> int:
        """How many examples make one trial: as many turns as the question has choices where evaluation is circular, else 1."""
        return len(choices_of(example)) if self.circular else 1

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


class VQAGrader(ShortRepr):
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

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its name and settings."""
        return type(self).__name__, {
            "name": brief(self.name),
            "leave_one_out": brief(self.leave_one_out),
        }

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """The accuracy of each answer; NaN for a missing one or an example without answers.

        An example whose ``meta["answers"]`` is no JSON list of texts is NaN too, with a warning.

        Raises:
            JudgeError: If there is not one text for each example, or ``meta["answers"]`` is such a list in none.
        """
        require_texts(examples, texts)
        return each_score(self.name, self._score, examples, texts)

    def _score(self, example: Example, text: str | None, row: int) -> float:
        people = listed(example, "answers", row)
        if text is None or not people:
            return NAN
        said, people = vqa_normalised(own_words(example, text) or ""), [vqa_normalised(answer) for answer in people]
        # An article alone is normalised to nothing, which an answer that says nothing must not equal.
        spoken = says_something(own_words(example, text))
        same = [answer == said and spoken for answer in people]
        if len(people) == 1:
            return float(same[0])
        if not self.leave_one_out:
            return min(sum(same) / 3, 1.0)
        return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(people)


class OpenAnswerGrader(ShortRepr):
    """Open answers with a short truth, without asking a model: the share of the parts of the truth that the answer holds. In the way of MM-Vet (Yu et al. 2023).

    ``response`` is the truth; <AND> joins parts that must all be there, <OR> ways to say it. A part is held if its words stand in the answer in a row, case, punctuation and
    articles aside. A part that is nothing but articles or signs ("A", "+") is held if it stands in the answer as it is written, between spaces or punctuation. It sees no synonyms, and figures are not those of MM-Vet's own grader, a language model: that is
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

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its name and settings."""
        return type(self).__name__, {
            "name": brief(self.name),
        }

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """The share of the truth in each answer; NaN for a missing one or an example without a truth.

        Raises:
            JudgeError: If there is not one text for each example.
        """
        require_texts(examples, texts)
        return [self._score(example, text) for example, text in zip(examples, texts, strict=True)]

    def _score(self, example: Example, text: str | None) -> float:
        ways = [
            [part for part in way.split("<AND>") if says_something(part)]
            for way in (example.response or "").split("<OR>")
        ]
        ways = [way for way in ways if way]
        if text is None or not ways:
            return NAN
        said = own_words(example, text) or ""
        return max(sum(_holds(said, part) for part in way) / len(way) for way in ways)


def _holds(said: str, part: str) -> bool:
    """Whether an answer holds a part of the truth."""
    if words := plain_words(part):
        return f" {words} " in f" {plain_words(said)} "
    tokens, wanted = _tokens(said), _tokens(part)
    # Case tells the letter A from the article, but not where the answer says nothing else.
    return f" {wanted} " in f" {tokens} " or (bool(wanted) and tokens.casefold() == wanted.casefold())


def _tokens(text: str) -> str:
    """What stands between spaces in a text, as it is written but without punctuation around it."""

    def bare(token: str) -> str:
        kept = [i for i, sign in enumerate(token) if not unicodedata.category(sign).startswith("P")]
        return token[kept[0] : kept[-1] + 1] if kept else ""

    return " ".join(filter(None, map(bare, text.split())))


def each_score(
    name: str,
    score: Callable[[Example, str | None, int], float],
    examples: Sequence[Example],
    texts: Sequence[str | None],
) -> list[float]:
    """The score of each answer; an example that cannot be graded as it is written is NaN with a warning, so that it does not cost the others theirs.

    Raises:
        JudgeError: What the first example raised, if none could be graded: then the data or the grader is another one than was meant.
    """
    found: list[float] = []
    errors: list[JudgeError] = []
    for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
        try:
            found.append(score(example, text, row))
        except JudgeError as error:
            errors.append(error)
            found.append(NAN)
    require_some(name, errors, any(value == value for value in found), len(found))
    return found


def require_some(name: str, errors: Sequence[JudgeError], some: bool, n: int) -> None:
    """Warn of examples that cannot be graded, counted and with the first error.

    Args:
        name: The grader's.
        errors: One for each such example.
        some: Whether others can be graded.
        n: How many examples there are.

    Raises:
        JudgeError: The first error, if no others can be.
    """
    if errors and not some:
        raise errors[0]
    if errors:
        log.warning("%s: %d of %d answers are not graded and count as missing: %s", name, len(errors), n, errors[0])


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
