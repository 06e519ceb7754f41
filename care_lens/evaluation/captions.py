"""CIDEr-D: how much a caption has in common with those that people wrote, weighed by how telling its words are.

For n = 1 to 4 the n-grams of a caption c and of each reference r are vectors g of counts times log(N / pictures whose references hold the n-gram). CIDEr-D is
10 times the mean over n and references of min(g(c), g(r)) . g(r) / (|g(c)| |g(r)|) * exp(-(l(c) - l(r))^2 / (2 * 6^2)); l counts bigrams, as the published code does.

Source: Vedantam et al. 2015 (arXiv:1411.5726). Its code splits words by a Java program; here a word is letters or digits with apostrophes, so that figures can differ from published ones in
the last digits.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from care_lens.core.display import ShortRepr, brief
from care_lens.core.examples import Example
from care_lens.core.verdicts import JudgeError, require_texts
from care_lens.evaluation.graders import listed, require_some
from care_lens.evaluation.refusal import own_words

_SIGMA, _LONGEST = 6.0, 4
NGram = tuple[str, ...]


class CaptionGrader(ShortRepr):
    """CIDEr-D of captions. The references are ``meta["captions"]``, as JSON, else the example's ``response``.

    Args:
        corpus: References of all pictures of the set, from which the weights are counted: one list a picture. None: those of the examples that are graded together, which
            makes a score depend on them.
        name: Its name in tables.

    Attributes:
        metric: "cider": 0 or more, 10 for a caption that is its only reference.

    Example:
        >>> pictures = [["a red cat sits"], ["two dogs run"], ["the sky is blue"]]
        >>> asked = [Example("describe it", response=references[0]) for references in pictures]
        >>> [round(score, 1) for score in CaptionGrader().scores(asked, ["a red cat sits", "a dog runs", "blue sky"])]
        [10.0, 0.0, 1.7]
    """

    metric = "cider"

    def __init__(self, *, corpus: Sequence[Sequence[str]] | None = None, name: str = "cider-d") -> None:
        self._corpus, self.name = corpus, name

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its name and settings."""
        return type(self).__name__, {
            "name": brief(self.name),
            "corpus": "of the captions it is given" if self._corpus is None else f"{len(self._corpus)} pictures",
        }

    def scores(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[float]:
        """The score of each caption; NaN for a missing one or a picture without references, and, with a warning, for one whose references are not JSON.

        Raises:
            JudgeError: If there is not one text for each example, the weights would be counted from fewer than two pictures, or the references are JSON in none.
        """
        require_texts(examples, texts)
        references: list[list[str]] = []
        errors: list[JudgeError] = []
        for row, example in enumerate(examples):
            try:
                references.append(listed(example, "captions", row) or ([example.response] if example.response else []))
            except JudgeError as error:
                errors.append(error)
                references.append([])
        require_some(self.name, errors, any(references), len(examples))
        corpus = [held for held in (references if self._corpus is None else self._corpus) if held]
        if not corpus:
            return [float("nan")] * len(texts)
        if len(corpus) < 2:
            raise JudgeError(
                "captions must be weighed by two pictures or more, got one; grade them together, or give corpus"
            )
        weights = Counter(gram for held in corpus for gram in {gram for text in held for gram in _grams(text)})
        return [
            _cider(own_words(example, text) or "", held, weights, len(corpus))
            if text is not None and held
            else float("nan")
            for example, text, held in zip(examples, texts, references, strict=True)
        ]


def _grams(text: str) -> Counter[NGram]:
    words = re.findall(r"[a-z0-9]+(?:'[a-z0-9]+)*", text.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1))


def _cider(text: str, references: Sequence[str], pictures: Counter[NGram], n_pictures: int) -> float:
    said = _vectors(text, pictures, n_pictures)
    scores = []
    for reference in references:
        held = _vectors(reference, pictures, n_pictures)
        near = math.exp(-((said[1] - held[1]) ** 2) / (2 * _SIGMA**2))
        for own, theirs in zip(said[0], held[0], strict=True):
            common = sum(min(value, theirs[gram]) * theirs[gram] for gram, value in own.items() if gram in theirs)
            size = math.hypot(*own.values()) * math.hypot(*theirs.values())
            scores.append(near * common / size if size else 0.0)
    return 10 * float(np.mean(scores))


def _vectors(text: str, pictures: Counter[NGram], n_pictures: int) -> tuple[list[dict[NGram, float]], int]:
    """Weighed counts by the length of the n-gram, and the number of bigrams."""
    grams = _grams(text)
    vectors: list[dict[NGram, float]] = [{} for _ in range(_LONGEST)]
    for gram, count in grams.items():
        vectors[len(gram) - 1][gram] = count * (math.log(n_pictures) - math.log(max(pictures[gram], 1)))
    return vectors, sum(count for gram, count in grams.items() if len(gram) == 2)
