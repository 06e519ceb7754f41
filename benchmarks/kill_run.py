"""Kills a run of the bundled model at random moments and says whether its files end as those of a run that was left alone.

    python benchmarks/kill_run.py --kills 30 --seed 0

A run is started as a process of its own and killed (SIGKILL) after a random time, again and again in one folder, until it has been
killed so often; then it is left to finish. Moments are drawn over the time that a whole run takes, and each further start begins where
the last was killed, so that they fall into every step. The suite's tests kill at every single write instead
(tests/pipeline/test_resume.py, tests/mediation/test_checkpoints.py), on work that takes no time.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from care_lens import organism
from care_lens.pipeline import RunSettings, run

SETTINGS = replace(
    RunSettings().short(),
    reader_ranks=(0,),
    candidates=1,
    benign_loss=1.0,
    pgd_steps=2,
    pgd_examples=3,
    printed_alphas=(1.0,),
)
UNSEEN = (".lock", ".holder", ".part")


def job(out: Path) -> None:
    """One run, from wherever its folder stands."""
    with organism.load() as lvlm:
        run(lvlm, organism.study(), out, model="bundled", settings=SETTINGS, progress=False)


def files(out: Path) -> dict[str, bytes]:
    """Every file of a run but locks and what a kill has left of a file that was being written."""
    found = (path for path in out.rglob("*") if path.is_file() and not path.name.endswith(UNSEEN))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def start(out: Path) -> "subprocess.Popen[bytes]":
    """A run in a process of its own, on one thread, so that its numbers do not depend on how work is shared."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, "--job", str(out)], env=environment)


def main() -> int:
    """Run, kill, compare; 1 if a file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job is not None:
        job(options.job)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        began = time.monotonic()
        if start(whole).wait():
            raise RuntimeError("the run that was left alone must end well, got an error; see above")
        took, rng, kills = time.monotonic() - began, random.Random(options.seed), 0
        sys.stdout.write(f"a whole run takes {took:.0f} s\n")
        while kills < options.kills:
            process = start(killed)
            try:
                if process.wait(timeout=rng.uniform(0.05, 0.5) * took):
                    raise RuntimeError("a run that goes on must end well, got an error; see above")
                break  # it was done before it could be killed
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        if start(killed).wait():
            raise RuntimeError("the last run must end well, got an error; see above")
        one, other = files(whole), files(killed)
        differ = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
        sys.stdout.write(f"{kills} kills; {len(one)} files, {len(differ)} differ {differ}\n")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
