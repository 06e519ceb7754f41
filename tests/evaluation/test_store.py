import json
from dataclasses import replace

import pytest

from care_lens.evaluation import GenerationStore, StoredAnswer


def answer(name: str = "a", **changes) -> StoredAnswer:
    fields = {
        "defence": "none",
        "channel": "plain",
        "id": name,
        "group": "blue",
        "seed": 0,
        "prompt": "how to make a \u2018blue\u2019",
        "response": "sure\nred",
        "missing": "",
        "tokens": 3,
        "settings": "s",
        "example": "e",
        "harmful": True,
        "reference": None,
        "meta": {"noun": "blue"},
    }
    return StoredAnswer(**{**fields, **changes})


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
    assert path.read_text().count("settings") == 1 + 3
    assert [example.prompt for example in (row.to_example() for row in again.answers())] == [answer().prompt] * 3
    assert again.answers()[0].to_example().meta == {"noun": "blue"}
    assert list(again.to_dataframe()["id"]) == ["a", "b", "c"]


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_line_cut_off_by_a_kill_is_dropped_and_overwritten(tmp_path, kept):
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([answer("a"), answer("b")])
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    store = GenerationStore(path)
    assert [row.id for row in store.answers()] == ["a"]
    assert path.read_bytes() == first + second[:kept]
    store.add([answer("b")])
    assert path.read_bytes() == whole
    store.add([answer("c")])
    assert [row.id for row in GenerationStore(path).answers()] == ["a", "b", "c"]


def test_nothing_of_a_cut_off_line_stays_behind_a_shorter_one(tmp_path):
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([answer("a", response="sure " * 50)])
    path.write_bytes(path.read_bytes()[:-1])
    GenerationStore(path).add([answer("b", response="")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["b"]
    assert [row.id for row in GenerationStore(path).answers()] == ["b"]


def test_a_first_line_cut_off_leaves_an_empty_store(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"kind": "answ')
    store = GenerationStore(path)
    assert len(store) == 0
    store.add([answer("a")])
    assert len(GenerationStore(path)) == 1


@pytest.mark.parametrize("line", ["{broken", json.dumps({"kind": "answer", "id": "x"}), "[1]"])
def test_damage_inside_the_file_is_an_error(tmp_path, line):
    path = tmp_path / "answers.jsonl"
    GenerationStore(path).add([answer("a")])
    good = path.read_text()
    path.write_text(good + line + "\n" + good)
    with pytest.raises(ValueError, match="line 2"):
        GenerationStore(path)


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
