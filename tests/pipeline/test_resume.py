"""A stage that is killed anywhere ends in the same files, and one that is damaged says so or is intact."""

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from care_lens.core.details import DetailedResult
from care_lens.core.errors import ArtifactError, InUseError
from care_lens.core.identity import repair_fingerprint
from care_lens.defences import RefusalDirection
from care_lens.evaluation import GenerationStore, StoredAnswer
from care_lens.mediation.sweep import Part, Sweep, one_cell
from care_lens.pipeline.resume import Stage

SETTINGS = {"settings": {"seed": 0, "limit": None}, "data": "d", "weights": "w"}
NAMES = ("effects.picture", "ablation")


@dataclass(frozen=True)
class Effects(DetailedResult):
    def plot(self) -> go.Figure:
        return go.Figure()


def make(stage: Stage, name: str) -> Effects:
    """A result of five cells, each of which is kept as soon as it is there."""
    sweep = Sweep(stage.checkpoint(name), settings={"name": name, "seed": 0}, probe=[0.5])
    parts = (Part(i, [f"cell {i}"], one_cell(lambda i=i: len(name) / (i + 3))) for i in range(5))
    values = [found for _, (found,) in sweep.run(parts, total=5, desc="", progress=False)]
    details = pd.DataFrame({"pair": range(5), "value": values})
    return Effects(pd.DataFrame({"effect": ["TE"], "value": [sum(values)]}), {"seed": 0}, details)


def job(out: Path) -> float:
    """Two results and a store of answers, in the order of a run; what comes out of it."""
    with Stage(out / "frames", SETTINGS) as stage:
        found = [stage.result(Effects, name, lambda name=name: make(stage, name)) for name in NAMES]
        store = GenerationStore(stage.directory / "answers.jsonl")
        name = store.add_settings({"max_new_tokens": 3})
        for i in range(3):
            row = StoredAnswer("none", "plain", str(i), "g", 0, "how", f"{i}", "", 1, name, "e")
            if store.get(row.key) is None:
                store.add([row])
        return sum(float(one.frame["value"][0]) + one.details["value"].sum() for one in found)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks and the notes of who held them."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith((".lock", ".holder", ".part"))
    }


def killed(out: Path, *, at: int | None = None, torn: int = 0, after: float | None = None) -> bool:
    """Run the job in a process that is killed at its at-th write to the disk (half of its last line lost), or after some seconds."""
    child = os.fork()
    if child == 0:
        count = 0
        reals = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
        for name in reals:

            def stop(*args: object, name=name, **more: object) -> object:
                nonlocal count
                count += 1
                if count == at:
                    if name == "fsync" and torn:
                        handle = args[0]
                        os.ftruncate(handle, max(os.fstat(handle).st_size - torn, 0))
                    os.kill(os.getpid(), signal.SIGKILL)
                return reals[name](*args, **more)

            setattr(os, name, stop)
        try:
            job(out)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module", autouse=True)
def quick_disk():
    """A kill takes nothing that was handed to the kernel, so that nothing has to reach the disk here."""
    real, os.fsync = os.fsync, lambda handle: None
    yield
    os.fsync = real


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return job(out), files(out), out


def test_kills_at_every_write_end_in_the_same_bytes(whole, tmp_path):
    value, expected, _ = whole
    out, at = tmp_path / "run", 0
    while True:
        at += 1
        shutil.rmtree(out, ignore_errors=True)
        if not killed(out, at=at, torn=at % 9):
            break
        assert job(out) == value and files(out) == expected, f"killed at write {at}"
    assert at > 40 and files(out) == expected


def test_a_run_killed_over_and_over_ends_in_the_same_bytes(whole, tmp_path):
    value, expected, _ = whole
    out, rng = tmp_path / "run", random.Random(0)
    for _ in range(30):
        killed(out, at=rng.randint(1, 25), torn=rng.randint(0, 40))
    for _ in range(5):
        killed(out, after=rng.random() * 0.05)
    assert job(out) == value and files(out) == expected


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def _swap(folder: Path, first: str, second: str) -> None:
    for suffix in ("csv", "details.csv", "json"):
        a, b = folder / f"{first}.{suffix}", folder / f"{second}.{suffix}"
        held = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(held)


def _cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def _lines(path: Path, order: list[int]) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))


DAMAGES = {
    "a byte of the frame": lambda f: _flip(f / "ablation.csv", 0.7),
    "a byte of the details": lambda f: _flip(f / "ablation.details.csv", 0.7),
    "a byte of the manifest": lambda f: _flip(f / "ablation.json", 0.5),
    "a byte of the settings": lambda f: _flip(f / "settings.json", 0.5),
    "a byte of the answers": lambda f: _flip(f / "answers.jsonl", 0.5),
    "the frame cut off": lambda f: _cut(f / "ablation.csv", 0.5),
    "the details cut off": lambda f: _cut(f / "ablation.details.csv", 0.3),
    "the manifest cut off": lambda f: _cut(f / "ablation.json", 0.6),
    "the settings cut off": lambda f: _cut(f / "settings.json", 0.6),
    "the settings empty": lambda f: _cut(f / "settings.json", 0),
    "the answers cut off": lambda f: _cut(f / "answers.jsonl", 0.7),
    "the frame gone": lambda f: (f / "ablation.csv").unlink(),
    "the details gone": lambda f: (f / "ablation.details.csv").unlink(),
    "the manifest gone": lambda f: (f / "ablation.json").unlink(),
    "the settings gone": lambda f: (f / "settings.json").unlink(),
    "all of a result gone": lambda f: [path.unlink() for path in f.glob("ablation*")],
    "two results swapped": lambda f: _swap(f, NAMES[0], NAMES[1]),
    "details of another result": lambda f: shutil.copy(f / f"{NAMES[0]}.details.csv", f / f"{NAMES[1]}.details.csv"),
    "a foreign manifest": lambda f: (f / "ablation.json").write_text('{"mine": 1}\n'),
    "foreign answers": lambda f: (f / "answers.jsonl").write_text("my notes\n"),
    "a line of the answers taken out": lambda f: _lines(f / "answers.jsonl", [0, 1, 3, 4]),
    "a line of the answers copied": lambda f: _lines(f / "answers.jsonl", [0, 1, 2, 2, 3, 4]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_stage_says_so_or_is_intact(whole, tmp_path, name):
    value, expected, source = whole
    out = tmp_path / "run"
    shutil.copytree(source, out)
    DAMAGES[name](out / "frames")
    try:
        assert job(out) == value
    except ArtifactError as error:
        assert str(error).count(" ") > 5
        return
    assert files(out) == expected


@pytest.mark.parametrize(
    "damage",
    [lambda path: _flip(path, 0.5), lambda path: _lines(path, [0, 1, 3, 4]), lambda path: path.write_text("notes")],
)
def test_damage_to_what_is_kept_of_a_result_says_so(whole, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(whole[2], out)
    for path in (out / "frames").glob("ablation.[cdj]*s*"):
        if not path.name.endswith("cells.jsonl"):
            path.unlink()
    damage(out / "frames" / "ablation.cells.jsonl")
    with pytest.raises(ArtifactError):
        job(out)


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"data": "e"}, "data"), ({"settings": {"seed": 1, "limit": None}}, "settings.seed"), ({"judge": "x"}, "judge")],
)
def test_another_run_is_refused_and_named(whole, tmp_path, changed, named):
    out = tmp_path / "run"
    shutil.copytree(whole[2], out)
    with pytest.raises(ArtifactError, match=rf"same settings, got others in \['{named}'\]"):
        Stage(out / "frames", {**SETTINGS, **changed})
    assert files(out) == whole[1]


def test_results_of_another_run_are_not_taken_for_this_ones(whole, tmp_path):
    with Stage(tmp_path / "frames", {**SETTINGS, "data": "e"}) as stage:
        for path in (whole[2] / "frames").glob("ablation*"):
            shutil.copy(path, tmp_path / "frames" / path.name)
        with pytest.raises(ArtifactError, match=r"another\s+run or was renamed"):
            stage.result(Effects, "ablation", lambda: make(stage, "ablation"))


def _direction(seed: int = 0) -> RefusalDirection:
    direction = torch.randn(6, generator=torch.Generator().manual_seed(seed))
    candidates = pd.DataFrame({"layer": [1, 2], "position": [-1, -2], "bypass": [1 / 3, 0.5], "kept": [True, False]})
    return RefusalDirection(direction=direction, layer=1, position=-1, candidates=candidates)


def test_defences_and_records_are_made_once_and_read_alike(tmp_path):
    made = []

    def once(what):
        made.append(what)
        return what

    def work() -> tuple[RefusalDirection, object]:
        with Stage(tmp_path / "frames", SETTINGS) as stage:
            found = stage.defence("direction", lambda: once(_direction()), load=RefusalDirection.load)
            return found, stage.record("opened", lambda: once({"value": 0.1 + 0.2, "ci_low": float("nan"), "n": 3}))

    first, second = work(), work()
    assert len(made) == 2
    assert repair_fingerprint(first[0]) == repair_fingerprint(second[0])
    assert torch.equal(second[0].direction, _direction().direction)
    assert second[0].candidates["kept"].tolist() == [True, False]
    assert repr(first[1]) == repr(second[1]) == repr({"value": 0.1 + 0.2, "ci_low": float("nan"), "n": 3})


@pytest.mark.parametrize("damage", [
    lambda f: _direction(1).save(f / "direction"),
    lambda f: (f / "direction" / "defence.json").unlink(),
    lambda f: _flip(f / "direction" / "defence.safetensors", 0.9),
    lambda f: _flip(f / "direction.json", 0.6),
    lambda f: shutil.copy(f / "other.json", f / "direction.json"),
])  # fmt: skip
def test_a_kept_defence_that_is_another_or_damaged_is_refused(tmp_path, damage):
    with Stage(tmp_path / "frames", SETTINGS) as stage:
        stage.defence("direction", _direction, load=RefusalDirection.load)
        stage.record("other", lambda: "text")
        damage(stage.directory)
        with pytest.raises(ArtifactError):
            stage.defence("direction", _direction, load=RefusalDirection.load)


def test_a_kill_between_a_defence_and_its_record_makes_it_again(tmp_path):
    with Stage(tmp_path / "frames", SETTINGS) as stage:
        _direction(1).save(stage.directory / "direction")
        found = stage.defence("direction", _direction, load=RefusalDirection.load)
        assert torch.equal(found.direction, _direction().direction)


def test_what_a_kill_left_of_a_file_is_swept_and_nothing_else(tmp_path):
    with Stage(tmp_path / "frames", SETTINGS) as stage:
        (stage.directory / "learn").mkdir()
        mine = [stage.directory / "learn" / ".notes.part", stage.directory / "a.part"]
        left = [stage.directory / ".a.csv.x_1bcdef.part", stage.directory / "learn" / ".b.json.00000000.part"]
        for path in (*mine, *left):
            path.write_text("half")
    with Stage(tmp_path / "frames", SETTINGS):
        assert all(path.exists() for path in mine) and not any(path.exists() for path in left)


def test_a_folder_of_somebody_elses_files_is_left_alone(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"got notes\.txt and none"):
        Stage(tmp_path / "frames", SETTINGS)
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["notes.txt"]


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    with Stage(tmp_path / "frames", SETTINGS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                Stage(tmp_path / "frames", SETTINGS)
            except InUseError as error:
                status = 0 if f"process {os.getppid()} on " in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(InUseError, match="this process"):
            Stage(tmp_path / "frames", SETTINGS)
    with Stage(tmp_path / "frames", SETTINGS):
        pass
