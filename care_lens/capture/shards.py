"""Finished batches of a capture, kept in a directory, so that a run that was stopped goes on from them."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from care_lens.capture.activations import Activations
from care_lens.capture.pooling import PooledRun

_SETTINGS = "capture.json"
_TOLERANCE = 1e-3


def check_settings(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a checkpoint is there already; if not, its settings are written.

    Raises:
        ValueError: If it is of other settings.
    """
    ours = json.loads(json.dumps(settings))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(ours, indent=2) + "\n")
        return False
    theirs = json.loads(path.read_text(encoding="utf-8"))
    if theirs != ours:
        differ = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
        raise ValueError(
            f"checkpoint must be of the same capture, {path.parent} differs in {differ}; use another directory"
        )
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def require_same(found: Activations, again: Activations, directory: Path) -> None:
    """Refuse a checkpoint whose numbers this model does not give: single weights and hook functions escape the settings.

    Raises:
        ValueError: If a batch that was captured again differs by more than 1e-3, relative to its largest number.
    """
    for key, rows in again.values.items():
        other = found.values[key]
        scale = float(rows.nan_to_num().abs().max()) if rows.numel() else 0.0
        if rows.shape != other.shape or not torch.allclose(
            rows, other, rtol=0, atol=_TOLERANCE * scale, equal_nan=True
        ):
            raise ValueError(
                f"checkpoint must be of the same model, {directory} holds other activations at {key[0]}; use another directory"
            )


class Shards:
    """The batches of a run, from the directory where it has them.

    Args:
        directory: Made if it does not exist; None: nothing is kept.
        run: What is captured. If the directory holds a batch already, the first is captured again and compared.

    Raises:
        ValueError: If the directory is of another capture or model.
    """

    def __init__(self, directory: str | Path | None, run: PooledRun) -> None:
        self._run, self._directory = run, None if directory is None else Path(directory)
        if self._directory is None:
            return
        check_settings(self._directory / _SETTINGS, run.settings())
        first = run.batches()[0]
        if self._is_there(self._directory, first):
            require_same(Activations.load(self._directory, _name(first)), run.activations(first), self._directory)

    def activations(self, batch: range) -> Activations:
        """The batch, captured if it was not yet."""
        if self._directory is None:
            return self._run.activations(batch)
        if self._is_there(self._directory, batch):
            return Activations.load(self._directory, _name(batch))
        captured = self._run.activations(batch)
        captured.save(self._directory, "part")
        for suffix in ("safetensors", "json"):
            os.replace(self._directory / f"part.{suffix}", self._directory / f"{_name(batch)}.{suffix}")
        return captured

    @staticmethod
    def _is_there(directory: Path, batch: range) -> bool:
        """The manifest is the last to be moved: where it is, the batch is whole."""
        return (directory / f"{_name(batch)}.json").exists()


def _name(batch: range) -> str:
    return f"batch_{batch.start:08d}"
