"""Which letter an answer to a multiple-choice question names."""

import re
from collections.abc import Mapping

from care_lens.core.examples import Example
from care_lens.evaluation.normalise import plain_words

_OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)
_OPTIONS = re.compile(r"^Options:[ \t]*\n(?=[A-Z]\. )", re.MULTILINE)
_ALONG = r"or|and|nor|is|was|are|because|since|as|but|not|which|that|this|the|it|if|in|on|so|due|from|for|with|according|would|could|should|must|can|seems|looks|fits"
# "A" and "I" before another small letter are an article and a pronoun; a small letter is one only where nothing else could be meant.
_CAPITAL = rf"([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:{_ALONG})\b)[a-z])"
_SMALL = r"([a-z])(?![\w'])(?=[ \t]*(?:[.,;:!?)\]*\"\n]|$))"  # no word stands behind it
_LETTER = rf"(?:{_CAPITAL}|(?<=[(\[])([a-z])(?=[)\]]))"
_NAMED = rf"(?:{_CAPITAL}|{_SMALL})"
_NOUN = r"(?i:\b(?:answer|option|choice)\b)"
_MARKS = r"[\s:*\"'(\[]*"
_STATED = re.compile(
    rf"{_NOUN}\**\s*(?:(?i:(?:is|are|would be|should be|must be)\b)|[:=])[\s:*\"'(\[]*(?:(?i:option|choice|letter|answer)\s*)?{_MARKS}{_NAMED}"
)
_DENIED = re.compile(
    rf"{_NOUN}\s+(?i:(?:is|are)\s*(?:not|n't|neither))\b{_MARKS}(?:(?i:option|choice|letter)\s*)?{_MARKS}{_LETTER}"
)
_MENTIONED = re.compile(rf"{_NOUN}{_MARKS}{_NAMED}")
_REJECTED_BEFORE = re.compile(
    r"(?i:\b(?:not|than|neither|nor|exclude|excludes|reject|rejects|eliminate|eliminates)|n't)\s+(?:the\s+)?$"
)
_REJECTED_AFTER = re.compile(r"(?i:\b(?:not|incorrect|wrong|false|neither)\b|n't\b)")
_WRONG_NOUN = re.compile(r"(?i:\b(?:wrong|incorrect|false|other|worst)\s*)$")
_CLAUSE = re.compile(r"[.!?\n;,]|\b(?:because|since|but|while|whereas)\b")
_OFFERED = re.compile(
    r"[\s*\"')\].:]*?(?:,\s*)?(?:(?:or|and|/|&)\s*(?:maybe\s+|perhaps\s+|possibly\s+)?|(?<=,)\s*)(?:option\s+)?[(\[*\"']*[A-Z](?![\w'])"
)
_SOLE = re.compile(r"^[\s(\[*\"']*([A-Za-z])[\s)\]*\"'.:,;!?]*$")
_FIRST = re.compile(r"^[\s(\[*\"']*([A-Z])(?:[)\].:,;*\"']|$)")
_MARKED = re.compile(r"(?<!\w)\(([A-Za-z])\)|\*\*([A-Z])\*\*|\\boxed\{([A-Z])\}")
_ALONE = re.compile(r"(?<![\w'])(?:([B-HJ-Z])(?![\w'])|([AI])(?![\w'])(?!\s+(?!(?:or|and|nor|is)\b)[a-z]))")
# Of a letter with nothing before it: "not B", "it can't be B"; "B is wrong", "B. pig is not the answer", "B? No".
_NOT_BEFORE = re.compile(
    r"(?i:(?:\b(?:not|cannot|neither|nor|than|instead of|rule out|exclude|excludes|eliminate|eliminates|reject|rejects)|n't)\s+(?:be\s+)?)[(\[*\"']*$"
)
_NOT_AFTER = re.compile(
    r"[\s)\]*\"']*(?:\?[\s*\"']*(?i:no|nope|not)\b"
    r"|(?i:\b(?:is|are|would be|can be)\s+(?:\w+ly\s+)?(?:wrong|incorrect|false)\b)"
    r"|(?i:\b(?:is not|isn't|cannot be|can't be|is never|is hardly)\s+(?:(?:the|a)\s+)?(?:right|correct|true|best|answer|option|choice|it)\b))"
)
_RIGHT_AFTER = re.compile(
    r"[\s)\]*\"']*(?i:\b(?:is|must be|would be|should be|seems)\s+(?:\w+ly\s+)?(?:the\s+)?(?:most\s+)?(?:right|correct|true|best|answer)\b)"
)
_NOT_SAID = re.compile(r"(?i:\b(?:if|whether|unless|neither|nor|or|and|not|only)|/)\s*(?:option\s+)?[(\[*\"']*$")


def choices_of(example: Example) -> dict[str, str]:
    """The choices of a question by letter: the lines "A. ..." after the last line "Options:" that is followed by one, else of the whole prompt. Letters ascend, so that a
    line "A. ..." inside of a later choice is none."""
    begins = [found.end() for found in _OPTIONS.finditer(example.prompt)]
    choices: dict[str, str] = {}
    for letter, text in _OPTION.findall(example.prompt, begins[-1] if begins else 0):
        if not choices or letter > max(choices):
            choices[letter] = text
    return choices


def chosen_letter(text: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer names, or None where it names none or several.

    In this order: a letter that is all there is, of either case; one that is stated ("the answer is B", "choice: b", "B is correct"; the last one where there are
    several); one that it begins with ("B.", "(B) dog"); the only one that is marked ("(B)", "**B**", "\\boxed{B}"); the only option that is mentioned ("option B"); the only
    letter that stands alone; the only choice whose text is in it, leaving out choices that are part of another one in it. A letter that is rejected ("not B", "option
    B is wrong", "B? No") is none of these, and one beside another ("B or C", "A, B") is neither stated nor begun with. "A" before a small letter is an article; a small
    letter counts only by itself, in brackets, or behind "answer is" and the like with no word behind it.

    Args:
        text: An answer.
        choices: The texts of the choices by their letters.

    Example:
        >>> chosen_letter("It is a dog, not a fish", {"A": "cat", "B": "dog", "C": "hot dog"})
        'B'
    """
    text = text.strip()
    if (sole := _SOLE.match(text)) and sole[1].upper() in choices:
        return sole[1].upper()
    singles = [found for found in _ALONE.finditer(text) if _letter(found) in choices]
    dismissed = {
        _place(found)
        for found in singles
        if _NOT_BEFORE.search(text, 0, _place(found)) or _NOT_AFTER.match(text, _after(text, found, choices))
    }
    stated = [
        (_place(found), letter)
        for found in _STATED.finditer(text)
        if (letter := _letter(found)) in choices
        and _place(found) not in dismissed
        and not _WRONG_NOUN.search(text, 0, found.start())
        and not _offers_another(text, found, choices)
    ]
    stated += [
        (_place(found), _letter(found))
        for found in singles
        if _place(found) not in dismissed
        and _RIGHT_AFTER.match(text, _after(text, found, choices))
        and not _NOT_SAID.search(text, 0, _place(found))
    ]
    if stated:
        return max(stated)[1]
    first = _FIRST.match(text)
    if first and first[1] in choices and first.start(1) not in dismissed and not _offers_another(text, first, choices):
        return first[1]
    mentioned, rejected = _mentioned(text)
    rejected |= {_letter(found) for found in singles if _place(found) in dismissed}
    marked = {letter.upper() for groups in _MARKED.findall(text) for letter in groups if letter.upper() in choices}
    if len(marked - rejected) == 1:
        return (marked - rejected).pop()
    named = (mentioned - rejected) & {*choices}
    if len(named) == 1:
        return named.pop()
    alone = {_letter(found) for found in singles} - rejected
    if len(alone) == 1:
        return alone.pop()
    if marked or alone:
        return None
    said = f" {plain_words(text)} "
    within = {
        letter: words for letter, choice in choices.items() if (words := plain_words(choice)) and f" {words} " in said
    }
    whole = [
        letter
        for letter, words in within.items()
        if letter not in rejected
        and not any(f" {words} " in f" {other} " and words != other for other in within.values())
    ]
    return whole[0] if len(whole) == 1 else None


def _place(found: re.Match[str]) -> int:
    """Where the letter of a match stands."""
    return next(found.start(i) for i, group in enumerate(found.groups(), 1) if group)


def _after(text: str, found: re.Match[str], choices: Mapping[str, str]) -> int:
    """Where a text goes on behind a letter and, if it is written out there, the letter's choice: behind "D. pig"."""
    end, choice = _place(found) + 1, choices.get(_letter(found), "")
    begins = re.compile(r"[\s)\].:*\"']*").match(text, end)
    start = end if begins is None else begins.end()
    if choice and text[start : start + len(choice)].casefold() == choice.casefold():
        return start + len(choice)
    return start if text[start : start + 1].islower() else end  # "D. is not the answer"


def _offers_another(text: str, found: re.Match[str], choices: Mapping[str, str]) -> bool:
    """Whether another letter is offered beside that of a match: "B or C", "A. cat or B. dog", "A, B"."""
    return any(_OFFERED.match(text, end) for end in (_place(found) + 1, _after(text, found, choices)))


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
