"""Arguments are taken and refused as beartype says, whichever way is the quick one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from beartype.door import is_bearable
from jaxtyping import Float
from torch import Tensor

from care_lens.core import Example
from care_lens.core.arguments import _CONF, ArgumentError, checked

HINTS = (
    int, float, bool, str, bytes, Path, Tensor, int | None, str | Path, float | None, list[int] | None, Sequence[str], Mapping[str, int],
    Literal["a", "b"], Literal["a"] | None, Float[Tensor, "n d"], Float[Tensor, " n"] | None, Callable[..., Any], tuple[str, ...], Any,
)  # fmt: skip
VALUES = (
    1, 1.5, True, None, "a", "c", b"a", Path("a"), [1], ["a"], ("a",), {"a": 1}, {"a": "b"}, np.int64(2), np.float32(2), np.bool_(True),
    torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), len,
)  # fmt: skip


@pytest.mark.parametrize("hint", HINTS, ids=str)
def test_what_is_refused_is_what_the_annotation_refuses(hint, monkeypatch):
    monkeypatch.delenv("CARE_LENS_UNCHECKED", raising=False)

    def call(value):
        return "called"

    call.__module__, call.__annotations__ = "room", {"value": hint}
    room = {"__name__": "room", "call": call}
    checked(room, ["call"])
    taken = 0
    for value in VALUES:
        if is_bearable(value, hint, conf=_CONF):
            assert room["call"](value) == "called"
            taken += 1
        else:
            with pytest.raises(ArgumentError, match="value of call must be"):
                room["call"](value)
    assert taken


def test_the_refusal_says_what_to_write(monkeypatch):
    monkeypatch.delenv("CARE_LENS_UNCHECKED", raising=False)

    def prepare(examples: Sequence[Example] | Example, *, sites: Sequence[str] = ()):
        raise TypeError("its own")

    prepare.__module__ = "room"
    room = {"__name__": "room", "prepare": prepare}
    checked(room, ["prepare"])
    with pytest.raises(ArgumentError, match=r"got str 'tell me'; write Example\(prompt, image=picture\)$"):
        room["prepare"]("tell me")
    with pytest.raises(ArgumentError, match=r"prepare has no argument names_filter; name the sites: sites=\["):
        room["prepare"](Example("a"), names_filter=["blocks.1.hook_mlp_out"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'") as caught:
        room["prepare"](Example("a"), other=1)
    assert caught.value.__context__ is None  # no traceback of the check's own above it
