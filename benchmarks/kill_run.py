"""Kills a run of the bundled model at random moments and says whether its files end as those of a run that was left alone.

    python benchmarks/kill_run.py --kills 30 --seed 0
    python benchmarks/kill_run.py --kills 6 --tiny --json figures.json   # what the suite runs

One process runs the four steps and the report, undisturbed, and notes how long each step takes and how often it writes to the disk.
Another process, with another seed of Python's hashes (the same one with ``--tiny``), then starts the same run in another folder, its work shared with copies of it
(``in_workers(2)``), kills it (SIGKILL) and starts it again, until it has been killed so often; at last it is left to finish. Each moment lies in a step that is drawn: after a random share of the time
that the step takes, or at a random one of its writes, of which a part is lost. A start that is past its step before its moment comes, since
most of the step was done, is killed at that border. Both folders must then hold the same files, byte for byte; only locks, the notes of who held
them and ``times.jsonl`` do not count.
"""

import argparse
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from care_lens import organism
from care_lens.core.forked import in_workers
from care_lens.data import Study
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline import RunSettings, run, write_report
from care_lens.pipeline.run import TIMES
from care_lens.pipeline.settings import RIVALS

STEPS = ("diagnose", "learn", "choose", "prove", "report")
SETTINGS = replace(
    RunSettings().short(),
    rivals=RIVALS,
    reader_ranks=(0,),
    candidates=1,
    benign_loss=1.0,
    pgd_steps=2,
    pgd_examples=3,
    printed_alphas=(1.0,),
)
#: As little as a run can be of: every step, every kind of file.
TINY = replace(
    SETTINGS,
    rivals=RIVALS[1:],
    limit=3,
    learn_limit=None,
    pairs=2,
    ablated=1,
    n_boot=20,
    batch_size=8,
    epsilons=(0.5,),
    answer_tokens=1,
    alphas=(1.0,),
    max_new_tokens=5,
    printed_rank=1,
    printed_layers=8,
    random_seeds=1,
    fidelity=2,
    pgd_examples=2,
)
_CHANNELS = ("plain", "typographic", "wrapper", "benign plain", "benign typographic")
_DRAWN = (*_CHANNELS, "spelled")  # which the study of the world must have
UNSEEN = (".lock", ".holder")
_WRITES = ("fsync", "replace", "unlink")


@dataclass(frozen=True)
class Moment:
    """When a run is killed: so many seconds after a step began, or at its write of that number, ``torn`` bytes of which are lost."""

    step: str
    seconds: float | None = None
    write: int = 0
    torn: int = 0


@dataclass(frozen=True)
class Length:
    """How long a step takes, in seconds, and how often it writes to the disk."""

    seconds: float
    writes: int


def small(study: Study) -> Study:
    """The study with few channels and pair sets."""
    suites = {s: {c: e for c, e in channels.items() if c in _CHANNELS} for s, channels in study.suites.items()}
    seen = {m: tuple(c for c in channels if c in _CHANNELS) for m, channels in study.seen.items()}
    pairs = {"picture": study.pairs["picture"]}
    return replace(study, suites=suites, seen=seen, pairs=pairs)


class Runs:
    """Starts runs in processes of their own, forked from this one, which has the model and has run nothing."""

    def __init__(self, *, tiny: bool) -> None:
        torch.set_num_threads(1)  # numbers do not depend on how work is shared, and a fork leaves no thread behind
        self._lvlm: HookedLVLM = organism.load()
        study = organism.study(only=_DRAWN if tiny else None)
        self._study, self._settings = (small(study), TINY) if tiny else (study, SETTINGS)

    def start(self, out: Path, moment: Moment | None = None, *, workers: int = 1) -> tuple[str, dict[str, Length]]:
        """One start of the run in a folder: where it was killed ("" if it was not), and the lengths of the steps that it came to."""
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.close(reading)
                with in_workers(workers):
                    self._work(out, moment, lambda line: os.write(writing, f"{line}\n".encode()))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as told:
            step, lengths = _watched(child, told.fileno(), moment)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
            raise RuntimeError("a run must end well or be killed, got an error; it stands above")
        return step if os.WIFSIGNALED(status) else "", lengths

    def _work(self, out: Path, moment: Moment | None, tell: Callable[[str], object]) -> None:
        counts = Counter[str]()
        step = "start"

        def enter(name: str) -> None:
            nonlocal step
            tell(f"{name} {counts[step]}")
            step = name

        for name in _WRITES:
            _counted(name, counts, lambda: step, moment)
        handler = logging.Handler()
        handler.emit = lambda record: enter(str(record.args[0])) if record.msg == "%s begins" else None  # type: ignore[index]
        steps = logging.getLogger("care_lens.pipeline.run")
        steps.addHandler(handler)
        steps.setLevel(logging.INFO)
        steps.propagate = False
        result = run(self._lvlm, self._study, out, model="bundled", settings=self._settings, progress=False)
        enter("report")
        write_report(result, out)
        enter("end")


def _counted(name: str, counts: Counter[str], step: Callable[[], str], moment: Moment | None) -> None:
    """Count calls of a function of os that writes, and kill this process at one of them, or at one of a copy that works for it."""
    real, run_itself = getattr(os, name), os.getpid()

    def call(*args: object, **options: object) -> object:
        counts[step()] += 1
        if moment is not None and moment.write and (moment.step, moment.write) == (step(), counts[step()]):
            if name == "fsync" and isinstance(handle := args[0], int):
                os.ftruncate(handle, max(os.fstat(handle).st_size - moment.torn, 0))
            os.kill(run_itself, signal.SIGKILL)
            time.sleep(60)  # a copy ends with it
        # A kill takes nothing that was handed to the kernel, so that nothing has to reach the disk here.
        return None if name == "fsync" else real(*args, **options)

    setattr(os, name, call)


def _watched(child: int, told: int, moment: Moment | None) -> tuple[str, dict[str, Length]]:
    """Follow a run through its steps and kill it at its moment, or at the end of that step: where it ended, "prove" or "end of prove"."""
    lengths: dict[str, Length] = {}
    step, began, text = "start", time.monotonic(), b""
    while True:
        wait = None
        if moment is not None and moment.step == step and moment.seconds is not None:
            wait = max(began + moment.seconds - time.monotonic(), 0.0)
        if not select.select([told], [], [], wait)[0]:
            os.kill(child, signal.SIGKILL)
            return step, lengths
        if not (some := os.read(told, 4096)):
            return step, lengths
        text += some
        while b"\n" in text:
            line, _, text = text.partition(b"\n")
            name, _, writes = line.decode().rpartition(" ")
            lengths[step] = Length(time.monotonic() - began, int(writes))
            if moment is not None and moment.step == step:
                os.kill(child, signal.SIGKILL)
                return f"end of {step}", lengths
            step, began = name, time.monotonic()


def moments(kills: int, seed: int, lengths: dict[str, Length]) -> list[Moment]:
    """Random moments, in the order of the steps: every step has some, prove and choose the most.

    Each start goes on where the last was killed, so that of several in a step each comes after a share of it only.
    """
    rng = random.Random(seed)
    steps = [STEPS[i % len(STEPS)] for i in range(min(kills, len(STEPS)))]
    steps += rng.choices(STEPS, weights=(2, 1, 3, 4, 1), k=kills - len(steps))
    found = []
    for step in sorted(steps, key=STEPS.index):
        share = min(2 / steps.count(step), 1.0)
        if step == "report" or rng.random() < 0.5:  # the last step has no border after it
            found.append(
                Moment(step, write=rng.randint(1, max(int(share * lengths[step].writes), 1)), torn=rng.randint(0, 40))
            )
        else:
            found.append(Moment(step, seconds=rng.random() * share * lengths[step].seconds))
    return found


def files(out: Path) -> dict[str, bytes]:
    """Every file of a run but locks, the notes of who held them, and the times."""
    found = (path for path in out.rglob("*") if path.is_file() and not path.name.endswith((*UNSEEN, TIMES)))
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def whole(runs: Runs, folder: Path) -> None:
    """The run that is left alone; the lengths of its steps are written beside its folder."""
    out = folder / "whole"
    _, lengths = runs.start(out)
    held = {step: [length.seconds, length.writes] for step, length in lengths.items()}
    out.with_suffix(".lengths").write_text(json.dumps(held), encoding="utf-8")


def killed(runs: Runs, folder: Path, *, kills: int, seed: int) -> None:
    """The run that is killed; where it was is written beside its folder."""
    held = json.loads((folder / "whole.lengths").read_text(encoding="utf-8"))
    out, by_step = folder / "killed", Counter[str]()
    for moment in moments(kills, seed, {step: Length(*length) for step, length in held.items()}):
        # Copies learn while the run diagnoses: a kill in that step is one of a run that does all by itself.
        by_step[runs.start(out, moment, workers=1 if moment.step == "learn" else 2)[0]] += 1
    runs.start(out, workers=2)
    out.with_suffix(".kills").write_text(json.dumps(by_step), encoding="utf-8")


def _part(name: str, folder: Path, options: argparse.Namespace, hashes: int) -> None:
    """One of the two, in a process of its own."""
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    command += ["--kills", str(options.kills), "--seed", str(options.seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hashes)}
    subprocess.run(command, env=environment, check=True)


def compare(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Run, kill, compare."""
    began = time.monotonic()
    if options.tiny:
        runs = Runs(tiny=True)
        whole(runs, folder)
        killed(runs, folder, kills=options.kills, seed=options.seed)
    else:
        _part("whole", folder, options, 1)
        _part("killed", folder, options, 2)
    one, other = files(folder / "whole"), files(folder / "killed")
    by_step = json.loads((folder / "killed.kills").read_text(encoding="utf-8"))
    by_step.pop("", None)
    return {
        "kills": sum(by_step.values()),
        "by step": by_step,
        "files": len(one),
        "differ": sorted(name for name in {*one, *other} if one.get(name) != other.get(name)),
        "seconds": round(time.monotonic() - began),
        "lengths": json.loads((folder / "whole.lengths").read_text(encoding="utf-8")),
    }


def main() -> int:
    """Run, kill, compare; 1 if a file differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="as little as a run can be of")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--folder", type=Path, help="where both runs are kept; default: nowhere")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "whole":
        whole(Runs(tiny=False), options.folder)
        return 0
    if options.part == "killed":
        killed(Runs(tiny=False), options.folder, kills=options.kills, seed=options.seed)
        return 0
    with tempfile.TemporaryDirectory() as made:
        found = compare(options.folder or Path(made), options)
    text = json.dumps(found, indent=1)
    sys.stdout.write(f"{text}\n")
    if options.json is not None:
        options.json.write_text(f"{text}\n", encoding="utf-8")
    return int(bool(found["differ"]))


if __name__ == "__main__":
    sys.exit(main())
