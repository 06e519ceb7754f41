"""The base of every result: a tidy frame and the settings that made it, saved as csv and json."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from care_lens.core.cells import csv_text, defused_text, restored

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SCHEMA = 1
_PACKAGES = ("care_lens", "torch", "transformers", "transformer_lens")

_TEXTUAL = ("object", "str", "string", "category")

Result = TypeVar("Result", bound="FrameResult")


def package_versions() -> dict[str, str]:
    """Versions of the packages a result depends on, for its settings."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@dataclass(frozen=True)
class FrameResult(ABC):
    """A result that is a tidy frame.

    Attributes:
        frame: One row a measured value; columns as the subclass says.
        settings: What made it, JSON-able: seed, n, versions and the options of the call.
    """

    frame: pd.DataFrame
    settings: dict[str, Any]

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the frame."""
        return self.frame.copy()

    @abstractmethod
    def plot(self) -> "go.Figure":
        """The result's figure; it is returned and never shows itself."""

    def save(self, directory: str | Path, name: str) -> Path:
        """Write ``name.csv`` (the frame) and ``name.json`` (settings and column types) into a directory.

        Texts that a spreadsheet would take for formulas have an apostrophe before them in the csv; :meth:`load` takes it away.

        Args:
            directory: Made if it does not exist.
            name: Stem of both files.

        Returns:
            The path of the csv file.

        Raises:
            TypeError: If the settings are not JSON-able.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        manifest = {
            "schema": _SCHEMA,
            "kind": type(self).__name__,
            "columns": {str(column): str(dtype) for column, dtype in self.frame.dtypes.items()},
            "settings": self.settings,
        }
        text = json.dumps(manifest, indent=2)
        path = directory / f"{name}.csv"
        path.write_bytes(csv_text(self.frame).encode())
        (directory / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls: type[Result], directory: str | Path, name: str) -> Result:
        """Read what :meth:`save` wrote.

        In a column of strings a missing value comes back as the empty string.

        Args:
            directory: The directory.
            name: Stem of both files.

        Returns:
            The result.

        Raises:
            FileNotFoundError: If a file is not there.
            ValueError: If the files hold another kind of result, or come from a newer schema.
        """
        directory = Path(directory)
        manifest = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        if manifest["kind"] != cls.__name__:
            raise ValueError(
                f"{name}.json must hold a {cls.__name__}, got a {manifest['kind']}; load it with that class"
            )
        if manifest["schema"] > _SCHEMA:
            raise ValueError(f"schema must be {_SCHEMA} or less, got {manifest['schema']}; update care_lens")
        columns: dict[str, str] = manifest["columns"]
        textual = [defused_text(column) for column, dtype in columns.items() if dtype in _TEXTUAL]
        floats = [defused_text(column) for column, dtype in columns.items() if dtype.lower().startswith("float")]
        frame = pd.read_csv(
            directory / f"{name}.csv",
            dtype={column: "str" for column in textual},
            converters={column: _exact for column in floats},
            keep_default_na=False,
            na_values={column: [""] for column in map(defused_text, columns) if column not in textual},
        )
        return cls(restored(frame).astype(columns), manifest["settings"])


def _exact(text: str) -> float:
    """The float that was written, to the bit, whatever the version of pandas."""
    return float(text) if text else float("nan")
