"""Capture, attacks and evaluation in two processes, as torchrun starts them: equal to one process, and nothing is done twice."""

import os
import traceback

import pandas as pd
import pytest
import torch
from sharded_job import job, suites
from zoo.tiny import make_llava

from care_lens.core.processes import Process
from care_lens.evaluation import GenerationSettings, GenerationStore, SubstringRefusalJudge, evaluate_sharded
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The folder of a job of two processes, the second of which ran to its end; and of one process.

    The second is a copy of this one, which need not import all of this again.
    """
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    if (second := os.fork()) == 0:
        status = 1
        try:
            os.environ |= {"RANK": "1", "WORLD_SIZE": "2"}
            status = int(job(two) is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    with pytest.MonkeyPatch.context() as patch:
        alone = job(one)
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        together = job(two)
    assert os.waitpid(second, 0)[1] == 0
    return two, alone, together


def test_captured_rows_are_those_of_one_process(both):
    _, alone, together = both
    one, two = alone["captured"], together["captured"]
    assert (one.ids, one.groups) == (two.ids, two.groups) and len(set(two.groups)) == 11
    for key, rows in one.values.items():
        assert torch.equal(rows.nan_to_num(), two.values[key].nan_to_num()) and torch.equal(
            one.present[key], two.present[key]
        )


@pytest.mark.parametrize("keep", ["rows", "sums"])
def test_moments_are_merged_exactly(both, keep):
    _, alone, together = both
    one, two = alone["moments"][keep], together["moments"][keep]
    assert [*one] == [*two]
    for key, table in one.items():
        assert [*table] == [*two[key]] and len(table) > 2
        for entry in table:
            first, second = table[entry], two[key][entry]
            assert first.count == second.count
            for name in ("mean", "covariance"):
                ours, theirs = getattr(first, name), getattr(second, name)
                ours, theirs = (x() if callable(x) else x for x in (ours, theirs))
                assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12 * float(ours.abs().max()))


def test_attacked_pictures_are_those_of_one_process(both):
    _, alone, together = both
    one, two = alone["attacked"], together["attacked"]
    assert [e.id for e in one] == [e.id for e in two] == [f"e{i}" for i in range(5)]
    assert [e.image.tobytes() for e in one] == [e.image.tobytes() for e in two]


def test_a_job_goes_on_in_another_number_of_processes(both, monkeypatch):
    """What any process has answered is not generated again, be it that the first never came to put it together."""
    folder, alone, _ = both
    home = folder / "stopped"
    home.mkdir()
    for part in ("0-of-2", "1-of-2"):
        (home / f"answers.{part}.jsonl").write_bytes((folder / "greedy" / f"answers.{part}.jsonl").read_bytes())
    with HookedLVLM.from_hf(*make_llava()) as lvlm:
        monkeypatch.setattr(HookedLVLM, "generate", lambda *_, **__: pytest.fail("generated again"))
        table = evaluate_sharded(
            lvlm, suites(), {"none": None}, judge=SubstringRefusalJudge(), directory=home, batch_size=2, n_boot=50, progress=False,
            settings=GenerationSettings(max_new_tokens=4),
        )  # fmt: skip
    pd.testing.assert_frame_equal(table.trials, alone["tables"]["greedy"].trials)


def test_a_large_job_is_kept_in_an_sqlite_file_which_any_later_one_takes_over(both, tmp_path, monkeypatch):
    _, alone, _ = both
    options = {"judge": SubstringRefusalJudge(), "batch_size": 2, "n_boot": 50, "progress": False}
    asked = {**options, "settings": GenerationSettings(max_new_tokens=4)}
    with HookedLVLM.from_hf(*make_llava()) as lvlm:
        monkeypatch.setattr("care_lens.evaluation.store.MANY", 3)
        table = evaluate_sharded(lvlm, suites(), {"none": None}, directory=tmp_path, **asked)
        assert [path.name for path in tmp_path.glob("answers.*")] == ["answers.sqlite"]
        monkeypatch.setattr(HookedLVLM, "generate", lambda *_, **__: pytest.fail("generated again"))
        process = Process(0, 2)
        monkeypatch.setattr(
            "care_lens.evaluation.sharded.wait_for", lambda *_, **__: None
        )  # the other had nothing to do
        again = evaluate_sharded(lvlm, suites(), {"none": None}, directory=tmp_path, process=process, **asked)
    for found in (table, again):
        pd.testing.assert_frame_equal(found.trials, alone["tables"]["greedy"].trials)


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_tables_are_those_of_one_process(both, name):
    folder, alone, together = both
    pd.testing.assert_frame_equal(alone["tables"][name].frame, together["tables"][name].frame)
    pd.testing.assert_frame_equal(alone["tables"][name].trials, together["tables"][name].trials)
    stores = [GenerationStore(folder / name / f"answers{part}.jsonl") for part in ("", ".0-of-2", ".1-of-2")]
    assert [len(store) for store in stores] == [11, 6, 5]  # each answered its share, and no more
    said = {a.id: a.response for part in stores[1:] for a in part.answers()}
    assert said == {a.id: a.response for a in stores[0].answers()}
