"""Finished batches of a capture, kept in a directory, so that a run that was stopped goes on from them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from care_lens.capture.activations import Activations
from care_lens.capture.pooling import PooledRun
from care_lens.core.errors import ArtifactError
from care_lens.core.files import in_use, load_artifact, save_artifact
from care_lens.core.identity import digest
from care_lens.core.journal import differing

_SETTINGS = "capture"
_KIND = "capture settings"
_TOLERANCE = 1e-3


def check_settings(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether a checkpoint is in a directory already; if not, its settings are written.

    Raises:
        ArtifactError: If it is of other settings, its settings are damaged, or the directory holds files but no settings.
    """
    ours = json.loads(json.dumps(settings))
    path = directory / f"{_SETTINGS}.json"
    if not path.exists():
        if others := sorted(part.name for part in directory.glob("*") if not part.name.startswith(".")):
            raise ArtifactError(
                f"checkpoint must be an empty directory or one of a capture, {directory} holds {others[0]} and no {path.name}; use "
                "another directory"
            )
        save_artifact(directory, _SETTINGS, kind=_KIND, schema=1, data={}, content={"settings": ours})
        return False
    _, content = load_artifact(directory, _SETTINGS, kind=_KIND, schema=1)
    if differ := differing(ours, content["settings"]):
        raise ArtifactError(
            f"checkpoint must be of the same capture, {directory} differs in {differ}; use another directory"
        )
    return True


def require_same(found: Activations, again: Activations, directory: Path) -> None:
    """Refuse a checkpoint whose numbers this model does not give: single weights and hook functions escape the settings.

    Raises:
        ArtifactError: If a batch that was captured again differs by more than 1e-3, relative to its largest number.
    """
    for key, rows in again.values.items():
        other = found.values[key]
        scale = float(rows.nan_to_num().abs().max()) if rows.numel() else 0.0
        if rows.shape != other.shape or not torch.allclose(
            rows, other, rtol=0, atol=_TOLERANCE * scale, equal_nan=True
        ):
            raise ArtifactError(
                f"checkpoint must be of the same model, {directory} holds other activations at {key[0]}; use another directory"
            )


class Shards:
    """The batches of a run, from the directory where it has them.

    Args:
        directory: Made if it does not exist; None: nothing is kept.
        run: What is captured. If the directory holds a batch already, the first is captured again and compared.

    Raises:
        ArtifactError: If the directory is of another capture or model, or a file in it is damaged.
    """

    def __init__(self, directory: str | Path | None, run: PooledRun) -> None:
        self._run, self._directory = run, None if directory is None else Path(directory)
        if self._directory is None:
            return
        self._of = digest(run.settings())
        check_settings(self._directory, run.settings())
        first = run.batches()[0]
        if self._is_there(self._directory, first):
            require_same(self._load(self._directory, first), run.activations(first), self._directory)

    def activations(self, batch: range) -> Activations:
        """The batch, captured if it was not yet.

        Raises:
            ArtifactError: If its file is damaged, or is that of another batch or capture.
        """
        if self._directory is None:
            return self._run.activations(batch)
        if self._is_there(self._directory, batch):
            return self._load(self._directory, batch)
        captured = self._run.activations(batch)
        replace(captured, provenance={**captured.provenance, **self._shard(batch)}).save(self._directory, _name(batch))
        return captured

    def _load(self, directory: Path, batch: range) -> Activations:
        """A batch from its file, which must say that it is that one."""
        held, shard = Activations.load(directory, _name(batch)), self._shard(batch)
        if {name: held.provenance.get(name) for name in shard} != shard:
            raise ArtifactError(
                f"{directory / _name(batch)}.json must hold examples {batch.start} to {batch.stop} of this capture, got those of "
                f"another file; remove it, and it is captured again"
            )
        return replace(held, provenance=self._run.provenance())

    def _shard(self, batch: range) -> dict[str, Any]:
        return {"batch": [batch.start, batch.stop], "capture": self._of}

    @staticmethod
    def _is_there(directory: Path, batch: range) -> bool:
        """The manifest is the last to be written: where it is, the batch is whole."""
        return (directory / f"{_name(batch)}.json").exists()


@contextmanager
def held(directory: str | Path | None) -> Iterator[None]:
    """Keep a checkpoint's directory to this process for a ``with`` block.

    Raises:
        InUseError: If another process works there.
    """
    if directory is None:
        yield
        return
    with in_use(directory):
        yield


def _name(batch: range) -> str:
    return f"batch_{batch.start:08d}"
