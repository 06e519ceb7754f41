"""The store in an SQLite file: the same as one in memory, whatever is killed, shared, converted or damaged."""

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from dataclasses import replace

import pytest
from stored_answers import answer, fill, older

from care_lens.core.errors import ArtifactError
from care_lens.evaluation import GenerationStore, generate_all


def test_it_is_the_store_in_memory_after_any_writes(tmp_path):
    path, rng = tmp_path / "folder" / "answers.sqlite", random.Random(0)
    kept, ours = GenerationStore(path), GenerationStore()
    assert len(kept) == 0 and kept.answers() == [] and kept.settings == {} and not path.exists()
    for step in range(40):
        rows = [
            answer(
                rng.choice("abcde"),
                defence=rng.choice(("none", "d")),
                channel=rng.choice("xy"),
                seed=rng.randrange(2),
                response=rng.choice([None, f"said {step} \u2018\U0001f511\u2019\n\x00"]),
                turns=(("user", "so"), ("assistant", "no")),
                token_ids=(step, 2),
                meta={"k": "v"},
            )
            for _ in range(rng.randrange(4))
        ]
        for store in (kept, ours):
            store.add(rows)
            assert store.add_settings({"step": step % 7}) == ours.add_settings({"step": step % 7})
        if step % 9 == 0:
            kept = GenerationStore(path)
        assert len(kept) == len(ours) and kept.answers() == ours.answers() and kept.settings == ours.settings
        assert all(kept.get(row.key) == ours.get(row.key) for row in [*rows, answer("never")])
        assert kept.answers(settings=["s"]) == ours.answers() and kept.answers(settings=["t"]) == []
    assert kept.to_dataframe().equals(ours.to_dataframe())


@pytest.mark.parametrize("name", [None, "a.jsonl", "a.sqlite"])
def test_what_a_file_cannot_hold_as_a_key_is_refused_by_all_stores(tmp_path, name):
    store = GenerationStore(None if name is None else tmp_path / name)
    for row, message in (
        (answer("a\ud800"), r"id must be text .* got 'a\\ud800' with a lone surrogate"),
        (answer("a", channel="\udfff"), "channel must be text"),
        (answer("a", seed=2**70), "seed must be a whole number of 64 bits"),
    ):
        for asked in (lambda row=row: store.get(row.key), lambda row=row: store.add([answer("fine"), row])):
            with pytest.raises(ValueError, match=message):
                asked()
    assert len(store) == 0
    kept = [answer("\U0001f511", seed=2**63 - 1, response="\ud800")]
    store.add(kept)
    assert store.answers() == kept and store.get(kept[0].key) == kept[0]


def test_two_processes_lose_no_answer(tmp_path):
    path = tmp_path / "answers.sqlite"
    held = GenerationStore(path)
    held.add([answer("before")])  # a connection that must not be used over the fork
    context = multiprocessing.get_context("fork")
    start = context.Event()
    others = [context.Process(target=fill, args=(path, who, start)) for who in ("x", "y")]
    for other in others:
        other.start()
    start.set()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    assert {row.id for row in held.answers()} == {"before"} | {f"{who} {i}" for who in "xy" for i in range(15)}
    assert len(GenerationStore(path).settings) == 6


def test_a_kill_loses_nothing_but_the_batch_in_flight(tmp_path):
    path, rng = tmp_path / "answers.sqlite", random.Random(1)
    said: list[int] = []
    for _ in range(12):
        first, (read, write) = len(GenerationStore(path)) // 3, os.pipe()
        child = os.fork()
        if child == 0:
            try:
                store = GenerationStore(path)
                for batch in range(first, first + 10_000):
                    store.add([answer(f"{batch} {i}") for i in range(3)])
                    os.write(write, batch.to_bytes(4, "big"))
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(rng.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        while part := os.read(read, 4):
            said.append(int.from_bytes(part, "big"))
        os.close(read)
        found = [row.id for row in GenerationStore(path).answers()]
        assert found == [f"{batch} {i}" for batch in range(len(found) // 3) for i in range(3)]
        assert len(said) * 3 <= len(found) and {*range(len(found) // 3)} >= {*said}
        said = [*range(len(found) // 3)]
    assert said


def test_stores_of_json_lines_still_open_and_lose_nothing_when_they_are_copied(tmp_path):
    lines = GenerationStore(tmp_path / "answers.jsonl")
    lines.add_settings({"max_new_tokens": 3})
    lines.add([answer("a"), answer("b", response=None, missing="ValueError")])
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert before.startswith(b'{"journal"')
    copied = lines.copied(tmp_path / "answers.sqlite")
    again = GenerationStore(tmp_path / "answers.sqlite")
    assert again.answers() == copied.answers() == lines.answers() and again.settings == lines.settings
    assert (tmp_path / "answers.jsonl").read_bytes() == before
    assert again.copied(tmp_path / "back.jsonl").answers() == lines.answers()
    (tmp_path / "renamed.sqlite").write_bytes(older(answer("a")))  # what a file is, its content says
    store = GenerationStore(tmp_path / "renamed.sqlite")
    store.add([answer("b")])
    assert [row.id for row in GenerationStore(tmp_path / "renamed.sqlite").answers()] == ["a", "b"]
    os.rename(tmp_path / "answers.sqlite", tmp_path / "other.jsonl")
    assert GenerationStore(tmp_path / "other.jsonl").answers() == lines.answers()


def test_a_changed_row_is_an_error_and_not_an_answer(tmp_path):
    path = tmp_path / "answers.sqlite"
    GenerationStore(path).add([answer("a", response="surely not"), answer("b")])
    for change in ("row = replace(row, 'surely', 'rarely')", "id = 'c'"):
        changed = tmp_path / "changed.sqlite"
        changed.write_bytes(path.read_bytes())
        with sqlite3.connect(changed) as connection:
            connection.execute(f"UPDATE answers SET {change} WHERE id = 'a'")
        connection.close()
        with pytest.raises(ArtifactError, match="damaged"):
            GenerationStore(changed).answers()
        assert GenerationStore(changed).get(answer("b").key) == answer("b")
    content = bytearray(path.read_bytes())
    content[content.index(b"surely")] ^= 4
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="'a' in channel 'plain' under 'none'"):
        GenerationStore(path).get(answer("a").key)


def test_a_file_that_is_no_store_is_left_as_it_is(tmp_path):
    notes = tmp_path / "notes.sqlite"
    notes.write_text("my notes, longer than the head of a page")
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    newer = tmp_path / "newer.sqlite"
    GenerationStore(newer).add([answer("a")])
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 2")
    connection.close()
    for path, why in ((notes, "damaged"), (foreign, "another SQLite file"), (newer, "newer care_lens")):
        before = path.read_bytes()
        with pytest.raises(ArtifactError, match=why):
            GenerationStore(path)
        assert path.read_bytes() == before


def test_a_full_disk_loses_nothing_that_stood_there(tmp_path):
    path = tmp_path / "answers.sqlite"
    store = GenerationStore(path)
    store.add([answer("a")])
    connection = store._table._connection()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(OSError, match="full"):
        store.add([answer("b"), answer("c", response="sure " * 9000)])
    assert [row.id for row in store.answers()] == ["a"]
    store.add([answer("d")])
    assert [row.id for row in GenerationStore(path).answers()] == ["a", "d"]


def test_answers_are_generated_once(small, suites, tmp_path, monkeypatch):
    asked = [replace(e, channel="benign") for e in suites["benign"][:5]]
    sizes: list[int] = []
    generate = type(small).generate
    monkeypatch.setattr(
        type(small),
        "generate",
        lambda self, inputs, **o: sizes.append(inputs.batch_size) or generate(self, inputs, **o),
    )
    options = {"max_new_tokens": 3, "batch_size": 4, "progress": False}
    path = tmp_path / "answers.sqlite"
    first = generate_all(small, asked[:3], store=GenerationStore(path), **options)
    whole = generate_all(small, asked, store=GenerationStore(path), **options)
    assert sizes == [3, 2] and whole[:3] == first
    assert whole == generate_all(small, asked, store=GenerationStore(), **options)


def test_a_folder_keeps_the_store_it_has_and_a_new_one_suits_the_number_of_answers(tmp_path):
    kind = GenerationStore.in_folder(tmp_path, expected=20_000)
    assert kind.path.name == "answers.jsonl" and not kind.path.exists()
    many = GenerationStore.in_folder(tmp_path, "search", expected=20_001)
    assert many.path.name == "search.sqlite" and not many.path.exists()
    kind.add([answer("a")])
    assert (
        GenerationStore.in_folder(tmp_path, expected=10**6).answers() == kind.answers()
    )  # what is there is kept on with
    many.add([answer("b")])
    assert GenerationStore.in_folder(tmp_path, "search").answers() == many.answers()
    kind.copied(tmp_path / "answers.sqlite")
    kind.add([answer("later")])
    taken = GenerationStore.in_folder(tmp_path)  # what came to the JSON lines since is not read
    assert taken.path.name == "answers.sqlite" and [one.id for one in taken.answers()] == ["a"]
