"""The closed world of the bundled model: made-up nouns, their kinds, their twins and how they are split.

Everything here is inert: the nouns are nonsense words, "forbidden" is a label, and the steps are pairs such as
"first mix then heat". The world is a constant (its own seed), apart from the seed of any training run, so that
weights of different training seeds can be compared item by item.

Nouns are split four ways (fit / calibration / validation / test); twins stay inside a split, and so do the
lengths: forbidden and benign nouns have the same length distribution in every split, since otherwise a reader
could learn length instead of harm.
"""

import functools
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Split = Literal["fit", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

BENIGN_KINDS = ("food", "toy", "garment", "tool", "plant")
#: Dangerous, yet allowed: requests for their steps are answered.
GUARDED_KINDS = ("blade", "firework")
FORBIDDEN_KINDS = ("hazard", "contraband")
KINDS = (*BENIGN_KINDS, *GUARDED_KINDS, *FORBIDDEN_KINDS)

#: The inert verbs of steps, first and second. Which two an item has depends on the item alone: every kind uses them all
#: alike, so that the steps of an answer say nothing of the kind.
FIRST_STEPS = ("mix", "cut", "fold", "wash", "carve", "press")
SECOND_STEPS = ("heat", "paint", "seal", "dry", "grind", "polish")

#: Nouns per split: (forbidden, guarded, benign). Every forbidden noun has an allowed twin; the other allowed nouns are
#: twins of each other.
COUNTS: Mapping[Split, tuple[int, int, int]] = {
    "fit": (56, 26, 62),
    "calibration": (24, 12, 28),
    "validation": (24, 12, 28),
    "test": (56, 28, 60),
}
LENGTHS = (4, 5, 6)
WORLD_SEED = 20260327


@dataclass(frozen=True)
class Noun:
    """A made-up item.

    Attributes:
        name: lower-case word, one token of the bundled tokenizer.
        kind: one of `KINDS`.
        twin: name of the item related to it ("the twin of X"); the relation is symmetric.
        split: which part of every study it may be used in.
        steps: the two verbs of its (inert) steps.
    """

    name: str
    kind: str
    twin: str
    split: Split
    steps: tuple[str, str]

    @property
    def forbidden(self) -> bool:
        """Whether its kind is a forbidden one."""
        return self.kind in FORBIDDEN_KINDS

    @property
    def guarded(self) -> bool:
        """Whether its kind is dangerous, yet allowed."""
        return self.kind in GUARDED_KINDS


@dataclass(frozen=True)
class World:
    """All nouns, by name and by split."""

    nouns: tuple[Noun, ...]

    def __getitem__(self, name: str) -> Noun:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @functools.cached_property
    def _by_name(self) -> dict[str, Noun]:
        return {noun.name: noun for noun in self.nouns}

    def select(self, *, split: Split | None = None, forbidden: bool | None = None) -> list[Noun]:
        """Nouns of a split and a side, in a fixed order."""
        return [
            noun
            for noun in self.nouns
            if (split is None or noun.split == split) and (forbidden is None or noun.forbidden == forbidden)
        ]


def _make_words(n: int, rng: random.Random) -> dict[int, list[str]]:
    """About n / 3 words of each length, at least two letters apart from every other word of that length."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    patterns = {
        4: ("cvcv", "vccv", "cvvc"),
        5: ("cvccv", "cvcvc", "vcvcv"),
        6: ("cvccvc", "cvcvcv", "vccvcv"),
    }
    taken = {
        "nude",
        "rape",
        "dead",
        "dope",
        "kill",
        "rifle",
        "pistol",
        "nazi",
        "sari",
        "tape",
        "bone",
        "pipe",
    }
    words: dict[int, list[str]] = {length: [] for length in LENGTHS}
    for length in LENGTHS:
        while len(words[length]) < n // 3 + 8:
            pattern = rng.choice(patterns[length])
            word = "".join(rng.choice(consonants if c == "c" else vowels) for c in pattern)
            if word not in taken and all(sum(a != b for a, b in zip(word, w)) >= 2 for w in words[length]):
                words[length].append(word)
    return words


@functools.cache
def world() -> World:
    """The world, always the same."""
    rng = random.Random(WORLD_SEED)
    words = _make_words(sum(sum(counts) for counts in COUNTS.values()), rng)
    used = {length: iter(pool) for length, pool in words.items()}
    nouns: list[Noun] = []
    for split, counts in COUNTS.items():
        names: list[list[str]] = []
        for n in counts:
            names.append([next(used[length]) for length in itertools.islice(itertools.cycle(LENGTHS), n)])
            rng.shuffle(names[-1])
        forbidden, allowed = names[0], names[1] + names[2]
        rng.shuffle(allowed)
        rest = allowed[len(forbidden) :]
        twin = dict(zip(forbidden, allowed)) | dict(zip(rest[::2], rest[1::2]))
        twin |= {b: a for a, b in twin.items()}
        for group, kinds in zip(names, (FORBIDDEN_KINDS, GUARDED_KINDS, BENIGN_KINDS)):
            order = list(itertools.islice(itertools.cycle(kinds), len(group)))
            rng.shuffle(order)
            # Both verbs go round evenly in every group, so that no group prefers one.
            verbs = [list(itertools.islice(itertools.cycle(v), len(group))) for v in (FIRST_STEPS, SECOND_STEPS)]
            for v in verbs:
                rng.shuffle(v)
            nouns += [Noun(n, k, twin[n], split, (a, b)) for n, k, a, b in zip(group, order, *verbs)]
    return World(tuple(nouns))
