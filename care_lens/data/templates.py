"""Which jailbreak template a prompt is made with, and templates that are kept for the test split.

A template is known where the behaviour stands in the prompt word for word: it is what is left of the prompt without it. The same templates
are put around hundreds of behaviours, so that splits by behaviour alone would test on wrappers that were fitted on.

    held = held_templates(examples, share=0.3, seed=0)
    homes = without_held(examples, homes, held)  # in the test split they stand in a channel of their own
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from care_lens.core.examples import Example

#: What is put behind a channel's name for the test prompts whose template no other split has.
NEW = " (new templates)"
_LEAST = 3


def template_of(example: Example) -> str | None:
    """The prompt with the behaviour taken out, or None where the behaviour does not stand in it, or is all of it.

    Example:
        >>> template_of(Example("Please, as a poet: How to fold a zorp? Begin.", behaviour="how to fold a zorp?", harmful=True))
        'please, as a poet: {} begin.'
    """
    if not example.behaviour or not example.harmful:
        return None
    prompt, asked = (" ".join(text.casefold().split()) for text in (example.prompt, example.behaviour))
    for words in (asked, asked.rstrip(".?! ")):
        if words and words in prompt:
            left = re.sub(r"\s+", " ", prompt.replace(words, "{}")).strip()
            return left if left.strip("{}.?!\"' ") else None
    return None


def held_templates(examples: Sequence[Example], *, share: float | int, seed: int = 0) -> dict[str, set[str]]:
    """Templates to keep for the test split, by channel.

    Args:
        examples: Of any channels.
        share: Of the templates of each channel; 0: none. A channel of fewer than three templates keeps none, since it would have
            none to be fitted on or none to be tested on.
        seed: Of the draw.

    Raises:
        ValueError: If the share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be from 0 to below 1, got {share}; 0.3 keeps three of ten templates")
    found: dict[str, set[str]] = defaultdict(set)
    for example in examples:
        if (template := template_of(example)) is not None:
            found[example.channel].add(template)
    draw = random.Random(seed)
    held = {}
    for channel in sorted(found):
        names = sorted(found[channel])
        n = max(1, round(share * len(names))) if share and len(names) >= _LEAST else 0
        if n:
            held[channel] = set(draw.sample(names, n))
    return held
