"""`study`, `evaluate` and `attack`, killed at random moments and started again, end in the same files, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PATHS = [HERE.parents[1], HERE, HERE.parent / "lvlm", HERE.parent / "data", HERE.parent]


def test_commands_that_were_killed_end_in_the_same_bytes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    command = [sys.executable, str(HERE / "killed_commands.py"), str(tmp_path / "all"), "--kills", "3", "--seed", "0"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout
    found = json.loads(ended.stdout.splitlines()[-1])
    assert [*found] == ["study", "evaluate", "attack"]
    for name, one in found.items():
        assert one["differ"] == [] and one["kills"] >= 2 and one["files"] >= 5, (name, one)
        assert not [*(tmp_path / "all" / name / "killed").rglob("*.part")]
