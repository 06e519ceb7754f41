"""Wrong arguments of the public API end in an error that the package raises itself: none obscure, none accepted in silence.

`calls.py` makes the calls, in an interpreter without the type checks of the tests. `open.txt` names the calls that do not end so, one JSON text a
line: those that turned out to be right (a count of tokens given as a number, None for an option that may be None), and those still to be
mended. None may be added.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("core", "data", "evaluation", "subspace", "repair", "attack", "lvlm", "capture")


def test_wrong_arguments_end_in_clear_errors():
    done = subprocess.run(
        [sys.executable, str(HERE / "calls.py"), *PARTS],
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={
            **{k: v for k, v in os.environ.items() if k != "CARE_LENS_UNCHECKED"},
            "PYTHONPATH": str(HERE.parents[1]),
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    still_open = set(map(json.loads, (HERE / "open.txt").read_text(encoding="utf-8").splitlines()))
    fates = Counter(call["fate"] for call in made)
    assert len({call["call"] for call in made}) == len(made) and fates["clear"] >= 1150
    wrong = [call for call in made if call["fate"] != "clear" and call["call"] not in still_open]
    assert not wrong, json.dumps(wrong[:20], indent=1)
