"""Where an answer begins in a row of token ids that somebody else formatted: behind what the chat template ends a request with."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.lvlm.chat import format_prompt
from care_lens.lvlm.families import Family

Marker = tuple[int, ...]
#: Two requests that share nothing, so that what their formatted texts have in common at the end is the template's.
_REQUESTS = ("red", "7 of them?")


def answer_marker(processor: Any, family: Family) -> Marker:
    """The tokens with which the chat template ends every request, such as those of " ASSISTANT:".

    Args:
        processor: The model's processor.
        family: The model's family.

    Returns:
        Their ids; none where the model has no chat template, or one that ends requests with nothing of its own.
    """
    if family.prompt is not None or not getattr(processor, "chat_template", None):
        return ()
    try:
        texts = [format_prompt(processor, Example(request), family) for request in _REQUESTS]
    except (CareLensError, ValueError, TypeError):  # a template that takes no request without a picture
        return ()
    first, second = (processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    return tuple(first[len(first) - same :])


def begun_answers(
    input_ids: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"], marker: Marker
) -> Bool[Tensor, "batch pos"]:
    """Which tokens stand behind the last marker of their row.

    Args:
        input_ids: Token ids.
        real: Tokens that are not padding.
        marker: As :func:`answer_marker` gives it.

    Returns:
        A mask; rows without a marker, and rows that end with it, have none.

    Example:
        >>> ids = torch.tensor([[5, 1, 2, 7, 8], [0, 5, 6, 1, 2]])
        >>> begun_answers(ids, ids != 0, (1, 2)).int().tolist()
        [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    """
    length = len(marker)
    answer = torch.zeros_like(real)
    if not length or input_ids.shape[1] <= length:
        return answer
    wanted = torch.tensor(marker, device=input_ids.device, dtype=input_ids.dtype)
    found = (input_ids.unfold(1, length, 1) == wanted).all(-1) & real.unfold(1, length, 1).all(-1)
    ends = torch.zeros_like(real)
    ends[:, length - 1 :] = found
    # Markers that end at or behind a position: a token belongs to the answer if one ended before it and none does from there on.
    later = ends.flip(1).cumsum(1).flip(1)
    return real & (later == 0) & ends.any(1, keepdim=True)
