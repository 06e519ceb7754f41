"""A log of finished cells, so that a long sweep goes on where it was stopped.

A journal (:mod:`care_lens.core.journal`): its first line holds the settings and a probe (outcomes of the untouched model), every other
line finished cells. A line cut off by a kill is dropped. Python writes floats so that reading them gives the same number, so that a
resumed sweep gives the same frame as one that was never stopped.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from care_lens.core import BaseOutcome, Outcome, content_digest
from care_lens.core.errors import ArtifactError
from care_lens.core.identity import model_fingerprint
from care_lens.core.journal import Journal, Row, differing
from care_lens.core.outcome import given_outcome
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.errors import MediationError

_TOLERANCE = 1e-3
_KIND = "finished cells"

Probe = Sequence[float] | Callable[[], Sequence[float]]
"""Numbers that tell models and examples apart, or what computes them."""


def made_by(lvlm: HookedLVLM, *, outcome: Outcome | BaseOutcome | Callable[..., Any]) -> dict[str, Any]:
    """What the cells of any sweep depend on beside the examples, for the settings of a log.

    Args:
        lvlm: The model, with what is on it.
        outcome: The outcome or judge.

    Returns:
        JSON-able digests of the weights, of what acts on the model, and of the outcome: its settings, code and what it closes over.
    """
    return {
        "weights": model_fingerprint(lvlm.hf_model),
        "acting": lvlm.acting(),
        "outcome_digest": content_digest(given_outcome(outcome)),
    }


class CellLog:
    """Finished cells by key, in memory and, if a path is given, in a file.

    Args:
        path: The file; it and its folder are made if they do not exist. None: nothing is kept.
        settings: JSON-able; the file must be of the same.
        probe: Numbers that tell the model and the examples apart; the file's must agree to 1e-3. Or what computes them, which is
            called when the file's settings are known to be the same.

    Raises:
        ArtifactError: If the file is of other settings, another model or other examples, is damaged, or is no such log; it is left
            as it is.
        MediationError: If the path is a folder.
    """

    def __init__(self, path: str | Path | None, *, settings: dict[str, Any], probe: Probe = ()) -> None:
        self._cells: dict[str, Any] = {}
        self._settings, self._path = json.loads(json.dumps(settings)), path
        self._journal = None
        if path is not None and Path(path).is_dir():
            raise MediationError(f"checkpoint must be a file, got the folder {path}; give {Path(path) / 'cells.jsonl'}")
        if path is not None and callable(probe):
            Journal(path, kind=_KIND, check=self._check_settings).read()
        self._probe = list(probe() if callable(probe) else probe)
        if path is not None:
            about = {"settings": settings, "probe": self._probe}
            self._journal = Journal(path, kind=_KIND, about=about, check=self._check)
            self._take(self._journal.append([]))

    def __contains__(self, cell: str) -> bool:
        return cell in self._cells

    def __getitem__(self, cell: str) -> Any:
        return self._cells[cell]

    def add(self, cell: str, value: Any) -> None:
        """Record a finished cell's JSON-able value."""
        self.add_all({cell: value})

    def add_all(self, cells: Mapping[str, Any]) -> None:
        """Record cells that were run together, all or none: cells that share a forward pass depend on one another in the last bits."""
        self._cells.update(cells)
        if self._journal is not None:
            self._take(self._journal.append([{"cells": dict(cells)}]))

    def _take(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._cells.update(row["cells"])

    def _check_settings(self, found: Row) -> None:
        if differ := differing(self._settings, found["settings"]):
            raise ArtifactError(
                f"checkpoint must be of the same settings, {self._path} differs in {differ}; use another file"
            )

    def _check(self, found: Row) -> None:
        self._check_settings(found)
        same = len(found["probe"]) == len(self._probe) and all(
            math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) or (a != a and b != b)
            for a, b in zip(found["probe"], self._probe, strict=True)
        )
        if not same:
            raise ArtifactError(
                f"checkpoint must be of the same model and examples, {self._path} was made with others; use another file"
            )
