"""Texts in the form in which answers are compared."""

import re

_ARTICLES = ("a", "an", "the")
_NUMBERS: dict[str, str] = dict(
    zip(
        ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        ("0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"),
        strict=True,
    )
)
_CONTRACTED = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "mightn't",
    "mightn't've",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]


def _without_apostrophes() -> dict[str, str]:
    """Contractions by how they are written without all, or one, of their apostrophes."""
    found = {}
    for word in _CONTRACTED:
        places = [i for i, letter in enumerate(word) if letter == "'"]
        found |= {word[:i] + word[i + 1 :]: word for i in places if len(places) > 1}
        found[word.replace("'", "")] = word
    return found


_CONTRACTIONS = _without_apostrophes()
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_THOUSANDS = re.compile(r"\d,\d")
_POINT = re.compile(r"\.(?!\d)")


def vqa_unpunctuated(text: str) -> str:
    """A text without punctuation, as the evaluation of VQA takes it out: a mark beside a space goes, one between letters becomes a space."""
    out = text
    for mark in _PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text or _THOUSANDS.search(text) is not None
        out = out.replace(mark, "" if beside else " ")
    return _POINT.sub("", out)


def vqa_normalised(text: str) -> str:
    """A text as the evaluation of VQA compares it: small letters, no punctuation, no articles, numbers up to ten as digits, contractions with apostrophes."""
    words = vqa_unpunctuated(" ".join(text.split())).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


_SIGNED = r"(?<!\w)-?(?:\d+(?:\.\d+)?|\.\d+)"
_LETTER_AND_SIGNS = r"(?<!\w)[^\W\d_](?:\+\+?|#)(?!\w)"  # C++, C#, A+
_WORD = r"\d+(?:\.\d+)?|[^\W\d_]+(?:['\u2019][^\W\d_]+)*|[^\W_]+"
_WORDS = re.compile(rf"{_SIGNED}|{_LETTER_AND_SIGNS}|{_WORD}")


def plain_words(text: str) -> str:
    """The words of a text in small letters with single spaces, without punctuation and articles; commas inside numbers go, a sign and a point of a number stay.

    Example:
        >>> plain_words("The -5 degrees, in C++."), plain_words("a range of 2-5"), plain_words("1,000.5")
        ('-5 degrees in c++', 'range of 2 5', '1000.5')
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("\u2212", "-"))
    words = [re.sub(r"^(-?)\.", r"\g<1>0.", word.replace("\u2019", "'")) for word in _WORDS.findall(text)]
    return " ".join(word for word in words if word not in _ARTICLES)
