"""Kills `study`, `evaluate` and `attack` at random moments and says whether their files end as those of commands that were left alone.

    python killed_commands.py FOLDER --kills 3 --seed 0

Files in published formats and a tiny LLaVA are written to the folder. Each command runs undisturbed, in a process forked from this one. Then
it is started in another folder and killed (SIGKILL) at random ones of its writes, of which a part is lost, and once after a random share of
its time; at last it is left to finish. The last line is JSON: kills, files and files that differ, by command.
"""

import argparse
import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import plotly.graph_objs
import plotly.io
import torch
from test_benchmark_study import write_benchmarks
from zoo.tiny import make_llava

from care_lens import cli, pipeline, plots
from care_lens.defences import SelfReminder

UNSEEN = (".lock", ".holder")
#: What the commands import when they need it; each start would import it again.
IMPORTED = (pipeline, plots, plotly.io, plotly.graph_objs.Figure, plotly.graph_objs.Scatter)
WRITES = ("fsync", "replace", "unlink")


def counted(kill_at: int, torn: int) -> list[int]:
    """Count the writes of this process, and kill it at one of them; 0: at none."""
    seen = [0]
    for name in WRITES:
        real = getattr(os, name)

        def call(*args, real=real, name=name, **options):
            seen[0] += 1
            if seen[0] == kill_at:
                if name == "fsync" and isinstance(args[0], int):
                    os.ftruncate(args[0], max(os.fstat(args[0]).st_size - torn, 0))
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else real(*args, **options)

        setattr(os, name, call)
    return seen


def started(words: list[str], log: Path, *, write: int = 0, torn: int = 0, seconds: float | None = None):
    """One start of a command: whether it was killed, its seconds and its writes."""
    began = time.monotonic()
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            with log.open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            seen = counted(write, torn)
            if cli.app(words, standalone_mode=False):
                raise RuntimeError("the command was refused")
            os.write(writing, str(seen[0]).encode())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    while os.waitpid(child, os.WNOHANG) == (0, 0) if seconds is not None else False:
        if time.monotonic() - began > seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True, seconds, 0
        time.sleep(0.01)
    if seconds is None:
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status) and status:
            raise RuntimeError(f"{words} must end well or be killed:\n{log.read_text()[-3000:]}")
    with os.fdopen(reading, "rb") as told:
        writes = told.read()
    return not writes, time.monotonic() - began, int(writes or 0)


def files(out: Path) -> dict[str, bytes]:
    """Every file but locks and the notes of who held them."""
    found = (path for path in out.rglob("*") if path.is_file() and not path.name.endswith(UNSEEN))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def killed(words: list[str], folder: Path, kills: int, draws: random.Random) -> dict[str, object]:
    """A command left alone and the same one killed: how often, how many files, which of them differ."""
    folder.mkdir()
    log = folder / "log"
    _, seconds, writes = started([*words, "--out", str(folder / "whole")], log)
    done, asked = 0, [*words, "--out", str(folder / "killed")]
    for k in range(kills):
        share = 2 / kills  # each start goes on where the last was killed
        moment = (
            {"write": draws.randint(1, max(int(share * writes), 1)), "torn": draws.randint(0, 40)}
            if k < kills - 1 or kills == 1
            else {"seconds": draws.uniform(0.1, 0.6) * seconds}
        )
        done += started(asked, log, **moment)[0]
    started(asked, log)
    one, other = files(folder / "whole"), files(folder / "killed")
    differ = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    return {"kills": done, "writes": writes, "seconds": round(seconds, 1), "files": len(one), "differ": differ}


def main() -> None:
    """Write the inputs, kill the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    root, draws = options.folder, random.Random(options.seed)
    torch.set_num_threads(1)
    sources = write_benchmarks(root / "files")
    model, processor = make_llava()
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    SelfReminder(before="sorry", after="").save(root / "reminder")
    gc.freeze()  # or the first collection of each start copies all of it
    common = ["--model", str(root / "model"), "--batch-size", "4", "--threads", "1", "--max-new-tokens", "3"]
    on = [str(root / "reminder"), "--study", str(root / "study" / "whole"), *common]
    words = ["--comply", "sure,yes", "--refuse", "sorry,no", "--pairs", "4", "--name", "mine"]
    by = ["--by", "pgd:steps=2,epsilon=16", "--by", "bestofn:n=2", "--channels", "figstep", "--n", "3"]
    found = {
        "study": killed(["study", *sources, *common, *words], root / "study", options.kills, draws),
        "evaluate": killed(["evaluate", *on], root / "evaluate", options.kills, draws),
        "attack": killed(["attack", *on, *by, "--benign", "2"], root / "attack", options.kills, draws),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
