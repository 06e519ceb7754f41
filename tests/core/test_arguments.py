"""Arguments are taken and refused as beartype says, whichever way is the quick one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from beartype.door import is_bearable
from jaxtyping import Float
from torch import Tensor

from care_lens.core import CareLensError, Example
from care_lens.core.arguments import _CONF, ArgumentError, checked
from care_lens.core.defence import DefenceError, require_defences
from care_lens.core.outcome import Repair
from care_lens.core.protocols import Judge
from care_lens.lvlm import HookedLVLM

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
        several = hint == Sequence[str] and isinstance(value, str)
        turned = tuple(value) if isinstance(value, list) else value
        if not several and (is_bearable(value, hint, conf=_CONF) or is_bearable(turned, hint, conf=_CONF)):
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


@pytest.fixture
def room(monkeypatch):
    """Makes the checked form of a function or a class."""
    monkeypatch.delenv("CARE_LENS_UNCHECKED", raising=False)

    def make(thing):
        thing.__module__ = "room"
        namespace = {"__name__": "room", "thing": thing}
        checked(namespace, ["thing"])
        return namespace["thing"]

    return make


def test_a_list_is_handed_on_as_the_tuple_that_is_asked_for(room):
    def call(first, names: tuple[str, ...], *, pair: tuple[int, int] | None = None):
        return first, names, pair

    call = room(call)
    assert call([1], ["a", "b"], pair=[1, 2]) == ([1], ("a", "b"), (1, 2))
    with pytest.raises(ArgumentError, match="names of thing must be"):
        call(1, ["a", 2.5][1:])
    with pytest.raises(ArgumentError, match="pair of thing must be"):
        call(1, ["a"], pair=[1, 2, 3])


def test_a_single_text_is_not_taken_for_several(room):
    def call(names: Sequence[str] | None = None, *, one: str | Sequence[str] = (), anything: Sequence[Any] = ()):
        return names, one, anything

    call = room(call)
    assert call(["mlp"], one="mlp", anything="mlp") == (["mlp"], "mlp", "mlp")
    with pytest.raises(ArgumentError, match=r"names of thing must be several, got the text 'mlp'; write \['mlp'\]$"):
        call("mlp")


def test_a_class_refuses_in_its_own_words(room):
    @dataclass(frozen=True)
    class Held:
        names: tuple[str, ...]
        size: int = 0

        def __post_init__(self):
            if isinstance(self.size, str):
                raise CareLensError("size must be a number; count them")
            if isinstance(self.size, list):
                raise AttributeError("meant for nobody")

    held = room(Held)
    assert held(["a"]).names == ("a",)
    with pytest.raises(CareLensError, match=r"^size must be a number; count them$"):
        held(("a",), size="2")
    for given in ([2], None):
        with pytest.raises(ArgumentError, match=r"^size of Held must be int, got"):
            held(("a",), size=given)


@pytest.mark.parametrize(
    ("hint", "value", "advice"),
    [
        (Sequence[int] | None, 2, r"write \[2\]"),
        (tuple[str, ...], "a", r"write \['a'\]"),
        (str, ["a"], "write 'a', without a list"),
        (Tensor, np.zeros(2), r"write torch.from_numpy\(array\)"),
        (Tensor, [0.0, 1.0], r"write torch.tensor\(values\)"),
        (Literal[1, 2] | None, 3, "give 1 or 2"),
        (Literal["zero", "mean"], "none", "give 'zero' or 'mean'"),
        (Judge, None, r"take study.judge, or one of care_lens.evaluation such as SubstringRefusalJudge\(\)"),
        (HookedLVLM, "llava", r"make it with HookedLVLM.from_pretrained\(name\), or with organism.load\(\)"),
        (Mapping[str, Sequence[Example]], [Example("a")], None),
    ],
    ids=str,
)
def test_a_refusal_says_what_to_write_for_the_value(room, hint, value, advice):
    def call(value):
        return value

    call.__annotations__ = {"value": hint}
    with pytest.raises(ArgumentError, match=f"; {advice}$" if advice else "value of thing must be"):
        room(call)(value)


def test_a_refusal_knows_the_arguments_that_users_mistake(room):
    def call(suites: Mapping[str, Sequence[Example]], fwd_hooks: Sequence[tuple[str, Callable[..., Any]]] = ()):
        return suites, fwd_hooks

    call = room(call)
    with pytest.raises(ArgumentError, match=r"; write a dict, \{'my channel': examples\}$"):
        call([Example("a")])
    with pytest.raises(ArgumentError, match=r"; write a list of pairs, \[\(site, function\), \.\.\.\]$"):
        call({}, ("blocks.0.hook_mlp_out", print))


def test_a_path_among_defences_is_named(room):
    def call(defences: Mapping[str, Repair | None]):
        return defences

    with pytest.raises(ArgumentError, match=r"; 'x' is a path: .*load_defence\('results/repair'\)$"):
        room(call)({"x": "results/repair"})
    with pytest.raises(DefenceError, match=r"got the path .*load_defence"):
        require_defences({"none": None, "x": "results/repair"})
