"""Which letter an answer to a multiple-choice question names."""

import re
from collections.abc import Mapping

from care_lens.core.examples import Example
from care_lens.evaluation.normalise import plain_words

_OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)
_ALONG = r"or|and|nor|is|was|are|because|since|as|but|not|which|that|this|the|it|if|in|on|so|due|from|for|with|according|would|could|should|must|can|seems|looks|fits"
# "A" and "I" before another small letter are an article and a pronoun; a small letter is one only where nothing else could be meant.
_LETTER = rf"(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:{_ALONG})\b)[a-z])|(?<=[(\[])([a-z])(?=[)\]]))"
_NOUN = r"(?i:\b(?:answer|option|choice)\b)"
_MARKS = r"[\s:*\"'(\[]*"
_STATED = re.compile(
    rf"{_NOUN}\**\s*(?:(?i:(?:is|are|would be|should be|must be)\b)|[:=])[\s:*\"'(\[]*(?:(?i:option|choice|letter|answer)\s*)?{_MARKS}{_LETTER}"
)
_DENIED = re.compile(
    rf"{_NOUN}\s+(?i:(?:is|are)\s*(?:not|n't|neither))\b{_MARKS}(?:(?i:option|choice|letter)\s*)?{_MARKS}{_LETTER}"
)
_MENTIONED = re.compile(rf"{_NOUN}{_MARKS}{_LETTER}")
_REJECTED_BEFORE = re.compile(
    r"(?i:\b(?:not|than|neither|nor|exclude|excludes|reject|rejects|eliminate|eliminates)|n't)\s+(?:the\s+)?$"
)
_REJECTED_AFTER = re.compile(r"(?i:\b(?:not|incorrect|wrong|false|neither)\b|n't\b)")
_WRONG_NOUN = re.compile(r"(?i:\b(?:wrong|incorrect|false|other|worst)\s*)$")
_CLAUSE = re.compile(r"[.!?\n;,]|\b(?:because|since|but|while|whereas)\b")
_OFFERED = re.compile(r"[\s*\"')\]]*(?:or|and|/|,)\s*(?:option\s+)?[(\[*\"']*[A-Z](?![\w'])")
_FIRST = re.compile(r"^[\s(\[*\"']*([A-Z])(?:[)\].:,;*\"']|$)")
_MARKED = re.compile(r"\(([A-Z])\)|\*\*([A-Z])\*\*|\\boxed\{([A-Z])\}")
_ALONE = re.compile(r"(?<![\w'])(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:or|and|nor|is)\b)[a-z]))")


def choices_of(example: Example) -> dict[str, str]:
    """The choices of a question by letter: the lines "A. ..." after the last line "Options:", else of the whole prompt."""
    _, _, after = example.prompt.rpartition("Options:")
    return dict(_OPTION.findall(after))


def chosen_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or None.

    In this order: a letter that is stated ("the answer is B", "choice: B", the last one where there are several); one that it begins with ("B.", "(B) dog"); the only
    one that is marked ("(B)", "**B**", "\\boxed{B}"); the only option that is mentioned ("option B") and not rejected ("not option B", "option B is wrong"); the only
    letter that stands alone and is not of a rejected option; the only choice whose text is in it, leaving out choices that are part of another one in it. "A" before
    a small letter is an article; a letter beside another one ("B or C") is not stated.

    Args:
        text: An answer.
        choices: The texts of the choices by their letters.

    Example:
        >>> chosen_letter("It is a dog, not a fish", {"A": "cat", "B": "dog", "C": "hot dog"})
        'B'
    """
    text = text.strip()
    stated = [
        letter
        for found in _STATED.finditer(text)
        if (letter := _letter(found)) in choices
        and not _WRONG_NOUN.search(text, 0, found.start())
        and not _OFFERED.match(text, found.end())
    ]
    if stated:
        return stated[-1]
    first = _FIRST.match(text)
    if first and first[1] in choices:
        return first[1]
    marked = {letter for groups in _MARKED.findall(text) for letter in groups if letter in choices}
    if len(marked) == 1:
        return marked.pop()
    mentioned, rejected = _mentioned(text)
    named = (mentioned - rejected) & {*choices}
    if len(named) == 1:
        return named.pop()
    alone = {letter for groups in _ALONE.findall(text) for letter in groups if letter in choices}
    if len(alone - rejected) == 1:
        return (alone - rejected).pop()
    if marked or alone - rejected:
        return None
    said = f" {plain_words(text)} "
    within = {
        letter: words for letter, choice in choices.items() if (words := plain_words(choice)) and f" {words} " in said
    }
    whole = [
        letter
        for letter, words in within.items()
        if not any(f" {words} " in f" {other} " and words != other for other in within.values())
    ]
    return whole[0] if len(whole) == 1 else None


def _letter(found: re.Match[str]) -> str:
    return next(group for group in found.groups() if group).upper()


def _mentioned(text: str) -> tuple[set[str], set[str]]:
    """Letters that stand behind "option" and the like, and those of them that are called wrong in the same clause."""
    mentioned: set[str] = set()
    rejected: set[str] = set()
    rejected |= {_letter(found) for found in _DENIED.finditer(text)}
    rejected |= {_letter(found) for found in _STATED.finditer(text) if _WRONG_NOUN.search(text, 0, found.start())}
    for found in _MENTIONED.finditer(text):
        mentioned.add(_letter(found))
        end = _CLAUSE.search(text, found.end())
        before = _REJECTED_BEFORE.search(text, 0, found.start()) or _WRONG_NOUN.search(text, 0, found.start())
        if before or _REJECTED_AFTER.search(text, found.end(), end.start() if end else len(text)):
            rejected.add(_letter(found))
    return mentioned, rejected
