"""Examples refuse what they cannot hold, and conversations keep texts and pictures in their places."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
from PIL import Image

from care_lens import core
from care_lens.core import PICTURE, Example, ExampleError, Turn, examples_digest
from care_lens.core.identity import example_fingerprint


def unchecked(name):
    """A module of care_lens.core as users have it, without the type checks of the test suite, which would speak first."""
    spec = importlib.util.spec_from_file_location(f"unchecked_{name}", Path(core.__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


plain = unchecked("examples")
RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt must be a str, got NoneType"),
        ({"prompt": b"bytes"}, "decode it first"),
        ({"prompt": [{"role": "user", "content": "x"}]}, r"Example\.from_messages"),
        ({"prompt": 7}, "prompt must be a str, got int"),
        ({"response": 1.5}, "response must be a str or None, got float"),
        ({"system": ["be", "brief"]}, "system must be a str or None"),
        ({"prefill": 3}, "prefill must be a str or None"),
        ({"harmful": "false"}, "harmful must be True or False"),
        ({"harmful": 1}, "harmful must be True or False"),
        ({"id": 7}, "id must be a str"),
        ({"channel": None}, "channel must be a str, got NoneType; for no text give"),
        ({"meta": [("a", "b")]}, "meta must be a mapping"),
        ({"image": "cat.png"}, r"image must be a PIL image, got str; make one with care_lens\.data\.open_picture"),
        ({"image": Path("cat.png")}, "image must be a PIL image, got PosixPath"),
        ({"more_images": (RED,)}, "must have a first image"),
        ({"turns": ("hello",)}, r"turns must be care_lens\.Turn, got str"),
        ({"prompt": f"{PICTURE} and {PICTURE}", "image": RED}, "each of its 1 pictures, or none, got 2"),
    ],
)
def test_what_an_example_cannot_hold_is_refused(fields, message):
    with pytest.raises(ExampleError, match=message) as caught:
        plain.Example(**{"prompt": "x", **fields})
    assert isinstance(caught.value, (ValueError, TypeError))


def test_turns_refuse_what_they_cannot_hold():
    turns = unchecked("conversation")
    for arguments, message in [
        (("system", "x"), "role must be one of"),
        (("user", None), "text of a turn must be a str"),
        (("user", "x", ("cat.png",)), "images of a turn must be a PIL image"),
    ]:
        with pytest.raises(turns.ExampleError, match=message):
            turns.Turn(*arguments)


def test_messages_become_fields_with_pictures_in_their_places():
    example = Example.from_messages(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "this "}, {"type": "image", "image": RED}]},
            {"role": "assistant", "content": "a square"},
            {"role": "user", "content": [{"type": "image", "image": BLUE}, {"type": "text", "text": " and this"}]},
            {"role": "assistant", "content": "it is"},
        ],
        harmful=True,
        id="a",
    )
    assert (example.system, example.prefill, example.harmful, example.id) == ("be brief", "it is", True, "a")
    assert example.prompt == f"{PICTURE} and this" and example.image is BLUE
    assert example.turns == (Turn("user", f"this {PICTURE}", (RED,)), Turn("assistant", "a square"))
    assert example.images == (RED, BLUE) and example.own_images == (BLUE,)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list"),
        ([], "must be a list"),
        ([{"role": "user"}], "message 0 must have a role and a content"),
        ([{"role": "tool", "content": "x"}], "role of message 0"),
        ([{"role": "system", "content": "x"}], "must end with a user's"),
        ([{"role": "assistant", "content": "x"}], "must end with a user's"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "system message must come first"),
        ([{"role": "user", "content": 7}], "content of message 0 must be a str or a list"),
        ([{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}], "parts of message 0"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "parts of message 0"),
    ],
)
def test_messages_that_are_none_are_named(messages, message):
    module = unchecked("conversation")
    with pytest.raises(module.ExampleError, match=message):
        module.parse_messages(messages)


def test_digests_see_every_part_of_a_conversation():
    base = Example("x", system="s", turns=(Turn("user", "a", (RED,)), Turn("assistant", "b")), prefill="p")
    others = [
        dataclasses.replace(base, system="t"),
        dataclasses.replace(base, prefill="q"),
        dataclasses.replace(base, prefill=None),
        dataclasses.replace(base, turns=base.turns[:1]),
        dataclasses.replace(base, turns=(Turn("user", "a", (BLUE,)), Turn("assistant", "b"))),
        dataclasses.replace(base, turns=(Turn("assistant", "a", (RED,)), Turn("assistant", "b"))),
    ]
    assert len({example_fingerprint(e) for e in [base, *others]}) == len(others) + 1
    assert len({examples_digest([e]) for e in [base, *others]}) == len(others) + 1
