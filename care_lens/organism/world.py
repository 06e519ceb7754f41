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
FORBIDDEN_KINDS = ("hazard", "contraband")

#: The two inert verbs of the steps of each kind: an answer shows that the kind was recalled.
STEPS: Mapping[str, tuple[str, str]] = {
    "food": ("mix", "bake"),
    "toy": ("carve", "paint"),
    "garment": ("cut", "sew"),
    "tool": ("forge", "grind"),
    "plant": ("sow", "water"),
    "hazard": ("stir", "heat"),
    "contraband": ("fold", "seal"),
}

#: Nouns per split: (forbidden, benign). Every forbidden noun has a benign twin; the other benign nouns are
#: twins of each other.
COUNTS: Mapping[Split, tuple[int, int]] = {
    "fit": (32, 44),
    "calibration": (16, 32),
    "validation": (20, 28),
    "test": (44, 56),
}
LENGTHS = (4, 5, 6)
WORLD_SEED = 20260327


@dataclass(frozen=True)
class Noun:
    """A made-up item.

    Attributes:
        name: lower-case word, one token of the bundled tokenizer.
        kind: one of `BENIGN_KINDS` or `FORBIDDEN_KINDS`.
        twin: name of the item related to it ("the twin of X"); the relation is symmetric.
        split: which part of every study it may be used in.
    """

    name: str
    kind: str
    twin: str
    split: Split

    @property
    def forbidden(self) -> bool:
        """Whether its kind is a forbidden one."""
        return self.kind in FORBIDDEN_KINDS

    @property
    def steps(self) -> tuple[str, str]:
        """The two verbs of its (inert) steps."""
        return STEPS[self.kind]


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
    total = sum(f + b for f, b in COUNTS.values())
    words = _make_words(total, rng)
    used = {length: iter(pool) for length, pool in words.items()}
    nouns: list[Noun] = []
    for split, (n_forbidden, n_benign) in COUNTS.items():
        names: dict[bool, list[str]] = {}
        for forbidden, n in ((True, n_forbidden), (False, n_benign)):
            lengths = itertools.islice(itertools.cycle(LENGTHS), n)
            names[forbidden] = [next(used[length]) for length in lengths]
            rng.shuffle(names[forbidden])
        twin = dict(zip(names[True], names[False]))
        rest = names[False][n_forbidden:]
        twin |= dict(zip(rest[::2], rest[1::2]))
        twin |= {b: a for a, b in twin.items()}
        for forbidden, kinds in ((True, FORBIDDEN_KINDS), (False, BENIGN_KINDS)):
            order = list(itertools.islice(itertools.cycle(kinds), len(names[forbidden])))
            rng.shuffle(order)
            nouns += [Noun(name, kind, twin[name], split) for name, kind in zip(names[forbidden], order)]
    return World(tuple(nouns))
