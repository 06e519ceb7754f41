"""A log of finished cells, so that a long sweep goes on where it was stopped.

JSON lines: first the settings and a probe (outcomes of the untouched model), then one line a finished cell. A
line cut off by a kill is dropped. Python writes floats so that reading them gives the same number, so that a
resumed sweep gives the same frame as one that was never stopped.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_TOLERANCE = 1e-3


class CellLog:
    """Finished cells by key, in memory and, if a path is given, in a file.

    Args:
        path: The file; it and its folder are made if they do not exist. None: nothing is kept.
        settings: JSON-able; the file must be of the same.
        probe: Numbers that tell the model and the examples apart; the file's must agree to 1e-3.

    Raises:
        ValueError: If the file is of other settings, another model or other examples.
    """

    def __init__(self, path: str | Path | None, *, settings: dict[str, Any], probe: Sequence[float]) -> None:
        self._path = None if path is None else Path(path)
        self._cells: dict[str, Any] = {}
        if self._path is None:
            return
        header = {"settings": json.loads(json.dumps(settings)), "probe": list(probe)}
        lines = self._read()
        if lines:
            self._check(lines[0], header)
            self._cells = {line["cell"]: line["value"] for line in lines[1:]}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [lines[0] if lines else header, *lines[1:]]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def __contains__(self, cell: str) -> bool:
        return cell in self._cells

    def __getitem__(self, cell: str) -> Any:
        return self._cells[cell]

    def add(self, cell: str, value: Any) -> None:
        """Record a finished cell's JSON-able value."""
        self._cells[cell] = value
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"cell": cell, "value": value}) + "\n")

    def _read(self) -> list[dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return []
        whole, _, _ = self._path.read_text(encoding="utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.split("\n")] if whole else []

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        theirs, ours = found.get("settings", {}), header["settings"]
        if theirs != ours:
            differ = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
            raise ValueError(
                f"checkpoint must be of the same settings, {self._path} differs in {differ}; use another file"
            )
        same = len(found["probe"]) == len(header["probe"]) and all(
            math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
            for a, b in zip(found["probe"], header["probe"], strict=True)
        )
        if not same:
            raise ValueError(
                f"checkpoint must be of the same model and examples, {self._path} was made with others; use "
                "another file"
            )
