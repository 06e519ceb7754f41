"""Where an answer begins in a row of token ids that somebody else formatted: behind what the chat template ends a request with.

It is a guess where the row was not made by the template: a user may have typed what the template writes. What comes behind another
request of the user or behind a picture is no answer. Rows that end as the template ends them, or with an answer behind that, are told rightly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from care_lens.core.conversation import Turn
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.lvlm.chat import format_prompt
from care_lens.lvlm.families import Family

#: Two requests that share nothing, so that what their formatted texts have in common at the end is the template's.
_REQUESTS = ("red", "7 of them?")


@dataclass(frozen=True)
class Marker:
    """What a chat template writes around requests.

    Attributes:
        end: The tokens with which it ends every request, such as those of " ASSISTANT:"; none: not known.
        turn: The tokens between an earlier answer and the next request; none: not known.
    """

    end: tuple[int, ...] = ()
    turn: tuple[int, ...] = ()


def answer_marker(processor: Any, family: Family) -> Marker:
    """What the chat template of a model writes around requests.

    Args:
        processor: The model's processor.
        family: The model's family.

    Returns:
        The tokens; none where the model has no chat template, or one that ends requests with nothing that can be seen.
    """
    if family.prompt is not None or not getattr(processor, "chat_template", None):
        return Marker()
    tokenizer = processor.tokenizer
    try:
        texts = [format_prompt(processor, Example(request), family) for request in _REQUESTS]
    except (CareLensError, ValueError, TypeError):  # a template that takes no request without a picture
        return Marker()
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    end = tuple(first[len(first) - same :])
    if not tokenizer.decode(list(end)).strip():
        return Marker()
    return Marker(end, _between(processor, family))


def _between(processor: Any, family: Family) -> tuple[int, ...]:
    """The tokens between an answer and the next request."""
    answer, request = _REQUESTS[1], "green"
    example = Example(request, turns=(Turn("user", _REQUESTS[0]), Turn("assistant", answer)))
    try:
        text = format_prompt(processor, example, family)
    except (CareLensError, ValueError, TypeError):  # a template of one turn
        return ()
    text = text[text.rindex(answer) + len(answer) : text.rindex(request)].strip()
    return tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def begun_answers(
    input_ids: Int[Tensor, "batch pos"],
    real: Bool[Tensor, "batch pos"],
    marker: Marker,
    *,
    never: Sequence[int] = (),
) -> Bool[Tensor, "batch pos"]:
    """Which tokens stand behind the last end of a request in their row, if it is an answer.

    Args:
        input_ids: Token ids.
        real: Tokens that are not padding.
        marker: As :func:`answer_marker` gives it.
        never: Tokens that no answer has, such as that of a picture.

    Returns:
        A mask; rows without an end of a request, rows that end with it, and rows in which another request or a picture comes behind
        it, have none.

    Example:
        >>> ids = torch.tensor([[5, 1, 2, 7, 8], [0, 5, 6, 1, 2]])
        >>> begun_answers(ids, ids != 0, Marker(end=(1, 2))).int().tolist()
        [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    """
    ends = _ends(input_ids, real, marker.end)
    # A token belongs to the answer if a request ended before it and none ends from there on.
    later = ends.flip(1).cumsum(1).flip(1)
    answer = real & (later == 0) & ends.any(1, keepdim=True)
    other = _ends(input_ids, real, marker.turn)
    for token in never:
        other = other | (input_ids == token)
    return answer & ~(answer & other).any(1, keepdim=True)


def _ends(input_ids: Tensor, real: Tensor, tokens: Sequence[int]) -> Tensor:
    """[batch, pos] the last token of every place where these tokens stand."""
    ends, length = torch.zeros_like(real), len(tokens)
    if length and input_ids.shape[1] >= length:
        wanted = torch.tensor(tokens, device=input_ids.device, dtype=input_ids.dtype)
        ends[:, length - 1 :] = (input_ids.unfold(1, length, 1) == wanted).all(-1) & real.unfold(1, length, 1).all(-1)
    return ends
