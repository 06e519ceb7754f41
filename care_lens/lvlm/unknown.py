"""Words that a tokenizer does not have: they become one and the same token, and the model answers as if nothing were missing."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from care_lens.core.conversation import PICTURE
from care_lens.core.examples import Example

_MOST = 8
_LOOKED_AT: "WeakKeyDictionary[Any, set[str]]" = WeakKeyDictionary()


class UnknownWordsWarning(UserWarning):
    """Texts hold words that the model's tokenizer does not know."""


def warn_of_unknown(
    tokenizer: Any, rows: Iterable[Sequence[int]], examples: Sequence[Example], *, responses: bool
) -> None:
    """Say which words of a batch the tokenizer does not know; each of them once for a tokenizer.

    Args:
        tokenizer: The model's.
        rows: The token ids of the batch; without an unknown token among them nothing else is looked at.
        examples: The examples that they were made of.
        responses: Whether their responses are in the batch.

    Warns:
        UnknownWordsWarning: Naming the words.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or not any(unknown in ids for ids in rows):
        return
    try:
        looked_at = _LOOKED_AT.setdefault(tokenizer, set())
    except TypeError:  # one that cannot be kept weakly, or not be a key
        looked_at = set()
    words = dict.fromkeys(
        word
        for example in examples
        for text in _texts(example, responses)
        for word in text.replace(PICTURE, " ").split()
    )
    fresh = [word for word in words if word not in looked_at]
    looked_at.update(fresh)
    new = [word for word in fresh if unknown in tokenizer(word, add_special_tokens=False)["input_ids"]]
    if not new:
        return
    more = f" and {len(new) - _MOST} more" if len(new) > _MOST else ""
    warnings.warn(
        f"the model's tokenizer does not know {', '.join(map(repr, new[:_MOST]))}{more}: the model reads {tokenizer.unk_token!r} in their place, the "
        "same for all of them; use words that it knows (the bundled model has only those of its own world)",
        UnknownWordsWarning,
        stacklevel=5,
    )


def _texts(example: Example, responses: bool) -> list[str]:
    given = [example.system, *(turn.text for turn in example.turns), example.prompt, example.prefill]
    given += [example.response] * responses
    return [text for text in given if text]
