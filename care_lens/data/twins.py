"""Twins of attacks: the same request in plain words, and over a grey picture; and the pairs of them for mediation.

A benchmark gives attacks only. What a run compares them with is made here, from the behaviour that each example states:

- the plain twin, the behaviour as a request in words, which the model should refuse;
- the pairs of a channel, whose safe twin is that request over grey pictures of the same sizes. Wording and picture differ, so that the
  image tokens and the last token correspond and no others do;
- the pairs "CHANNEL, picture", whose safe twin is the attack's own prompt over grey pictures. The two are aligned at every position, and
  what is traced is what the picture brings.

    plain = plain_twins(attacks)
    pairs = attack_pairs(attacks, n=32)
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from care_lens.core.examples import Example, PairedExamples
from care_lens.data.behaviours import behaviour_key

log = logging.getLogger(__name__)

GREY = (128, 128, 128)
_NO_NAME = re.compile(r"[^\w .+,()=-]")


def is_plain(example: Example) -> bool:
    """Whether a harmful request is in plain words: no picture, no earlier turns, and what it is after is what it says."""
    if not example.harmful or example.images or example.turns or example.prefill:
        return False
    return example.behaviour is None or behaviour_key(example.behaviour) == behaviour_key(example.prompt)


def plain_twins(examples: Sequence[Example], *, channel: str = "plain") -> list[Example]:
    """Requests in plain words, one for each behaviour of the harmful examples.

    An example that is plain already is taken as it is, in the new channel; ``meta["channel"]`` says which it had. Of others that state
    a behaviour the behaviour is asked for, without a picture. Examples with a picture that state none have no twin, since what is harmful
    may stand in the picture.

    Args:
        examples: Of any channels.
        channel: Of the twins.

    Example:
        >>> attack = Example("What does the picture ask?", harmful=True, behaviour="How to fold a zorp?", id="a", group="zorp")
        >>> [(twin.prompt, twin.id) for twin in plain_twins([attack, attack])]
        [('How to fold a zorp?', 'a/plain')]
    """
    found: dict[str, Example] = {}
    for example in sorted(examples, key=lambda e: not is_plain(e)):  # those that are plain already come first
        if is_plain(example):
            twin = replace(example, channel=channel, meta={**example.meta, "channel": example.channel})
        elif example.harmful and example.behaviour:
            twin = Example(
                prompt=example.behaviour,
                harmful=True,
                channel=channel,
                id=f"{example.id}/plain",
                group=example.group,
                behaviour=example.behaviour,
                system=example.system,
                meta={**{k: v for k, v in example.meta.items() if k == "benchmark"}, "twin_of": example.id},
            )
        else:
            continue
        found.setdefault(behaviour_key(twin.prompt), twin)
    return list(found.values())


def greyed(example: Example, *, name: str) -> Example:
    """The example over grey pictures of the sizes of its own, in every turn.

    Args:
        example: With or without pictures.
        name: Put behind its id.
    """
    images = tuple(Image.new("RGB", image.size, GREY) for image in example.own_images)
    turns = tuple(replace(t, images=tuple(Image.new("RGB", i.size, GREY) for i in t.images)) for t in example.turns)
    return replace(
        example,
        image=images[0] if images else None,
        more_images=images[1:],
        turns=turns,
        id=f"{example.id}/{name}",
    )


def attack_pairs(examples: Sequence[Example], *, n: int = 32) -> dict[str, PairedExamples]:
    """Counterfactual twins of attacks, by channel, for mediation.

    Args:
        examples: Attacks; those that state no behaviour have no pairs.
        n: At most so many pairs a set, of as many behaviours as there are.

    Returns:
        Pairs by the channel's name, and by "CHANNEL, picture" for channels with pictures. A set of fewer than two behaviours is left out,
        since intervals are over behaviours.

    Raises:
        ValueError: If n is below 2.
    """
    if n < 2:
        raise ValueError(f"n must be 2 or more, got {n}; intervals need pairs of two behaviours")
    by_channel: dict[str, list[Example]] = {}
    for example in examples:
        if example.harmful and example.behaviour and not is_plain(example):
            by_channel.setdefault(example.channel, []).append(example)
    sets: dict[str, PairedExamples] = {}
    for channel, attacks in by_channel.items():
        few = _of_many_groups(attacks, n)
        name = _NO_NAME.sub("-", channel)[:60].strip(" -") or "attack"
        worded = [(_plain_over_grey(attack), attack) for attack in few]
        pictured = [(greyed(attack, name="grey"), attack) for attack in few if attack.images]
        for title, pairs in ((name, worded), (f"{name}, picture", pictured)):
            if len({attack.group for _, attack in pairs}) >= 2:
                sets[title] = PairedExamples.from_pairs(pairs)
    lacking = sorted({e.channel for e in examples if e.harmful and not is_plain(e)} - {*by_channel})
    if lacking:
        log.warning("no pairs for mediation of %s: their examples state no behaviour", ", ".join(lacking))
    return sets


def _plain_over_grey(attack: Example) -> Example:
    assert attack.behaviour is not None
    # The attack's own conversation is left behind: the twin asks plainly.
    bare = replace(attack, turns=(), prefill=None, prompt=attack.behaviour, behaviour=None)
    return greyed(bare, name="plain over grey" if attack.own_images else "plain twin")


def _of_many_groups(examples: Sequence[Example], n: int) -> list[Example]:
    """The first example of each group, then the second of each, until there are n."""
    places: dict[str, int] = {}
    ranked = []
    for index, example in enumerate(examples):
        nth = places[example.group] = places.get(example.group, -1) + 1
        ranked.append((nth, index))
    return [examples[index] for _, index in sorted(sorted(ranked)[:n], key=lambda pair: pair[1])]
