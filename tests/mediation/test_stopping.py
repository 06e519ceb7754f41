"""A sweep that is stopped with Ctrl-C says how it goes on, and does so."""

import pytest

from care_lens.mediation.sweep import Part, Sweep


def parts(ran, stop_at):
    def run(todo, bar):
        if todo[0] == stop_at:
            raise KeyboardInterrupt
        ran.append(todo[0])
        yield {todo[0]: 1.0}

    return [Part(place=i, cells=[f"cell {i}"], run=run) for i in range(4)]


def swept(path, ran, stop_at=None, progress=True):
    return list(Sweep(path, settings={"a": 1}).run(parts(ran, stop_at), total=4, desc="mediating", progress=progress))


def test_ctrl_c_names_the_checkpoint_and_the_next_call_goes_on_from_it(tmp_path, caplog):
    path, ran = tmp_path / "cells.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        swept(path, ran, "cell 2")
    (record,) = [record for record in caplog.records if record.name == "care_lens.core.progress"]
    assert record.getMessage() == (
        f"mediating was stopped at 2 of 4; to go on, make the same call with checkpoint={str(path)!r} again"
    )
    assert [values for _, values in swept(path, ran)] == [[1.0]] * 4
    assert ran == [f"cell {i}" for i in range(4)]  # each once


def test_without_a_checkpoint_it_says_what_would_have_kept_the_cells(caplog):
    with pytest.raises(KeyboardInterrupt):
        swept(None, [], "cell 1")
    assert "checkpoint='cells.jsonl'" in caplog.text and "stopped at 1 of 4" in caplog.text
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        swept(None, [], "cell 1", progress=False)
    assert not caplog.records
