"""What a command refuses before torch and the rest are imported, which takes some ten seconds: mistakes are told at once."""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
#: Where a model may lie: placements of accelerate, and the devices that need no look at this machine.
_PLACES = ("auto", "balanced", "balanced_low_0", "sequential", "cpu", "meta")


def require_dtype(dtype: str | None) -> None:
    """Refuse another dtype than those of weights."""
    if dtype not in (None, *DTYPES):
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")


def require_quantization(quantization: str | None) -> None:
    """Refuse another quantisation than those of bitsandbytes, and either where that is not installed."""
    if quantization is None:
        return
    if quantization not in QUANTIZATIONS:
        raise typer.BadParameter(f"--quantization must be 4bit or 8bit, got {quantization!r}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise typer.BadParameter("--quantization needs bitsandbytes, which is not installed: pip install bitsandbytes")


def require_device(device: str | None) -> None:
    """Refuse a device that this machine has not."""
    if device is None or device in _PLACES:
        return
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise typer.BadParameter(f"--device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise typer.BadParameter(f"--device {device} needs a GPU of that number, this machine has {there}; take cpu")
    there_is = {"mps": torch.backends.mps.is_available, "xpu": torch.xpu.is_available}
    if found.type in there_is and not there_is[found.type]():
        raise typer.BadParameter(f"--device {device} needs such a device, which torch does not find here; take cpu")


def require_bundled_alone(model: str, **others: Any) -> None:
    """Refuse options that go with a model of one's own, by their names, beside the bundled one."""
    if model == "bundled" and any(value is not None for value in others.values()):
        names = " and ".join(f"--{name}" for name in others)
        raise typer.BadParameter(f"{names} go with a model of your own, not the bundled one")


def require_study(model: str, data: Path | None, judge: str | None) -> None:
    """Refuse a model of one's own without a study, an incomplete study, and a judge beside the bundled study, which brings its own."""
    if data is None:
        if model != "bundled":
            raise typer.BadParameter(
                "--study must be given for a model that is not bundled; see the docs page on studies"
            )
        if judge is not None:
            raise typer.BadParameter(
                "--judge goes with a --study of your own; that of the bundled model brings its judge"
            )
        return
    if not (data / "study.json").is_file() or not (data / "examples.jsonl").is_file():
        raise typer.BadParameter(
            f"--study must be a folder with examples.jsonl and study.json, got {data}, which is not"
        )


def require_judge(judge: str | None) -> None:
    """Refuse a judge whose name has no module, or one that is not there; the module is imported later."""
    if judge is None:
        return
    module, _, attribute = judge.partition(":")
    top = module.partition(".")[0]
    known = _importable(top)
    if not attribute or not known:
        why = "" if known else f" (there is no module {top!r} on Python's path)"
        raise typer.BadParameter(f"--judge must be 'module:name' of an object that can be imported, got {judge!r}{why}")


def require_module(module: str, option: str) -> None:
    """Refuse a module that is not there."""
    if not _importable(module.partition(".")[0]):
        raise typer.BadParameter(
            f"{option} must name a module on Python's path, got {module!r}; for one in this folder set PYTHONPATH=."
        )


def _importable(top: str) -> bool:
    return top.isidentifier() and (top in sys.modules or importlib.util.find_spec(top) is not None)


def require_defences(texts: Sequence[str]) -> None:
    """Refuse folders, each as PATH or NAME=PATH, that hold no saved defence; what they hold is read later."""
    for text in texts:
        _, equals, path = text.partition("=")  # as pipeline.saved reads it, whose import would bring torch
        folder = Path(path) if equals and not Path(text).is_dir() else Path(text)
        manifest = next((folder / name for name in ("defence.json", "repair.json") if (folder / name).is_file()), None)
        if manifest is None:
            raise typer.BadParameter(
                f"a defence must be a folder with repair.json or defence.json, as `care-lens fit` and .save() write them, got {folder}"
            )
        _require_undamaged(manifest)


def _require_undamaged(manifest: Path) -> None:
    """Refuse a manifest that is no JSON object, or whose data files are not there or not those that it describes.

    Its own sum and what it means are checked when it is loaded.
    """
    try:
        held = json.loads(manifest.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{manifest} is damaged: it must be JSON ({error}); copy or make it again") from None
    if not isinstance(held, dict):
        raise typer.BadParameter(f"{manifest} is damaged: it must hold a JSON object, got {type(held).__name__}")
    described = held.get("files")
    for suffix, expected in described.items() if isinstance(described, dict) else ():
        part = manifest.with_name(f"{manifest.stem}.{Path(str(suffix)).name}")
        if not part.is_file():
            raise typer.BadParameter(f"{part} must be there, {manifest.name} describes it; copy all files of it again")
        if hashlib.sha256(part.read_bytes()).hexdigest() != expected:
            raise typer.BadParameter(
                f"{part} is damaged: it is not the file that {manifest.name} describes; copy all files of it again, or make it again"
            )


def require_processes() -> int:
    """How many processes share the command; refuses an environment that does not say which of them this is.

    :class:`care_lens.core.processes.Process` reads the same; it cannot be imported without torch.
    """
    held = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if held["RANK"] is None and held["WORLD_SIZE"] is None:
        return 1
    try:
        rank, world = int(held["RANK"] or ""), int(held["WORLD_SIZE"] or "")
        local = int(held["LOCAL_RANK"] if held["LOCAL_RANK"] is not None else rank)
    except ValueError:
        rank, world, local = -1, 0, 0
    if not 0 <= rank < world or local < 0:
        raise typer.BadParameter(
            f"RANK must be from 0 to below WORLD_SIZE, and LOCAL_RANK 0 or more, got {held}; start the command with torchrun or "
            "accelerate launch, which set them, or take them out of the environment"
        )
    return world


def require_one_process(command: str) -> None:
    """Refuse a command of one process that torchrun or accelerate has started several times."""
    if (world := require_processes()) > 1:
        raise typer.BadParameter(
            f"`{command}` must run in one process, got {world}; start `study`, `evaluate` or `reproduce` with several, and this one alone "
            "(--device auto spreads a model over the GPUs)"
        )


def require_recipe(recipe: str) -> None:
    """Refuse what is neither a recipe of the package nor a file."""
    here = files("care_lens") / "pipeline" / "recipes"
    known = sorted(Path(path.name).stem for path in here.iterdir() if path.name.endswith(".yaml"))
    if recipe not in known and not Path(recipe).is_file():
        raise typer.BadParameter(f"recipe must be one of {known} or a yaml file, got {recipe!r}, which is neither")
