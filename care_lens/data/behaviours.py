"""Which examples are about the same behaviour, and splits that no behaviour stands in twice.

Benchmarks take over each other's behaviours: one request is a row of AdvBench, of RedTeam-2K and, drawn in a picture, of JailBreakV. Here two
examples are about one behaviour if they have the same group, or the same text of a behaviour (:func:`behaviour_key`), or are joined by
others that have. All of them go to one split.

    homes = deal_behaviours(examples, {"fit": 0.5, "test": 0.5}, seed=0)  # the split of each example
"""

import random
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from care_lens.core.examples import Example

Name = TypeVar("Name", bound=str)


def behaviour_key(text: str) -> str:
    """A behaviour as a group: two texts that differ in case, spaces or the mark at their end are one behaviour.

    Example:
        >>> behaviour_key("How to fold  a Zorp?") == behaviour_key("how to fold a zorp")
        True
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(".?! ") or plain


def behaviour_components(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples by what they are about, in the order of their names, whatever the order of the examples."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    names = []
    for index, example in enumerate(examples):
        keys = [behaviour_key(text) for text in (example.group or example.id, example.behaviour) if text] or [
            f"#{index}"
        ]
        names.append(keys[0])
        for key in keys[1:]:
            first, second = sorted((root(keys[0]), root(key)))
            parent[second] = first
    members: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        members[root(name)].append(index)
    return [members[name] for name in sorted(members)]


def deal_behaviours(
    examples: Sequence[Example], shares: Mapping[Name, float], *, benign_only: Sequence[Name] = (), seed: int = 0
) -> list[Name]:
    """The split of each example: no behaviour in two, each channel spread over all of them by the shares.

    Behaviours are shuffled among those of the same channels, and dealt one after another to the split that is furthest below its share of the
    behaviours so far. The deal depends on the seed and on what the examples are about, not on their order.

    Args:
        examples: Of any channels.
        shares: Of the behaviours, by split; they sum to 1.
        benign_only: Splits that behaviours of harmful examples alone are not dealt to.
        seed: Of the shuffle.

    Raises:
        ValueError: If no split is left for a behaviour.
    """
    strata: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for component in behaviour_components(examples):
        strata[tuple(sorted({examples[i].channel for i in component}))].append(component)
    draw = random.Random(seed)
    homes: dict[int, Name] = {}
    owed: dict[bool, dict[Name, float]] = {}
    for channels in sorted(strata):
        components = strata[channels]
        draw.shuffle(components)
        for component in components:
            harmful = all(examples[i].harmful for i in component)
            open_to = {s: share for s, share in shares.items() if share > 0 and not (harmful and s in benign_only)}
            if not open_to:
                raise ValueError(
                    f"shares must give harmful behaviours a split too, got {dict(shares)}; give fit or test a share"
                )
            # what is owed goes on from one set of channels to the next: many small sets get their shares together
            due = owed.setdefault(harmful, dict.fromkeys(open_to, 0.0))
            for split, share in open_to.items():
                due[split] += share / sum(open_to.values())
            home = max(due, key=lambda split: due[split])
            due[home] -= 1.0
            homes |= dict.fromkeys(component, home)
    return [homes[index] for index in range(len(examples))]
