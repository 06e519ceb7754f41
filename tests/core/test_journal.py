"""A journal finds every change, drops a torn tail, leaves foreign files alone, and loses nothing with two writers."""

import json
import multiprocessing
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core.errors import ArtifactError
from care_lens.core.journal import Journal, differing

ROWS = [{"cell": f"cell {i}", "value": [i / 7, float("inf")]} for i in range(6)]


def journal(path, **about):
    return Journal(path, kind="cells", about={"seed": 0, **about})


def test_rows_come_back_and_the_file_only_grows(tmp_path):
    path = tmp_path / "deep" / "a.jsonl"
    journal(path).append(ROWS[:2])
    before = path.read_bytes()
    again = journal(path)
    assert again.read() == ROWS[:2] and again.read() == []
    again.append(ROWS[2:])
    assert path.read_bytes().startswith(before)
    assert journal(path).read() == ROWS
    whole = tmp_path / "whole.jsonl"
    journal(whole).append(ROWS)
    assert whole.read_bytes() == path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_every_flipped_bit_is_found_or_drops_the_tail(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("flip") / "a.jsonl"
    journal(path).append(ROWS)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = journal(path).read()
    except ArtifactError:
        return
    # Only the last line's end can go without an error: that is how a kill leaves a line.
    assert found == ROWS[:-1] and not bytes(content).endswith(b"\n")


@pytest.mark.parametrize("change", ["taken out", "moved", "copied", "from another journal", "added by hand"])
def test_whole_lines_cannot_change_places(tmp_path, change):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    journal(path).append(ROWS)
    journal(other).append(list(reversed(ROWS)))
    head, *lines = path.read_text().splitlines(keepends=True)
    theirs = other.read_text().splitlines(keepends=True)[1:]
    changed = {
        "taken out": lines[:2] + lines[3:],
        "moved": [*lines[:2], lines[3], lines[2], *lines[4:]],
        "copied": [*lines, lines[-1]],
        "from another journal": [*lines[:2], theirs[2], *lines[3:]],
        "added by hand": [*lines, json.dumps(ROWS[0]) + "\n"],
    }[change]
    path.write_text("".join([head, *changed]))
    with pytest.raises(ArtifactError, match=r"line [4-8] of .* its sum differs"):
        journal(path).read()


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_tail_is_dropped_and_written_over(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    journal(path).append(ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = journal(path)
    assert again.read() == ROWS[:-1]
    assert path.read_bytes() == whole[:-cut]
    again.append(ROWS[-1:])
    assert path.read_bytes() == whole


NOTES = [
    b"my notes\n",
    b"my notes",
    b'{"mine": 1}\n',
    b"\x00\xff\x00",
    b'{"journal": "shopping", "about": {}}\n',
    b'{"journal": ',
]


@pytest.mark.parametrize("notes", NOTES)
def test_a_foreign_file_is_left_as_it_is(tmp_path, notes):
    path = tmp_path / "notes.txt"
    path.write_bytes(notes)
    with pytest.raises(ArtifactError, match="use another path"):
        journal(path).append(ROWS)
    with pytest.raises(ArtifactError):
        journal(path).read()
    assert path.read_bytes() == notes


def test_other_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    journal(path).append(ROWS)
    with pytest.raises(ArtifactError, match=r"others in \['seed'\]"):
        Journal(path, kind="cells", about={"seed": 1}).append(ROWS)
    assert differing({"a": {"b": 1, "c": [1, float("nan")]}}, {"a": {"b": 2, "c": (1, float("nan"))}}) == ["a.b"]


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    mine = journal(path)
    mine.append(ROWS[:3])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            mine.append(ROWS[3:])
        with pytest.raises(OSError, match="No space"):
            journal(tmp_path / "new.jsonl").append(ROWS)
    assert path.read_bytes() == before and not (tmp_path / "new.jsonl").exists()
    mine.append(ROWS[3:])
    assert journal(path).read() == ROWS


def _append(path, who, start):
    mine = journal(path)
    start.wait(60)
    for i in range(30):
        mine.append([{"who": who, "i": i}])


def test_two_processes_and_two_objects_lose_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    context = multiprocessing.get_context("fork")
    start = context.Event()
    others = [context.Process(target=_append, args=(path, who, start)) for who in ("a", "b")]
    for other in others:
        other.start()
    first, second, seen = journal(path), journal(path), []
    start.set()
    for i in range(10):
        first.append([{"who": "first", "i": i}])
        seen += second.append([{"who": "second", "i": i}])
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    found = journal(path).read()
    for who, n in {"a": 30, "b": 30, "first": 10, "second": 10}.items():
        assert [row["i"] for row in found if row["who"] == who] == list(range(n))
    seen += second.read()
    assert [row for row in found if row["who"] != "second"] == seen
