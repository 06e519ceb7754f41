"""Moments of a stream of examples: what subspaces are fitted to, when the rows are too many to keep.

Each batch is pooled as :func:`~care_lens.capture.capture` does, and added to a table of moments a site and selection:
means, scatters and the sums that shrinkage needs, by fold of items, class and modality. Rows are kept only where they are fewer than
the width (``keep="auto"``), so that memory does not grow with the stream.
"""

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_lens.capture.activations import Activations, Key
from care_lens.capture.attribution import TokenAttribution
from care_lens.capture.pooling import PooledRun
from care_lens.capture.shards import check_settings, held, require_same
from care_lens.core import BaseOutcome, Example, Outcome, SiteLike
from care_lens.core.errors import ArtifactError
from care_lens.core.files import load_artifact, save_artifact, sha256
from care_lens.core.progress import Steps, resume_from
from care_lens.core.renames import renamed
from care_lens.lvlm import HookedLVLM
from care_lens.subspace import MomentsTable
from care_lens.subspace.memory import Keep, plan_memory

logger = logging.getLogger(__name__)

_PROGRESS = "capture progress"


def modality_of(key: Key) -> str:
    """ "visual" for sites of the vision tower and the projector and for image tokens, else "textual"."""
    site, name = key
    return "visual" if site.tower != "language" or name.startswith("image") else "textual"


@renamed(select="positions")
def capture_moments(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[SiteLike],
    *,
    label: str | Sequence[str],
    positions: Sequence[str] = ("image", "text"),
    folds: int = 4,
    keep: Keep = "auto",
    seed: int = 0,
    attribution: TokenAttribution | None = None,
    outcome: Outcome | BaseOutcome | None = None,
    responses: bool = False,
    batch_size: int = 32,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    save_seconds: float = 60.0,
) -> dict[Key, MomentsTable]:
    """Moments of pooled activations, streamed.

    Args:
        lvlm: The model; a repair that is on it acts.
        examples: The examples; with and without images can be mixed. Those that lack a selection's positions add nothing to it.
        sites: The sites, of any tower.
        label: The class of the examples, or of each: "benign", or a family of attacks.
        positions: What to pool over, as for :func:`~care_lens.capture.capture`.
        folds: Folds of items (``Example.group``), any of which can be left out of a fit.
        keep: "auto" keeps rows while they are fewer than the width, then sums; "rows", "sums".
        seed: Of the folds.
        attribution: Of attributed selections.
        outcome: What its method "gradient" differentiates.
        responses: Whether to append the examples' responses, teacher-forced.
        batch_size: Examples a forward pass.
        progress: Whether to show a progress bar.
        checkpoint: A directory in which the tables are kept every ``save_seconds``, and at the end; a run that was stopped goes on
            from them.
        save_seconds: Least time between two saves.

    Returns:
        A table by site and selection, whose modality is "visual" for image tokens and the vision tower, else "textual". Tables of
        several calls (shards, classes) are joined by ``MomentsTable.merge``; a fit takes ``table.total(label, modality)``.

    Raises:
        ValueError: As :func:`~care_lens.capture.capture`; or if labels are not as many as the examples, or the checkpoint is of
            another capture or model or damaged.
        InUseError: If another process works in the checkpoint.
        SubspaceError: If folds or keep are out of range, or an activation is NaN or infinite.

    Example:
        >>> from care_lens import SafetySubspace, organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> both = organism.examples("benign plain", "fit", n=8) + organism.examples("typographic", "fit", n=8)
        >>> labels = ["benign"] * 8 + ["malicious"] * 8
        >>> tables = capture_moments(
        ...     lvlm, both, ["blocks.1.hook_resid_post"], label=labels, positions=("last",), progress=False
        ... )
        >>> (table,) = tables.values()
        >>> [table.total(name, "textual").count for name in ("benign", "malicious")]
        [8, 8]
    """
    run = PooledRun.of(
        lvlm, examples, sites, positions=positions, attribution=attribution, outcome=outcome, responses=responses,
        batch_size=batch_size,
    )  # fmt: skip
    labels = [label] * len(run.examples) if isinstance(label, str) else list(label)
    if len(labels) != len(run.examples):
        raise ValueError(f"label must be one word or one an example, {len(run.examples)}, got {len(labels)}")
    tables = {key: MomentsTable(lvlm.width(key[0]), folds=folds, keep=keep, seed=seed) for key in run.keys}
    _say_plan(tables, labels, folds, keep)
    about = {"folds": folds, "keep": keep, "seed": seed}
    return stream(
        run,
        run.batches(),
        tables,
        labels=labels,
        about=about,
        progress=progress,
        checkpoint=checkpoint,
        save_seconds=save_seconds,
    )


def stream(
    run: PooledRun,
    batches: Sequence[range],
    tables: dict[Key, MomentsTable],
    *,
    labels: Sequence[str],
    about: Mapping[str, Any],
    progress: bool,
    checkpoint: str | Path | None,
    save_seconds: float,
) -> dict[Key, MomentsTable]:
    """Add some of the batches of a run to tables; see :func:`capture_moments`.

    Args:
        run: The model, the examples and what is pooled.
        batches: Which of its batches, one at least.
        tables: Empty ones, which are filled.
        labels: The class of each example of the run.
        about: What else the tables depend on, JSON-able.
        progress: Whether to show a progress bar.
        checkpoint: Where the tables are kept.
        save_seconds: Least time between two saves.

    Raises:
        ArtifactError: If the checkpoint is of another capture or model, or damaged.
        InUseError: If another process works in the checkpoint.
    """
    with held(checkpoint):
        kept = _Kept(checkpoint, run, batches[0], {"labels": list(labels), **about})
        done = kept.resume(tables)
        saved = time.monotonic()
        with Steps(batches, desc="capturing", disable=not progress, resume=resume_from(checkpoint)) as steps:
            for number, batch in enumerate(steps):
                if number < done:
                    continue
                _add(tables, run.activations(batch), [labels[i] for i in batch])
                if number + 1 == len(batches) or time.monotonic() - saved >= save_seconds:
                    kept.save(tables, number + 1)
                    saved = time.monotonic()
    return tables


def _add(tables: Mapping[Key, MomentsTable], batch: Activations, labels: Sequence[str]) -> None:
    for key, table in tables.items():
        present = batch.present[key]
        for label in dict.fromkeys(labels):
            index = [i for i, name in enumerate(labels) if name == label and bool(present[i])]
            groups = [batch.groups[i] for i in index]
            table.update(batch.values[key][index], label=label, modality=modality_of(key), groups=groups)


def _say_plan(tables: Mapping[Key, MomentsTable], labels: Sequence[str], folds: int, keep: Keep) -> None:
    """Log what all tables will take at most, before anything runs."""
    counts = {
        f"{name} fold {fold}": -(-labels.count(name) // folds)
        for name in dict.fromkeys(labels)
        for fold in range(folds)
    }
    widths = [table.width for table in tables.values()]
    for width in dict.fromkeys(widths):
        logger.info("%s", plan_memory(width, counts, sites=widths.count(width), keep=keep))


class _Kept:
    """Tables in a directory: a folder a save, and a file that says which is whole and what it holds."""

    def __init__(self, directory: str | Path | None, run: PooledRun, first: range, more: dict[str, Any]) -> None:
        self._run, self._directory, self._there = run, None if directory is None else Path(directory), False
        self._first = first
        if self._directory is not None:
            self._there = check_settings(self._directory, {**run.settings(), **more})

    def resume(self, tables: dict[Key, MomentsTable]) -> int:
        """Fill the tables with what is there; the number of batches they hold.

        Raises:
            ArtifactError: If a file is damaged, or is not the one that was saved.
        """
        if self._directory is None:
            return 0
        first = self._first
        if not (self._there and (self._directory / "progress.json").exists()):
            self._run.activations(first).save(self._directory, "first")
            return 0
        require_same(Activations.load(self._directory, "first"), self._run.activations(first), self._directory)
        _, progress = load_artifact(self._directory, "progress", kind=_PROGRESS, schema=1)
        done = int(progress["batches"])
        for i, key in enumerate(tables):
            here = self._directory / f"after_{done}" / str(i)
            if _sums(here) != progress["tables"][i]:
                raise ArtifactError(
                    f"{here} must hold the table that was saved after {done} batches, got other or damaged files; use another directory"
                )
            tables[key] = MomentsTable.load(here)
        self._tidy(done)
        return done

    def save(self, tables: Mapping[Key, MomentsTable], done: int) -> None:
        """Write the tables, then say so, then take the earlier ones away."""
        if self._directory is None:
            return
        here = self._directory / f"after_{done}"
        if here.exists():  # of a save that was cut off
            shutil.rmtree(here)
        for i, table in enumerate(tables.values()):
            table.save(here / str(i))
        content = {"batches": done, "tables": [_sums(here / str(i)) for i in range(len(tables))]}
        save_artifact(self._directory, "progress", kind=_PROGRESS, schema=1, data={}, content=content)
        self._tidy(done)

    def _tidy(self, done: int) -> None:
        assert self._directory is not None
        for other in self._directory.glob("after_*"):
            if other.name != f"after_{done}":
                shutil.rmtree(other)


def _sums(folder: Path) -> dict[str, str]:
    """The sum of every file in a folder, by name."""
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.glob("*")) if path.is_file()}
