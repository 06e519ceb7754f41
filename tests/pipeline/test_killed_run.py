"""The real run, killed inside of every step and started again, ends in the same files, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_run_killed_in_every_step_ends_in_the_same_bytes(tmp_path):
    """Five kills of the smallest run of the bundled model, at seeded random moments; `benchmarks/kill_run.py` does more of them."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "kill_run.py"),
        "--tiny",
        "--kills",
        "5",
        "--seed",
        "1",
        "--folder",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout
    found = json.loads(ended.stdout)
    assert sorted(step.removeprefix("end of ") for step in found["by step"]) == [
        "choose", "diagnose", "learn", "prove", "report",
    ]  # fmt: skip
    assert {"choose", "prove"} & {*found["by step"]}  # inside of it, and not at its end only
    assert found["differ"] == []
    names = {path.relative_to(tmp_path / "killed").as_posix() for path in (tmp_path / "killed").rglob("*")}
    assert {"report.html", "summary.json", "repair/repair.json", "frames/choice.json", "frames/answers.jsonl"} <= names
    assert found["files"] > 80 and not [name for name in names if name.endswith(".part")]
    times = [json.loads(line)["step"] for line in (tmp_path / "killed" / "times.jsonl").read_text().splitlines()]
    assert times.count("diagnose") > 1 and times.count("prove") >= 1  # it was started again and again
