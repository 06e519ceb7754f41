"""What is made ahead in several processes is what the steps would make, and a job that fails is its step's.

That a whole run in two processes ends in the bytes of one in one process is tested by test_killed_run.
"""

import os

import pandas as pd
import pytest
import torch
from test_resume import SETTINGS, Effects, make

from care_lens.core.forked import in_workers
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.ahead import at_once
from care_lens.pipeline.resume import Stage


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    return HookedLVLM.from_hf(*llava_maker("clip"))


def fails():
    raise RuntimeError("no memory")


def test_steps_find_what_was_made_and_make_what_failed(lvlm, tmp_path, caplog):
    caplog.set_level("INFO", logger="care_lens")
    torch.set_num_threads(2)
    with in_workers(2), Stage(tmp_path / "frames", SETTINGS) as stage:
        names = ("effects.a", "effects.b")
        jobs = {name: lambda name=name: stage.result(Effects, name, lambda: make(stage, name)) for name in names}
        jobs |= {"rows": lambda: (os.getpid(), torch.get_num_threads(), torch.arange(3.0)), "broken": fails}
        found = at_once(lvlm, lambda: jobs, stage, wanted=("rows", "broken"))
        pid, threads, row = found.pop("rows")
        assert pid != os.getpid() and threads == 1 and torch.equal(row, torch.arange(3.0)) and not row.is_shared()
        assert not found and set(stage.seconds) == set(names) and torch.get_num_threads() == 2
        kept = {path.name: path.read_bytes() for path in stage.directory.iterdir() if path.name.startswith("effects")}
        for name in names:
            # Neither made again nor called resumed: this run has made it.
            assert isinstance(stage.result(Effects, name, fails).frame, pd.DataFrame)
    assert "resumed" not in caplog.text
    with Stage(tmp_path / "alone", SETTINGS) as stage:
        for name in names:
            stage.result(Effects, name, lambda name=name: make(stage, name))
        alone = {path.name: path.read_bytes() for path in stage.directory.iterdir() if path.name.startswith("effects")}
    assert kept == alone and len(kept) > 4


def test_one_job_alone_has_the_one_thread_that_copies_have(lvlm, tmp_path):
    torch.set_num_threads(2)
    with in_workers(2), Stage(tmp_path / "frames", SETTINGS) as stage:
        found = at_once(lvlm, lambda: {"rows": torch.get_num_threads}, stage, wanted=("rows",))
    assert found == {"rows": 1} and torch.get_num_threads() == 2


def test_one_process_and_large_models_make_nothing_ahead(lvlm, tmp_path, monkeypatch):
    with Stage(tmp_path / "frames", SETTINGS) as stage:
        assert at_once(lvlm, fails, stage, wanted=("rows",)) == {}
        monkeypatch.setattr("care_lens.pipeline.ahead._SMALL", 1000)
        with in_workers(2):
            assert at_once(lvlm, fails, stage, wanted=("rows",)) == {}
