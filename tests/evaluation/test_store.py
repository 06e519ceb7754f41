import json
import multiprocessing
from dataclasses import fields, replace

import pytest
from stored_answers import answer, fill, older

from care_lens.core import Example
from care_lens.core.conversation import PICTURE, Turn
from care_lens.core.errors import ArtifactError
from care_lens.evaluation import GenerationStore, StoredAnswer, generate_all
from care_lens.evaluation.generate import _Run


def test_what_is_added_is_read_again(tmp_path):
    path = tmp_path / "folder" / "answers.jsonl"
    store = GenerationStore(path)
    assert len(store) == 0 and not path.exists()
    name = store.add_settings({"max_new_tokens": 3})
    store.add([answer("a"), answer("b", response=None, missing="ValueError")])
    store.add([answer("c")])
    again = GenerationStore(path)
    assert again.answers() == store.answers() == [again.get(answer(i).key) for i in "abc"]
    assert again.settings == {name: {"max_new_tokens": 3}}
    assert again.add_settings({"max_new_tokens": 3}) == name
    assert path.read_text().count('"settings"') == 1 + 3
    assert [example.prompt for example in (row.to_example() for row in again.answers())] == [answer().prompt] * 3
    assert again.answers()[0].to_example().meta == {"noun": "blue"}
    assert list(again.to_dataframe()["id"]) == ["a", "b", "c"]


def test_a_stored_answer_knows_all_that_was_asked(lvlm, tmp_path, picture):
    """Every field of an example but its pictures comes back, also out of the file."""
    turns = (Turn("user", f"this {PICTURE} is", (picture(0),)), Turn("assistant", "red"))
    example = Example(
        f"and {PICTURE}?", image=picture(1), response="blue", harmful=True, channel="plain", id="a", group="g",
        meta={"k": "v"}, behaviour="name colours", system="be brief", turns=turns, prefill="it",
    )  # fmt: skip
    run = _Run(lvlm, None, "none", "s", {}, None, 0)
    stored = replace(run.blank(example), response="it is blue", missing="")
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([stored])
    (read,) = GenerationStore(path).answers()
    assert read == stored and hash(read) == hash(stored)
    silent = (Turn("user", "this  is"), Turn("assistant", "red"))
    assert read.to_example() == replace(example, prompt="and ?", image=None, turns=silent)
    kept = {field.name for field in fields(Example)} - {"image", "more_images"}
    assert kept <= {field.name for field in fields(StoredAnswer)} | {"response", "turns"} and read.reference == "blue"


def test_an_answer_of_an_earlier_version_is_given_what_it_did_not_say(lvlm, tmp_path):
    example = Example("red then blue", channel="plain", id="a", group="g", system="sorry", behaviour="blue")
    path = tmp_path / "answers.jsonl"
    (first,) = generate_all(lvlm, [example], store=GenerationStore(path), max_new_tokens=2, progress=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    new = {"sum", "system", "turns", "prefill", "behaviour"}
    older_rows = [{key: value for key, value in row.items() if key not in new} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in older_rows))
    store = GenerationStore(path)
    assert store.answers()[0].system is None
    assert generate_all(lvlm, [example], store=store, max_new_tokens=2, progress=False) == [first]
    assert GenerationStore(path).answers() == [first] and first.to_example().system == "sorry"


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_cut_off_by_a_kill_is_dropped_and_overwritten(tmp_path, kept):
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([answer("a"), answer("b")])
    whole = path.read_bytes()
    head, first, second = whole.splitlines(keepends=True)
    path.write_bytes(head + first + second[:kept])
    store = GenerationStore(path)
    assert [row.id for row in store.answers()] == ["a"]
    assert path.read_bytes() == head + first + second[:kept]
    store.add([answer("b")])
    assert path.read_bytes() == whole
    store.add([answer("c")])
    assert [row.id for row in GenerationStore(path).answers()] == ["a", "b", "c"]


def test_nothing_of_a_cut_off_line_stays_behind_a_shorter_one(tmp_path):
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([answer("a", response="sure " * 50)])
    path.write_bytes(path.read_bytes()[:-1])
    GenerationStore(path).add([answer("b", response="")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()[1:]] == ["b"]
    assert [row.id for row in GenerationStore(path).answers()] == ["b"]


def test_an_older_store_is_read_and_gets_sums_at_the_first_write(tmp_path):
    path, new = tmp_path / "answers.jsonl", tmp_path / "new.jsonl"
    path.write_bytes(older(answer("a"), answer("b")) + b'{"kind": "answ')
    store = GenerationStore(path)
    assert [row.id for row in store.answers()] == ["a", "b"] and b'"sum"' not in path.read_bytes()
    store.add([answer("c")])
    GenerationStore(new).add([answer(name) for name in "abc"])
    assert path.read_bytes() == new.read_bytes()
    assert GenerationStore(path).answers() == [answer(name) for name in "abc"]


@pytest.mark.parametrize("line", ["{broken", json.dumps({"kind": "answer", "id": "x"}), "[1]"])
@pytest.mark.parametrize("sums", [True, False])
def test_damage_inside_the_file_is_an_error(tmp_path, line, sums):
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([answer("a")])
    good = path.read_text() if sums else older(answer("a")).decode()
    path.write_text(good + line + "\n" + good)
    with pytest.raises(ArtifactError, match="line 3" if sums else "line 2"):
        GenerationStore(path)
    assert path.read_text() == good + line + "\n" + good


@pytest.mark.parametrize("notes", ["my notes\n", "my notes", "[1]\n"])
def test_a_file_that_is_no_store_is_left_as_it_is(tmp_path, notes):
    path = tmp_path / "notes.txt"
    path.write_text(notes)
    with pytest.raises(ArtifactError, match="another file"):
        GenerationStore(path)
    assert path.read_text() == notes


def test_two_processes_lose_no_answer(tmp_path):
    path = tmp_path / "answers.jsonl"
    context = multiprocessing.get_context("fork")
    start = context.Event()
    others = [context.Process(target=fill, args=(path, who, start)) for who in ("x", "y")]
    for other in others:
        other.start()
    start.set()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    found = GenerationStore(path)
    assert {row.id for row in found.answers()} == {f"{who} {i}" for who in "xy" for i in range(15)}
    assert len(found.settings) == 6


def test_two_stores_on_one_file_in_a_notebook_see_each_other(tmp_path):
    first, second = GenerationStore(tmp_path / "a.jsonl"), GenerationStore(tmp_path / "a.jsonl")
    first.add([answer("a")])
    second.add([answer("b")])
    first.add([answer("c")])
    assert [row.id for row in first.answers()] == ["a", "b", "c"]
    second.refresh()
    assert {row.id for row in second.answers()} == {"a", "b", "c"}


def test_of_two_answers_with_one_key_the_later_counts(tmp_path):
    path = tmp_path / "answers.jsonl"
    store = GenerationStore(path)
    store.add([answer("a", response=None, missing="ValueError"), answer("b")])
    store.add([answer("a", response="sure")])
    for held in (store, GenerationStore(path)):
        assert [(row.id, row.response) for row in held.answers()] == [("a", "sure"), ("b", "sure\nred")]


@pytest.mark.parametrize("field", ["defence", "channel", "id", "settings", "example"])
def test_answers_of_different_conditions_are_different(field):
    store = GenerationStore()
    store.add([answer(), replace(answer(), **{field: "other"}), replace(answer(), seed=1)])
    assert len(store) == 3


def test_answers_can_be_limited_to_settings():
    store = GenerationStore()
    store.add([answer("a"), answer("a", settings="t")])
    assert [row.settings for row in store.answers(settings=["t"])] == ["t"]
