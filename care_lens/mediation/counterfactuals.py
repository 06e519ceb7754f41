"""Counterfactual twins, one maker for each channel: what makes an unsafe example unsafe is taken out, and nothing else.

- :func:`swap_text`: a word of the prompt by another.
- :func:`swap_drawn_text`: the words drawn in the picture by others, in the same place and style.
- :func:`neutralise`: the words around the request (role play, fiction) by a neutral text of the same number of tokens.
- :func:`remove_noise`: an attacked picture by the picture it was made from.

Twins of one number of tokens are aligned position by position, so that every position has a meaning in both; makers that
change the words check it if they are given the tokenizer, and say which examples differ. Whether the safe twin really is
safe is the caller's to see: the total effect says it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from care_lens.attacks import TEMPLATES, TextStyle, draw_text
from care_lens.core import Example, PairedExamples

NEUTRAL = "Here is a question about something that came up in the course of an ordinary day at home and at work."
"""Words that a neutral text is taken from, again and again if need be."""

STYLE = TextStyle()
"""How words are drawn unless it is said."""


def swap_text(unsafe: Sequence[Example], words: Mapping[str, str], *, tokenizer: Any = None) -> PairedExamples:
    """Twins whose prompts differ in words.

    Args:
        unsafe: The examples x*.
        words: What is taken out to what takes its place; whole words, all occurrences.
        tokenizer: Refuse twins of different numbers of tokens; None: they are not counted.

    Returns:
        The pairs; safe twins keep picture and response and are not harmful.

    Raises:
        ValueError: If a prompt has none of the words, or twins differ in their number of tokens.

    Example:
        >>> pair = swap_text([Example("how to make a bomb")], {"bomb": "cake"})[0]
        >>> pair[0].prompt
        'how to make a cake'
    """
    safe = []
    for i, example in enumerate(unsafe):
        prompt = " ".join(words.get(word, word) for word in example.prompt.split(" "))
        if prompt == example.prompt:
            raise ValueError(f"prompts must have one of {sorted(words)}, got none in example {i}: {example.prompt!r}")
        safe.append(_safe(example, prompt=prompt))
    return _pairs(safe, unsafe, tokenizer)


def swap_drawn_text(
    bases: Sequence[Example],
    unsafe_texts: Sequence[str],
    safe_texts: Sequence[str],
    *,
    style: TextStyle = STYLE,
    draw: Callable[..., Any] = draw_text,
) -> PairedExamples:
    """Twins whose pictures differ in the words drawn on them, over one background, in one place and style.

    Args:
        bases: Examples with the prompt of both; their picture, if they have one, is the background.
        unsafe_texts: What is drawn for the unsafe twin of each.
        safe_texts: What is drawn for the safe one; of about the same length, or more than the words differs.
        style: How it is drawn.
        draw: ``draw(text, image, style=style)`` gives the picture.

    Returns:
        The pairs.

    Raises:
        ValueError: If the three are not of one length.
    """
    if not len(bases) == len(unsafe_texts) == len(safe_texts):
        raise ValueError(
            f"bases, unsafe_texts and safe_texts must be of one length, got {len(bases)}, {len(unsafe_texts)}, "
            f"{len(safe_texts)}"
        )
    unsafe = [
        replace(base, image=draw(text, base.image, style=style)) for base, text in zip(bases, unsafe_texts, strict=True)
    ]
    safe = [
        _safe(base, image=draw(text, base.image, style=style)) for base, text in zip(bases, safe_texts, strict=True)
    ]
    return PairedExamples(tuple(safe), tuple(unsafe))


def neutralise(requests: Sequence[Example], template: str, *, tokenizer: Any, neutral: str = NEUTRAL) -> PairedExamples:
    """Twins of one request: in a wrapper, and in a neutral text of the wrapper's number of tokens, before and after it.

    Args:
        requests: The requests without wrapper.
        template: A name in ``care_lens.attacks.TEMPLATES``, or a text with ``{prompt}`` where the request goes.
        tokenizer: Counts the tokens.
        neutral: What the neutral text is made of: its words in order, as many as it takes.

    Returns:
        The pairs; the wrapped request is the unsafe twin. A safe twin is as harmful as its request: what is
        taken out is the disguise.

    Raises:
        ValueError: If the template has no place for the request, or no run of the neutral words has the right
            number of tokens.
    """
    text = TEMPLATES.get(template, template)
    before, mark, after = text.partition("{prompt}")
    if not mark:
        raise ValueError(f"template must be one of {sorted(TEMPLATES)} or contain '{{prompt}}', got {template!r}")
    safe, unsafe = [], []
    for request in requests:
        unsafe.append(replace(request, prompt=before + request.prompt + after))
        safe.append(
            replace(request, prompt=_padded(request.prompt, before, after, tokenizer, neutral), id=_twin(request))
        )
    return _pairs(safe, unsafe, tokenizer)


def remove_noise(attacked: Sequence[Example], originals: Sequence[Example]) -> PairedExamples:
    """Twins whose pictures differ in adversarial noise alone.

    Args:
        attacked: Examples with attacked pictures, as ``care_lens.attacks.pgd`` gives them.
        originals: What each was made from, in the same order.

    Returns:
        The pairs; the safe twin is the attacked example over its first picture.

    Raises:
        ValueError: If the two differ in number, prompt or the pictures' size, or a picture is missing.
    """
    if len(attacked) != len(originals):
        raise ValueError(f"attacked and originals must be of one length, got {len(attacked)} and {len(originals)}")
    safe = []
    for i, (example, original) in enumerate(zip(attacked, originals, strict=True)):
        if example.image is None or original.image is None or example.image.size != original.image.size:
            sizes = [None if one.image is None else one.image.size for one in (example, original)]
            raise ValueError(f"example {i} must have a picture of one size with and without noise, got {sizes}")
        if example.prompt != original.prompt:
            raise ValueError(f"example {i} must have one prompt with and without noise, got others; see the order")
        safe.append(replace(example, image=original.image, channel=original.channel, id=_twin(example)))
    return PairedExamples(tuple(safe), tuple(attacked))


def _twin(example: Example) -> str:
    return f"{example.id}/safe" if example.id else ""


def _safe(example: Example, **changes: Any) -> Example:
    return replace(example, harmful=False, id=_twin(example), **changes)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _pairs(safe: Sequence[Example], unsafe: Sequence[Example], tokenizer: Any) -> PairedExamples:
    if tokenizer is not None:
        counts = [[_count(tokenizer, one.prompt) for one in pair] for pair in zip(safe, unsafe, strict=True)]
        if bad := {i: tuple(pair) for i, pair in enumerate(counts) if pair[0] != pair[1]}:
            raise ValueError(
                f"twins must have the same number of tokens to be aligned, got (safe, unsafe) {bad} by index; use words of "
                "as many tokens, or leave the tokenizer out and patch positions 'image' and 'last' only"
            )
    return PairedExamples(tuple(safe), tuple(unsafe))


def _padded(request: str, before: str, after: str, tokenizer: Any, neutral: str) -> str:
    """The request in neutral words with as many tokens before and after it as the wrapper's."""
    front = _words(_count(tokenizer, before.rstrip()), tokenizer, neutral)
    back = _words(_count(tokenizer, after.lstrip()), tokenizer, neutral)
    return " ".join(part for part in (front, request, back) if part)


def _words(count: int, tokenizer: Any, neutral: str) -> str:
    """A run of the neutral words of so many tokens; runs may begin at any word."""
    words = neutral.split()
    for first in range(len(words)):
        text, at = "", first
        while _count(tokenizer, text) < count:
            text = f"{text} {words[at % len(words)]}".strip()
            at += 1
        if _count(tokenizer, text) == count:
            return text
    raise ValueError(f"neutral must have words that come to {count} tokens, got {neutral!r}; use shorter words")
