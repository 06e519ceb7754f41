"""Digests change with whatever changes a number, and with nothing else."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from care_lens.core import Example, Turn, UnsafeMargin, content_digest, examples_digest
from care_lens.core.digests import held_digest
from care_lens.core.identity import example_fingerprint


def picture(value: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (3, 2), value if mode == "L" else (value, 0, 0, value)[: len(mode)])


BASE = Example("how", picture(1), "sure", True, "plain", "a", "red", {"noun": "red"}, (picture(2),))
CHANGED = {
    "prompt": "how ",
    "image": picture(9),
    "response": None,
    "harmful": False,
    "channel": "spelled",
    "id": "b",
    "group": "blue",
    "meta": {"noun": "blue"},
    "more_images": (picture(3),),
    "behaviour": "make a zorp",
    "system": "be brief",
    "turns": (Turn("user", "hello"), Turn("assistant", "hi")),
    "prefill": "sure",
}


@pytest.mark.parametrize("name", [part.name for part in fields(Example)])
def test_every_field_of_an_example_counts(name):
    assert examples_digest([BASE]) != examples_digest([replace(BASE, **{name: CHANGED[name]})])


def test_an_examples_digest_is_of_contents_in_order():
    again = Example("how", picture(1), "sure", True, "plain", "a", "red", {"noun": "red"}, (picture(2),))
    other = replace(BASE, id="b")
    assert examples_digest([BASE, other]) == examples_digest([again, other]) != examples_digest([other, BASE])
    swapped = replace(BASE, image=picture(2), more_images=(picture(1),))
    assert examples_digest([BASE]) != examples_digest([swapped])


def test_a_field_added_later_counts_where_it_is_set():
    @dataclass(frozen=True)
    class Later(Example):
        behaviour: str = ""
        messages: tuple[str, ...] = field(default=())

    plain, prefilled = Later("how"), Later("how", messages=("x",))
    assert examples_digest([plain]) == examples_digest([Example("how")])
    assert len({examples_digest([one]) for one in (plain, prefilled, Later("how", behaviour="y"))}) == 3
    assert example_fingerprint(plain) == example_fingerprint(Later("how", behaviour="y"))
    assert example_fingerprint(plain) != example_fingerprint(prefilled)


def test_what_only_the_alpha_channel_or_the_palette_shows_counts():
    seen, hidden = Image.new("RGBA", (2, 2), (5, 5, 5, 255)), Image.new("RGBA", (2, 2), (5, 5, 5, 0))
    assert seen.convert("RGB").tobytes() == hidden.convert("RGB").tobytes()
    assert example_fingerprint(Example("x", seen)) != example_fingerprint(Example("x", hidden))
    first = Image.new("P", (2, 2), 0)
    second = first.copy()
    first.putpalette([0, 0, 0] * 256)
    second.putpalette([9, 9, 9] * 256)
    assert examples_digest([Example("x", first)]) != examples_digest([Example("x", second)])


LIMIT = 3


def helper(text):
    return len(text) > LIMIT


def judge(examples, texts):
    """Says who complied."""
    return [helper(text) for text in texts]


def of(source: str, **given):
    """A function of source that inspect cannot find, as in a notebook."""
    space = {"__name__": "notebook", **given}
    exec(source, space)
    return space["f"]


def test_functions_count_by_what_they_do():
    def made(k):
        return lambda logits, inputs: logits[:, -1, k]

    assert content_digest(made(1)) == content_digest(made(1)) != content_digest(made(2))
    one = of("def f(x):\n    return x + 1")
    assert content_digest(one) == content_digest(of("# said\ndef f(x):\n    'doc'\n\n    return x + 1"))
    others = [
        of("def f(x):\n    return x + 2"),
        of("def f(x):\n    return x - 1"),
        of("def f(x, y=0):\n    return x + 1"),
        of("f = lambda x: [x + 1 for _ in 'ab']"),
        of("f = lambda x: [x + 1 for _ in 'ac']"),
        partial(one, 1),
        partial(one, 2),
    ]
    assert len({content_digest(part) for part in [one, *others]}) == 1 + len(others)


def test_globals_and_helpers_of_the_module_count(monkeypatch):
    before = content_digest(judge)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "LIMIT", 4)
        assert content_digest(judge) != before
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "helper", lambda text: not text)
        assert content_digest(judge) != before
    assert content_digest(judge) == before


def test_objects_count_by_class_and_what_they_hold():
    class Judge:
        def __init__(self, words):
            self.words, self._cache = words, {}

        def __call__(self, examples, texts):
            return [any(word in text for word in self.words) for text in texts]

    class Other(Judge):
        def __call__(self, examples, texts):
            return [all(word in text for word in self.words) for text in texts]

    used = Judge(["a"])
    used._cache["x"] = 1
    assert content_digest(used) == content_digest(Judge(["a"]))
    assert len({content_digest(one) for one in (used, Judge(["b"]), Other(["a"]), used.__call__)}) == 4
    loop = Judge(["a"])
    loop.me = loop
    assert content_digest(loop) != content_digest(used)


def test_a_stated_version_stands_for_the_code():
    def made(body, version):
        f = of(f"def f(examples, texts):\n    return {body}")
        f.version = version
        return f

    assert content_digest(made("1", "a")) == content_digest(made("2", "a")) != content_digest(made("2", "b"))


def test_outcomes_count_by_their_settings():
    outcomes = [UnsafeMargin((1,), (2,)), UnsafeMargin((1, 3), (2,)), UnsafeMargin((1,), (2, 3))]
    assert len({content_digest(one) for one in outcomes}) == 3
    assert content_digest(outcomes[0]) == content_digest(UnsafeMargin((1,), (2,)))


def test_values_of_like_look_are_told_apart():
    values = [
        0,
        0.0,
        False,
        None,
        "",
        "0",
        b"0",
        [0],
        (0, 0),
        {"a": 0},
        {0},
        np.zeros(1),
        np.zeros((1, 1)),
        torch.zeros(1),
        1e-300,
    ]
    values += [
        torch.zeros(1, dtype=torch.bfloat16),
        torch.tensor([float("nan")]),
        {"a": {"b": 0}},
        ["a", ["b", 0]],
        int,
        len,
        np,
    ]
    assert len({content_digest(value) for value in values}) == len(values)
    assert content_digest({"a": 1, "b": 2}) == content_digest({"b": 2, "a": 1})
    assert content_digest("a", "b") != content_digest("ab", "")


@pytest.fixture(scope="module")
def elsewhere():
    """Both digests of the same things, in two processes that order sets otherwise."""
    code = (
        "import pandas as pd, torch; from care_lens.core.digests import held_digest; from care_lens.core import *;"
        "print(content_digest({'a', 'b', 'c'}, UnsafeMargin((1,), (2,)), lambda x: x + 1));"
        "frame = pd.DataFrame({'a': [1, 2], 'b': [0.5, None]}, index=['x', 'y']); frame['a'];"
        "print(held_digest([frame, {'a', 'b'}, UnsafeMargin((1,), (2,)), torch.ones(2)]))"
    )
    return [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hashes},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        for hashes in ("1", "2")
    ]


def test_another_process_finds_the_same(elsewhere):
    (one, _), (other, _) = elsewhere
    assert one == other


def test_a_held_digest_is_of_everything_and_the_same_in_another_process(elsewhere):
    (_, one), (_, other) = elsewhere
    assert one == other and len(one) == 64


def test_a_held_digest_sees_every_number():
    class Thing:
        def __init__(self, value):
            self._hidden_cache, self._placed = value, object()

    numbers = torch.zeros(1000)
    changed = numbers.clone()
    changed[777] = 1e-30
    frames = [pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [1, 3]}), pd.DataFrame({"a": [1.0, 2.0]})]
    frames += [pd.DataFrame({"b": [1, 2]}), pd.DataFrame({"a": [1, 2]}, index=[1, 0])]
    layers = [torch.nn.Linear(100, 10) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert held_digest(layers[0]) == held_digest(layers[1])
    with torch.no_grad():
        layers[1].weight[3, 33] += 1e-3
    values = [
        numbers,
        changed,
        Thing(1),
        Thing(2),
        *frames,
        *layers,
        numbers.to_sparse(),
        numbers.to("meta"),
        1,
        1.0,
        "1",
    ]
    assert len({held_digest(value) for value in values}) == len(values) - 1  # the sparse one holds the same numbers
    assert held_digest(Thing(1)) == held_digest(Thing(1)) and held_digest([1, (2,)]) == held_digest((1, [2]))


def test_a_circle_through_a_mapping_ends():
    loops: list[dict] = [{"a": 1}, {"a": 1}, {"a": 2}]
    for loop in loops:
        loop["me"] = loop
    for digest in (content_digest, held_digest):
        assert digest(loops[0]) == digest(loops[1]) != digest(loops[2])


@pytest.mark.parametrize("editable", [False, True])
def test_a_package_installed_beside_its_list_of_files_is_a_library_and_one_under_development_is_not(
    editable, tmp_path, monkeypatch
):
    """``pip install --target`` puts packages anywhere; walking through one such as transformers took minutes."""
    name = f"laid_{'here' if editable else 'there'}"
    package, info = tmp_path / name, tmp_path / f"{name}-1.5.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("def score(text):\n    return len(text)\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (info / "RECORD").write_text(f"__editable__.{name}.pth,,\n" if editable else f"{name}/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)

    before = content_digest(module.score)
    module.score.__code__ = (lambda text: 2 * len(text)).__code__
    assert (content_digest(module.score) != before) is editable


@pytest.mark.parametrize(
    "record", [b"other.py,,\n\n", b",,\n", b"a.py,sha256=b,many\n", b"caf\xe9/__init__.py,,\n", b"{name}.json,,\n"]
)
def test_a_judge_beside_a_damaged_list_of_files_counts_by_its_code(record, tmp_path, monkeypatch, request):
    """Tools that build images write such lists: blank lines, other encodings; the digest must not fail over them."""
    name = f"own_judge_{abs(hash(request.node.name))}"
    (tmp_path / "other-1.0.dist-info").mkdir()
    (tmp_path / "other-1.0.dist-info" / "RECORD").write_bytes(record.replace(b"{name}", name.encode()))
    (tmp_path / f"{name}.py").write_text("def score(text):\n    return len(text)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module(name)

    before = content_digest(module.score)
    module.score.__code__ = (lambda text: 2 * len(text)).__code__
    assert content_digest(module.score) != before
