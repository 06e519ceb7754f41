"""A piece of code in a Python process of its own, for benches whose settings must stand before torch is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_THREADS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def measured(code: str, *arguments: object, policy: str | None = None) -> dict[str, Any]:
    """What the code prints as JSON in its last line.

    Args:
        code: Python; it measures itself.
        *arguments: Its ``sys.argv``.
        policy: OpenMP's waiting policy; None: the system's, as the numbers of threads are.

    Raises:
        SystemExit: If the process does not end well, with the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _THREADS}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the measured process must end well, got:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
