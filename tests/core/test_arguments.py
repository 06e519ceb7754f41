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
