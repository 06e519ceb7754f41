"""Attacks without gradients: best of n, and searches over renderings and wordings. What they go by is a score, which is an argument.

Each candidate is asked of the model with the defence on it, so that any defence can be attacked so, those that only act on words, on
logits or on whole answers too.

    BestOfN(n=64, score=JudgeScore(study.judge)).run(lvlm, examples, defence=repair)
    EvolutionarySearch(space=Renderings(size=(64, 64)), score=LossScore(OutcomeLoss(study.outcome))).run(lvlm, examples)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from care_lens.attacks.common import (
    asked_for,
    described,
    identity,
    in_channel,
    on_model,
    require_requests,
    run_settings,
)
from care_lens.attacks.kinds import register_attack
from care_lens.attacks.scores import LossScore, Score
from care_lens.attacks.templates import example_random
from care_lens.attacks.typographic import DrawingError
from care_lens.attacks.variations import Renderings, ScrambledWords, SearchSpace, Variation
from care_lens.core.attack import AttackResult
from care_lens.core.defence import defended
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.files import packed, unpacked
from care_lens.core.journal import Journal
from care_lens.core.progress import Steps
from care_lens.lvlm.hooked import HookedLVLM

_TARGETS, _SCRAMBLED, _RENDERINGS = LossScore(), ScrambledWords(), Renderings()
Candidate = tuple[Example | None, str]
"""What is tried, or None where it cannot be made, and what to call it in the history."""


class ScoreError(CareLensError, ValueError):
    """A score did not return one number for each candidate, or a better one for a candidate that does not exist."""


@dataclass(frozen=True, kw_only=True)
class SearchAttack(ABC):
    """Base of attacks that try candidates and keep the best of each example.

    Attributes:
        score: What candidates are compared by, smaller is better (:mod:`care_lens.attacks.scores`).
        stop_score: An example is left alone once its score is at most this; None: never.
        batch_size: Candidates at a time.
        channel: Channel of the examples made; None: as it was.
    """

    score: Score = _TARGETS
    stop_score: float | int | None = None
    batch_size: int = 32
    channel: str | None = None
    name: str = "search"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {self.batch_size}")

    @property
    @abstractmethod
    def rounds(self) -> int:
        """How often candidates are made and scored."""

    @abstractmethod
    def candidates(self, example: Example, seed: int, number: int, state: dict[str, Any]) -> list[Candidate]:
        """What is tried for one example in one round.

        Args:
            example: The request as it was.
            seed: Of the run; draws come from it, the example and the round alone.
            number: The round, from 0.
            state: Kept for this example from round to round.
        """

    def told(self, scores: Sequence[float], state: dict[str, Any]) -> None:
        """Take note of the scores of this round's candidates, in order; inf for those that could not be made.

        Args:
            scores: One a candidate.
            state: Of the example; by default they are kept in it as "scores".
        """
        state["scores"] = list(scores)

    def describe(self) -> dict[str, Any]:
        """Its settings, JSON-able."""
        return described(self)

    def run(
        self,
        lvlm: HookedLVLM,
        examples: Sequence[Example],
        defence: Any = None,
        seed: int = 0,
        *,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> AttackResult:
        """Search for each example.

        Args:
            lvlm: The model.
            examples: The requests.
            defence: On the model while candidates are scored.
            seed: Seed of all draws.
            checkpoint: A file in which the scores of finished rounds are kept; a stopped search goes on from it.
            progress: Whether to show a progress bar.

        Returns:
            The best candidate of each example (the request itself where none is better), and every candidate's score in the history.

        Raises:
            ValueError: If there are no examples.
            ScoreError: If the score is not one number for each candidate.
            ArtifactError: If the checkpoint is of another search or damaged.
        """
        require_requests(examples)
        settings = run_settings(self, examples, defence, seed)
        kept = _Kept(checkpoint, {**settings, **identity(lvlm, examples, defence)})
        n, history = len(examples), list[dict[str, Any]]()
        states: list[dict[str, Any]] = [{} for _ in examples]
        with on_model(defence, lvlm), Steps(total=self.rounds + 1, desc=self.name, disable=not progress) as bar:
            # a judge is shown what is asked for, not the wording or picture that is tried
            asked = [asked_for(e) for e in examples]
            plain = [replace(e, behaviour=what) for e, what in zip(examples, asked, strict=True)]
            clean = kept.scores(-1, lambda: self._scored(lvlm, plain, defence))
            bar.update()
            best, losses, tries, names = list(examples), list(clean), [0] * n, [""] * n
            for number in range(self.rounds):
                left = [i for i in range(n) if self.stop_score is None or losses[i] > self.stop_score]
                if not left:
                    break
                made = {i: self.candidates(examples[i], seed, number, states[i]) for i in left}
                flat = [replace(one, behaviour=asked[i]) for i in left for one, _ in made[i] if one is not None]
                found = iter(kept.scores(number, lambda flat=flat: self._scored(lvlm, flat, defence)))
                for i in left:
                    scores = [math.inf if one is None else next(found) for one, _ in made[i]]
                    self.told(scores, states[i])
                    for (one, name), score in zip(made[i], scores, strict=True):
                        history.append({"row": i, "step": tries[i], "loss": score, "what": name})
                        tries[i] += 1
                        if one is not None and score < losses[i]:
                            best[i], losses[i], names[i] = one, score, name
                bar.update()
        kind = [in_channel(replace(e, behaviour=what), self.channel) for e, what in zip(best, asked, strict=True)]
        return AttackResult.of(kind, settings=settings, loss=losses, clean_loss=clean, tries=tries, history=history)

    def _scored(self, lvlm: HookedLVLM, candidates: Sequence[Example], defence: Any) -> list[float]:
        """The scores of candidates, in batches, as the defence has them."""
        scores: list[float] = []
        for start in range(0, len(candidates), self.batch_size):
            part = defended(defence, candidates[start : start + self.batch_size])
            given = [float(one) for one in self.score(lvlm, part)]
            if len(given) != len(part) or any(one != one for one in given):
                raise ScoreError(
                    f"score must return a number for each of {len(part)} candidates, got {len(given)}: {given[:4]}"
                )
            scores += given
        return scores


@register_attack
@dataclass(frozen=True, kw_only=True)
class BestOfN(SearchAttack):
    """n random variations of each request, of which the best is kept (Hughes et al. 2024, arXiv:2412.03556).

    Attributes:
        n: How many are drawn.
        variation: How: a function ``(example, draws) -> example``, or several of which each draw takes one.
        per_round: Candidates of an example scored together; a stop is looked for between rounds.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.attacks import BestOfN, LossScore, OutcomeLoss, Reworded
        >>> lvlm, study = organism.load(), organism.study()
        >>> attack = BestOfN(n=3, variation=Reworded(("please {prompt}", "now {prompt}")), score=LossScore(OutcomeLoss(study.outcome)))
        >>> result = attack.run(lvlm, organism.examples("plain", "test", n=2))
        >>> bool((result.frame.loss <= result.frame.clean_loss).all())
        True
    """

    n: int = 32
    variation: Variation | tuple[Variation, ...] = _SCRAMBLED
    per_round: int = 8
    name: str = "best of n"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 1 or self.per_round < 1:
            raise ValueError(f"n and per_round must be 1 or more, got {self.n} and {self.per_round}")
        if isinstance(self.variation, tuple) and not self.variation:
            raise ValueError("variation must be a function or hold at least one, got none")

    @property
    def rounds(self) -> int:
        """n in parts of ``per_round``."""
        return math.ceil(self.n / self.per_round)

    def candidates(self, example: Example, seed: int, number: int, state: dict[str, Any]) -> list[Candidate]:
        """The next draws."""
        first = number * self.per_round
        return [self._drawn(example, seed, k) for k in range(first, min(first + self.per_round, self.n))]

    def _drawn(self, example: Example, seed: int, k: int) -> Candidate:
        draws = example_random(seed, example, "best of n", k)
        vary = draws.choice(self.variation) if isinstance(self.variation, tuple) else self.variation
        try:
            made = vary(example, draws)
        except DrawingError:
            return None, f"draw {k}: does not fit"
        return made, f"draw {k}"


@register_attack
@dataclass(frozen=True, kw_only=True)
class RandomSearch(SearchAttack):
    """Random points of a space of renderings and wordings.

    Attributes:
        space: What can be chosen (:class:`~care_lens.attacks.Renderings`, :class:`~care_lens.attacks.Choices`).
        population: Candidates of an example in a round.
        generations: Rounds.
    """

    space: SearchSpace = _RENDERINGS
    population: int = 8
    generations: int = 4
    name: str = "random search"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 1 or self.generations < 1:
            raise ValueError(
                f"population and generations must be 1 or more, got {self.population} and {self.generations}"
            )

    @property
    def rounds(self) -> int:
        """The generations."""
        return self.generations

    def candidates(self, example: Example, seed: int, number: int, state: dict[str, Any]) -> list[Candidate]:
        """The points of this generation."""
        draws = example_random(seed, example, self.name, number)
        state["tried"] = [self.point(draws, state) for _ in range(self.population)]
        return [self._built(example, chosen) for chosen in state["tried"]]

    def point(self, draws: Any, state: dict[str, Any]) -> dict[str, Any]:
        """One point of the space."""
        return {name: draws.choice(list(values)) for name, values in self.space.choices.items()}

    def _built(self, example: Example, chosen: Mapping[str, Any]) -> Candidate:
        name = ", ".join(f"{key}={value}" for key, value in chosen.items() if len(self.space.choices[key]) > 1)
        try:
            return self.space.build(example, chosen), name
        except DrawingError:
            return None, f"{name}: does not fit"


@register_attack
@dataclass(frozen=True, kw_only=True)
class EvolutionarySearch(RandomSearch):
    """An evolution: of each generation the best are kept, and the next ones are crossed from two of them and changed.

    Attributes:
        parents: How many are kept.
        mutation: Probability that a choice is drawn anew.
    """

    parents: int = 3
    mutation: float = 0.25
    name: str = "evolutionary search"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parents < 1 or not 0 <= self.mutation <= 1:
            raise ValueError(
                f"parents must be 1 or more and mutation in [0, 1], got {self.parents} and {self.mutation}"
            )

    def point(self, draws: Any, state: dict[str, Any]) -> dict[str, Any]:
        """A child of two of the best; a random point where there are none yet."""
        fresh = super().point(draws, state)
        best = state.get("best", [])
        if not best:
            return fresh
        first, second = draws.choice(best)[1], draws.choice(best)[1]
        return {
            name: fresh[name] if draws.random() < self.mutation else draws.choice((first, second))[name]
            for name in fresh
        }

    def told(self, scores: Sequence[float], state: dict[str, Any]) -> None:
        """The best so far; of equal ones the earlier."""
        scored = [*state.get("best", []), *zip(scores, state["tried"], strict=True)]
        alive = [one for one in scored if one[0] < math.inf]
        state["best"] = sorted(alive, key=lambda one: one[0])[: self.parents]


class _Kept:
    """The scores of each finished round, in a journal; candidates are drawn again from the seed."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self._journal = None if path is None else Journal(path, kind="search attack", about=settings)
        self._rows: dict[int, list[float]] = {}
        for row in [] if self._journal is None else self._journal.append([]):
            self._rows[row["round"]] = unpacked(row["scores"])

    def scores(self, number: int, make: Any) -> list[float]:
        """The scores of a round, made if they are not there."""
        if number not in self._rows:
            self._rows[number] = make()
            if self._journal is not None:
                self._journal.append([{"round": number, "scores": packed(self._rows[number])}])
        return self._rows[number]
