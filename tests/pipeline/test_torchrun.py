"""What the page on many GPUs says, started by torchrun in two processes on the CPU: all of it equal to one process, to the bit."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_benchmark_study import invoke, write_benchmarks
from zoo.tiny import make_llava

from care_lens.evaluation import GenerationStore

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "howto" / "many_gpus.md"


CODE = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL))
#: After the code of the page, what `torchrun -m care_lens.cli WORDS` does.
COMMAND = """
import runpy, sys
sys.argv = ["care-lens", *{words!r}]
runpy.run_module("care_lens.cli", run_name="__main__")
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder of one start of torchrun in two processes, the words of the command in it, and what was written to the terminal.

    The code of the page and then the command: three processes import torch for each start.
    """
    folder = tmp_path_factory.mktemp("torchrun")
    model, processor = make_llava()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    sources = write_benchmarks(folder / "files")
    common = ("study", *sources, "--model", folder / "model", "--batch-size", 4, "--threads", 1, "--name", "mine")
    words = (*common, "--comply", "sure,yes", "--refuse", "sorry,no", "--pairs", 4, "--max-new-tokens", 4, "--out")
    script = folder / "my_job.py"
    script.write_text(CODE + COMMAND.format(words=[str(word) for word in (*words, folder / "study")]), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, words, done.stdout


def ran(code, folder, monkeypatch, **environment):
    """The names that code leaves, run here in a folder."""
    names: dict[str, object] = {}
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        for name, value in environment.items():
            patch.setenv(name, value)
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_code_of_the_page_is_the_same_under_torchrun(started, tmp_path, monkeypatch):
    one, two = tmp_path, started[0]
    job = two / "results" / "my_job"
    before = {path: path.stat().st_mtime_ns for path in job.rglob("*.1-of-2.*")}
    assert len(before) >= 5  # the second had its part in every step
    alone = ran(CODE, one, monkeypatch)
    together = ran(CODE, two, monkeypatch, RANK="0", WORLD_SIZE="2")  # puts together what both have done
    assert before == {path: path.stat().st_mtime_ns for path in job.rglob("*.1-of-2.*")}
    assert alone["rows"].rows("blocks.1.hook_resid_post", "last").shape[0] == 12
    for key, values in alone["rows"].values.items():
        assert torch.equal(values.nan_to_num(), together["rows"].values[key].nan_to_num())
    (_image, text), (_image, other) = alone["tables"].values(), together["tables"].values()
    assert text.total("any", "textual").count == other.total("any", "textual").count == 12
    assert torch.allclose(text.total("any", "textual").mean, other.total("any", "textual").mean, rtol=1e-12)
    assert [e.image.tobytes() for e in alone["attacked"]] == [e.image.tobytes() for e in together["attacked"]]
    assert set(alone["table"].frame["channel"]) == {"plain", "benign"} and len(alone["attacked"]) == 4
    for name in ("frame", "trials"):
        pd.testing.assert_frame_equal(getattr(alone["table"], name), getattr(together["table"], name), check_exact=True)
    said = [
        {
            a.key: (a.response, a.token_ids)
            for path in (home / "results").rglob("answers*.jsonl")
            for a in GenerationStore(path).answers()
        }
        for home in (one, two)
    ]
    assert said[0] == said[1] and len(said[0]) == 12


def test_a_study_made_by_torchrun_is_that_of_one_process(started, tmp_path):
    folder, words, told = started
    assert "process 1-of-2: its share of the answers is in" in " ".join(told.split())
    made = invoke(*words, tmp_path / "study")
    assert made.exit_code == 0, made.output
    files = [
        {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file() and "answers" not in p.parts}
        for home in (tmp_path / "study", folder / "study")
    ]
    assert files[0] == files[1] and "examples.jsonl" in files[0]
