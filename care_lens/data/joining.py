"""Examples of several benchmarks put into the splits of one study: what :meth:`care_lens.data.Study.from_examples` does.

suites, held = dealt(with_twins(rows, "plain"), shares, held_templates=0.3, seed=0)
channels = held_channels(rows, ["jailbreakv"])
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.data.behaviours import deal_behaviours
from care_lens.data.templates import NEW, held_templates, template_of
from care_lens.data.twins import is_plain, plain_twins

log = logging.getLogger(__name__)


class HeldOutError(CareLensError, ValueError):
    """What is to be held out of a fit is no channel or benchmark of the examples."""


def with_twins(examples: Sequence[Example], plain: str) -> list[Example]:
    """The examples with a plain request for each behaviour; those that are plain already go to that channel.

    Args:
        examples: Of any channels.
        plain: The channel of plain requests.
    """
    twins = plain_twins(examples, channel=plain)
    return [example for example in examples if not is_plain(example)] + twins


def dealt(
    examples: Sequence[Example], shares: Mapping[Any, float], *, templates: float | int = 0.0, seed: int = 0
) -> dict[Any, dict[str, list[Example]]]:
    """Examples by split and channel: no behaviour stands in two splits, and no template that is kept for the test in another.

    Args:
        examples: With ids that differ in each channel.
        shares: Of the behaviours, by split.
        templates: Share of each channel's templates that is kept for the test split. Its test prompts go to a channel of their own;
            prompts of other splits that are made with such a template are left out, with a warning that counts them.
        seed: Of the deal and of the draw of templates.
    """
    homes = deal_behaviours(examples, shares, benign_only=("calibration",), seed=seed)
    held = held_templates(examples, share=templates, seed=seed)
    left: Counter[str] = Counter()
    suites: dict[Any, dict[str, list[Example]]] = {split: {} for split in shares}
    for example, home in sorted(zip(examples, homes, strict=True), key=lambda pair: (pair[0].channel, pair[0].id)):
        if example.channel in held and template_of(example) in held[example.channel]:
            if home != "test":
                left[example.channel] += 1
                continue
            example = replace(example, channel=f"{example.channel}{NEW}")
        suites[home].setdefault(example.channel, []).append(example)
    for channel, n in sorted(left.items()):
        log.warning(
            "%s: templates kept for the test split: %d; prompts of other splits made with them, left out: %d",
            channel, len(held[channel]), n,
        )  # fmt: skip
    return suites


def held_channels(examples: Sequence[Example], held_out: Sequence[str]) -> set[str]:
    """The harmful channels that are named, by themselves or by their benchmark.

    Args:
        examples: Of any channels.
        held_out: Names of channels, or of benchmarks (``meta["benchmark"]``).

    Raises:
        HeldOutError: If a name is of neither.
    """
    by_name: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        if example.harmful:
            for name in (example.channel, example.meta.get("benchmark")):
                if name:
                    by_name[name].add(example.channel)
    if isinstance(held_out, str) or (unknown := [name for name in held_out if name not in by_name]):
        wrong = held_out if isinstance(held_out, str) else unknown
        raise HeldOutError(
            f"held_out must be a list of attack channels or benchmarks, some of {sorted(by_name)}, got {wrong!r}"
        )
    return {channel for name in held_out for channel in by_name[name]}


def limited(examples: Sequence[Example], n: int | None) -> list[Example]:
    """At most n examples a channel, of as many behaviours as there are and in a stable order; None: all.

    A question that is asked in turns (examples of one channel and group with a ``meta["turn"]``, as MMBench's have) is kept whole or left out, since circular
    evaluation needs all of its turns. A channel keeps one such question even if it has more turns than n.

    Args:
        examples: Of any channels.
        n: 1 or more.

    Raises:
        ValueError: If n is below 1.
    """
    if n is None:
        return list(examples)
    if n < 1:
        raise ValueError(f"n must be 1 or more, or None for all, got {n}")
    turned: dict[tuple[str, str], list[int]] = {}
    seen: Counter[tuple[str, str]] = Counter()
    ranked: list[tuple[int, int, list[int]]] = []
    for index, example in enumerate(examples):
        key = (example.channel, example.group or example.id)
        if "turn" in example.meta and key in turned:
            turned[key].append(index)
            continue
        members = [index]
        if "turn" in example.meta:
            turned[key] = members
        ranked.append((seen[key], index, members))
        seen[key] += 1
    kept: list[int] = []
    taken: Counter[str] = Counter()
    for _, index, members in sorted(ranked):
        channel = examples[index].channel
        if not taken[channel] or taken[channel] + len(members) <= n:
            taken[channel] += len(members)
            kept += members
    return [examples[index] for index in sorted(kept)]
