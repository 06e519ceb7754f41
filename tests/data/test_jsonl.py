"""Files of examples: what is written is read back, and what is wrong is named with file and line."""

import json
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from care_lens.core import Example, examples_digest
from care_lens.core.conversation import PICTURE as PLACE
from care_lens.core.conversation import Turn
from care_lens.data import DataFileError, PictureNotFoundError, read_examples, write_examples

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=PLACE), max_size=12) | st.sampled_from(
    ["\u2028", "a\u2029b", "\x85", "\ufeff", "\r\n", "\n", "\r", "\x1c", "\x0b", "\x00", '"', "\\u2028", "\ud800"]
)
PICTURE = st.builds(
    lambda red, w, h: Image.linear_gradient("L").resize((w, h)).convert("RGB").point(lambda v: v ^ red),
    st.integers(0, 1), st.integers(1, 3), st.integers(1, 3),
)  # fmt: skip
EXAMPLES = st.lists(
    st.builds(
        dict,
        prompt=TEXT,
        image=st.none() | PICTURE,
        response=st.none() | TEXT,
        harmful=st.booleans(),
        channel=TEXT,
        id=TEXT,
        group=TEXT,
        meta=st.dictionaries(TEXT, TEXT, max_size=3),
        behaviour=st.none() | TEXT,
        system=st.none() | TEXT,
        prefill=st.none() | TEXT,
        turns=st.lists(
            st.builds(Turn, st.sampled_from(["user", "assistant"]), TEXT, st.just(()) | st.tuples(PICTURE)), max_size=2
        ).map(tuple),
    ),
    max_size=5,
    unique_by=lambda e: e["id"],
)


def same(a, b):
    """Whether two examples are equal, pictures by their pixels."""
    names = [f.name for f in fields(Example) if f.name not in ("image", "more_images", "turns")]
    said = [[(turn.role, turn.text, len(turn.images)) for turn in one.turns] for one in (a, b)]
    pictures = [[(i.size, i.tobytes()) for i in one.images] for one in (a, b)]
    return all(getattr(a, n) == getattr(b, n) for n in names) and said[0] == said[1] and pictures[0] == pictures[1]


@settings(max_examples=25, deadline=None)
@given(EXAMPLES, st.booleans())
def test_reading_gives_back_what_was_written(rows, several):
    examples = [Example(**row) for row in rows]
    if several:
        examples = [replace(e, more_images=(e.image, e.image.rotate(90))) if e.image else e for e in examples]
    with tempfile.TemporaryDirectory() as folder:
        path = write_examples(examples, Path(folder) / "e.jsonl")
        assert len(path.read_text(encoding="utf-8").splitlines()) == len(examples)
        back = read_examples(path)
        wanted = [replace(e, id=e.id or f"e/{i}") for i, e in enumerate(examples, 1)]
        assert len(back) == len(wanted) and all(map(same, back, wanted))
        again = read_examples(write_examples(reversed(back), path))  # over the file that they are read from
        assert all(map(same, again, reversed(wanted)))


def test_a_conversation_comes_back_with_its_pictures_in_their_places(tmp_path, picture):
    earlier, first, second = picture(0), picture(1), picture(2)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "this is"}, {"type": "image", "image": earlier}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "image", "image": second},
                                     {"type": "text", "text": "and these?"}]},
        {"role": "assistant", "content": "they are"},
    ]  # fmt: skip
    example = Example.from_messages(messages, id="c", group="c", behaviour="name animals")
    path = write_examples([example], tmp_path / "e.jsonl")
    row = json.loads(path.read_text(encoding="utf-8"))
    assert [*row["turns"][0]] == ["role", "text", "image"] and [*row["turns"][1]] == ["role", "text"]
    assert isinstance(row["image"], list) and row["image"][0] != row["turns"][0]["image"]
    (back,) = read_examples(path)
    assert same(back, example) and examples_digest([back]) == examples_digest([example])
    assert back.own_images[0].tobytes() == first.tobytes() and back.turns[0].images[0].tobytes() == earlier.tobytes()


def test_files_of_other_programs(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes('\ufeff{"prompt": "a\u2028b\u2029c\x85d"}\r\n\r\n{"prompt": "e", "image": null}\r\n'.encode())
    rows = read_examples(path)
    assert [e.prompt for e in rows] == ["a\u2028b\u2029c\x85d", "e"]
    assert [(e.id, e.group) for e in rows] == [("e/1", "e/1"), ("e/3", "e/3")]
    path.write_bytes('{"prompt": "a"}\n{"prompt": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataFileError, match=r"e\.jsonl:2 must be UTF-8"):
        read_examples(path)
    path.write_bytes('{"prompt": "a"}\n'.encode("utf-16"))
    with pytest.raises(DataFileError, match=r"e\.jsonl:1 must be UTF-8"):
        read_examples(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be a JSON object"),
        ("[1]", "must be a JSON object"),
        ("[" * 100000, "must be a JSON object"),
        ('{"image": "x.png"}', "must have a 'prompt'"),
        ('{"prompt": 7}', 'prompt must be a text, got 7; write it in quotes: "7"'),
        ('{"prompt": null}', "prompt must be a text, got null"),
        ('{"prompt": "p", "answer": 1}', r"got \['answer'\]; put what else you have in meta"),
        ('{"prompt": "p", "prompt": "q"}', r"each key once, got \['prompt'\] twice"),
        ('{"prompt": "p", "harmful": "false"}', 'harmful must be true or false without quotes, got "false"'),
        ('{"prompt": "p", "harmful": 0}', "harmful must be true or false"),
        ('{"prompt": "p", "harmful": null}', "harmful must be true or false"),
        ('{"prompt": "p", "id": 7}', 'id must be a text, got 7; write it in quotes: "7"'),
        ('{"prompt": "p", "id": ""}', r"id must not be empty.*called 'e/2'"),
        ('{"prompt": "p", "group": 1.5}', "group must be a text"),
        ('{"prompt": "p", "channel": null}', "channel must be a text, got null; leave the key out"),
        ('{"prompt": "p", "response": ["x"]}', "response must be a text"),
        ('{"prompt": "p", "behaviour": true}', "behaviour must be a text, got true"),
        ('{"prompt": "p", "system": ["x"]}', "system must be a text"),
        ('{"prompt": "p", "prefill": 1}', "prefill must be a text, got 1"),
        ('{"prompt": "p", "turns": "hello"}', 'turns must be a list of objects.*got "hello"'),
        ('{"prompt": "p", "turns": null}', "turns must be a list of objects"),
        ('{"prompt": "p", "turns": [{"role": "user"}]}', "turn 1: text must be a text, got null"),
        ('{"prompt": "p", "turns": [{"role": "system", "text": "a"}]}', "role must be one of"),
        ('{"prompt": "p", "turns": [{"role": "user", "text": "a", "content": 1}]}', r"turn 1 must have keys.*content"),
        ('{"prompt": "p", "turns": [{"role": "user", "text": "a", "image": 3}]}', "turn 1: image must be a path"),
        ('{"prompt": "p", "turns": [{"role": "user", "text": "a\\ufffc"}]}', "must have a place"),
        ('{"prompt": "p", "meta": null}', "meta must be an object of texts, got null"),
        ('{"prompt": "p", "meta": {"a": 1}}', r"meta\.a must be a text, got 1"),
        ('{"prompt": "p", "meta": {"a": {"b": "c"}}}', r"meta\.a must be a text"),
        ('{"prompt": "p", "image": 3}', "image must be a path or a list of paths, got 3"),
        ('{"prompt": "p", "image": ""}', "image must be a path"),
        ('{"prompt": "p", "image": ["a.png", null]}', "image must be a path"),
        ('{"prompt": "p", "image": "."}', "must be a picture"),
        ('{"prompt": "p", "image": "e.jsonl"}', "must be a picture"),
        ('{"prompt": "p", "image": "a\\u0000.png"}', "must be a picture"),
        ('{"prompt": "p", "id": "first"}', r"got 'first', which line 1 has"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "e.jsonl"
    path.write_text('{"prompt": "fine", "id": "first"}\n' + line + "\n")
    with pytest.raises(DataFileError, match=rf"(?s)^e\.jsonl:2.*{message}"):
        read_examples(path)


def test_a_missing_picture_is_named_with_its_line(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text('{"prompt": "p", "image": "gone.png"}\n')
    with pytest.raises(PictureNotFoundError, match=r"e\.jsonl:1: image must be there, got no file 'gone.png'"):
        read_examples(path)


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    path = write_examples([Example("kept", id="1")], tmp_path / "e.jsonl")
    for wrong, error, message in (
        ([Example("a", id="1"), Example("b", id="1")], DataFileError, "got '1' for number 1 and number 2"),
        ([Example("a", id="e/2"), Example("b")], DataFileError, "ids that differ"),
    ):
        with pytest.raises(error, match=message):
            write_examples(wrong, path)
        assert [e.prompt for e in read_examples(path)] == ["kept"]


def test_text_on_a_transparent_page_is_written_as_it_is_seen(tmp_path):
    page = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    ImageDraw.Draw(page).rectangle((5, 5, 20, 10), fill=(0, 0, 0, 255))
    (back,) = read_examples(write_examples([Example("read", image=page)], tmp_path / "e.jsonl"))
    assert back.image.getpixel((6, 6)) == (0, 0, 0) and back.image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "HSV", "YCbCr", "F", "I", "LAB", "RGBA"])
def test_pictures_of_every_mode_are_written(tmp_path, mode):
    image = Image.new("RGB", (3, 2), (200, 100, 50))
    image = Image.new("LAB", (3, 2), (60, 10, 10)) if mode == "LAB" else image.convert(mode)
    example = Example("read", image=image)
    (back,) = read_examples(write_examples([example], tmp_path / "e.jsonl"))
    assert back.image == example.image


def test_the_same_picture_is_written_once_and_a_damaged_one_again(tmp_path):
    image = Image.new("RGB", (3, 2), (200, 100, 50))
    rows = [Example("a", image=image, id=str(i)) for i in range(3)]
    path = write_examples(rows, tmp_path / "e.jsonl")
    (file,) = (tmp_path / "e_images").iterdir()
    file.write_bytes(b"cut")
    write_examples(rows, path)
    assert all(e.image == image for e in read_examples(path))
    assert json.loads(path.read_text().splitlines()[0])["image"] == f"e_images/{file.name}"
