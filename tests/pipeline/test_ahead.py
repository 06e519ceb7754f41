"""What is made ahead in several processes is what the steps would make, and a job that fails is its step's.

That a whole run in two processes ends in the bytes of one in one process is tested by test_killed_run.
"""

import os
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_resume import SETTINGS, Effects, make

from care_lens import organism
from care_lens.core import Site, Verdict
from care_lens.core.forked import in_workers
from care_lens.evaluation import Choice
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline import RunSettings, ahead
from care_lens.pipeline.ahead import at_once
from care_lens.pipeline.gradient import adaptive_suite, bases
from care_lens.pipeline.resume import Stage
from care_lens.repair import ConformalGate, Correction, FitRows, HybridFusion, LinearReader, Writer


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
        found = at_once(lvlm, jobs, stage, wanted=("rows", "broken"))
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
        found = at_once(lvlm, {"rows": torch.get_num_threads}, stage, wanted=("rows",))
    assert found == {"rows": 1} and torch.get_num_threads() == 2


def test_one_process_and_large_models_make_nothing_ahead(lvlm, tmp_path, monkeypatch):
    with Stage(tmp_path / "frames", SETTINGS) as stage:
        assert at_once(lvlm, {"rows": fails}, stage, wanted=("rows",)) == {}
        monkeypatch.setattr("care_lens.pipeline.ahead._SMALL", 1000)
        with in_workers(2):
            assert at_once(lvlm, {"rows": fails}, stage, wanted=("rows",)) == {}


@pytest.mark.parametrize("through", [0, 1, 3], ids=lambda n: f"{n} of 3 at first")
def test_attacks_made_ahead_leave_the_files_that_a_run_without_them_has(through, tmp_path, monkeypatch):
    """The second loss attacks only what the first has not got through, whatever was made ahead."""
    settings = replace(RunSettings().short(), pgd_steps=1, pgd_examples=3, max_new_tokens=2, batch_size=4, restarts=1)

    class Said:
        name = "the first of them complied"

        def __call__(self, examples, texts):
            return [Verdict.COMPLIED if e.id in chosen else Verdict.REFUSED for e in examples]

    monkeypatch.setattr(ahead, "kept_shuffled", lambda *_: None)
    torch.set_num_threads(1)
    with HookedLVLM.from_hf(*organism.untrained(seed=0)) as lvlm:
        study = replace(organism.study(), judge=Said())
        chosen = {e.id for e in bases(study, settings)[:through]}
        site = Site.parse("blocks.1.hook_resid_post")
        row = torch.randn(lvlm.hf_model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
        repair = HybridFusion(
            textual=(
                Correction(
                    writer=Writer.towards(site, target=row, source=-row, scope="last"),
                    reader=LinearReader(site=site, direction=row, centre=0 * row),
                    gate=ConformalGate(threshold=0.0, epsilon=0.1, n=20),
                    pulse=True,
                ),
            )
        )
        choice, rows = object.__new__(Choice), object.__new__(FitRows)  # of which the control alone needs more
        object.__setattr__(choice, "repair", repair)
        files, found = {}, {}
        for n in (1, 2):
            with in_workers(n), Stage(tmp_path / str(n), {"a": 1}) as stage:
                jobs = ahead.ahead_of_proof(lvlm, study, choice, rows, settings, stage)
                at_once(lvlm, jobs, stage)
                assert len([*stage.directory.glob("pgd.*.jsonl")]) == 2 * (n - 1)
                found[n] = adaptive_suite(lvlm, study, repair, settings, directory=stage.directory)
                files[n] = {path.name: path.read_bytes() for path in stage.directory.glob("pgd.*.jsonl")}
    assert files[1] == files[2] and len(files[1]) == (1 if through == 3 else 2)
    assert [e.image.tobytes() for e in found[1]] == [e.image.tobytes() for e in found[2]] and len(found[1]) == 3
