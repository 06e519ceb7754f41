"""The base of every result: a tidy frame and the settings that made it, saved as csv and json."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from care_lens.core.cells import csv_text, defused_text, restored
from care_lens.core.display import ShortRepr, as_html, as_text, listed, told_column
from care_lens.core.errors import ArtifactError
from care_lens.core.files import load_artifact, save_artifact, warn_unsummed

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SCHEMA = 2
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


_TOLD = ("tower", "layer", "component", "position", "metric", "effect")
"""Columns whose values are told where a result introduces itself."""
_FIRST_ROWS = 5


@dataclass(frozen=True, repr=False)
class FrameResult(ShortRepr, ABC):
    """A result that is a tidy frame.

    Attributes:
        frame: One row a measured value; columns as the subclass says.
        settings: What made it, JSON-able: seed, n, versions and the options of the call.
    """

    frame: pd.DataFrame
    settings: dict[str, Any]

    def shown(self) -> tuple[str, dict[str, str]]:
        """What was measured, of how many, and where the numbers are."""
        frame, settings = self.frame, self.settings
        rows = {name: told_column(frame[name]) for name in _TOLD if name in frame.columns}
        of = [f"n {settings['n']}"] if "n" in settings else []
        of += [f"{settings['groups']} groups"] if "groups" in settings else []
        of += [f"seed {settings['seed']}"] if "seed" in settings else []
        rows["of"] = ", ".join(of)
        rows["outcome"] = str(settings.get("outcome", ""))
        rows["also"] = ", ".join(f".{name}: {len(part)} rows" for name, part in self.parts().items())
        rows["see"] = f".frame (columns {listed(frame.columns, most=20)}), .plot(), .save(folder, name)"
        return f"{type(self).__name__}: {len(frame)} {'row' if len(frame) == 1 else 'rows'}", rows

    def __repr__(self) -> str:
        return as_text(*self.shown())

    def _repr_html_(self) -> str:
        return as_html(*self.shown()) + self.frame.head(_FIRST_ROWS).to_html(index=False)

    def to_dataframe(self) -> pd.DataFrame:
        """A copy of the frame."""
        return self.frame.copy()

    @abstractmethod
    def plot(self) -> "go.Figure":
        """The result's figure; it is returned and never shows itself."""

    def parts(self) -> dict[str, pd.DataFrame]:
        """Frames that are saved beside the first one, by the ending of their file's name: none, unless the subclass has some."""
        return {}

    @classmethod
    def from_parts(
        cls: type[Result], frame: pd.DataFrame, settings: dict[str, Any], texts: Mapping[str, str]
    ) -> Result:
        """Build from what was saved; ``texts`` are the csv texts of :meth:`parts`."""
        return cls(frame, settings)

    def save(self, directory: str | Path, name: str, *, context: Mapping[str, Any] | None = None) -> Path:
        """Write ``name.csv`` (the frame) and ``name.json`` (settings, column types and the sums of all files) into a directory.

        A result that has more frames writes them too, as ``name.details.csv`` or the like; the json file comes last.

        Texts that a spreadsheet would take for formulas have an apostrophe before them in the csv; :meth:`load` takes it away.

        Args:
            directory: Made if it does not exist.
            name: Stem of the files.
            context: What else the json file is to hold and :meth:`load` is to ask for, JSON-able.

        Returns:
            The path of the csv file.

        Raises:
            TypeError: If the settings are not JSON-able.
            ArtifactError: If files of that name are there that care_lens did not write.
        """
        frames = {"csv": self.frame, **{f"{part}.csv": frame for part, frame in self.parts().items()}}
        save_artifact(
            directory,
            name,
            kind=type(self).__name__,
            schema=_SCHEMA,
            data={suffix: csv_text(frame).encode() for suffix, frame in frames.items()},
            content={
                "columns": column_types(self.frame),
                "settings": _finite(self.settings),
                "context": dict(context or {}),
            },
        )
        return Path(directory) / f"{name}.csv"

    @classmethod
    def load(
        cls: type[Result], directory: str | Path, name: str, *, context: Mapping[str, Any] | None = None
    ) -> Result:
        """Read what :meth:`save` wrote.

        In a column of strings a missing value comes back as the empty string. Files of schema 1, which have no sums, are read too.

        Args:
            directory: The directory.
            name: Stem of the files.
            context: If given, what the files must have been saved with.

        Returns:
            The result.

        Raises:
            FileNotFoundError: If a file is not there.
            ArtifactError: If the files are damaged, hold another kind of result, come from a newer schema, or were saved with
                another context.
        """
        directory = Path(directory)
        if (old := _first_schema(directory / f"{name}.json", cls.__name__)) is not None:
            if context is not None:
                raise ArtifactError(f"{name}.json must be of this run, got a file of an older version; remove it")
            warn_unsummed(directory / f"{name}.json")
            columns, settings = old["columns"], old["settings"]
            data = {path.name[len(name) + 1 :]: path.read_bytes() for path in directory.glob(f"{name}.*csv")}
            if "csv" not in data:
                raise FileNotFoundError(f"{directory / f'{name}.csv'} must be there, {name}.json describes it")
        else:
            data, content = load_artifact(directory, name, kind=cls.__name__, schema=_SCHEMA)
            columns, settings = content["columns"], content["settings"]
            settings = json.loads(settings) if isinstance(settings, str) else settings
            if context is not None and content["context"] != json.loads(json.dumps(dict(context))):
                raise ArtifactError(
                    f"{directory / f'{name}.json'} must have been saved with {dict(context)}, got {content['context']}: it is of another "
                    "run or was renamed; remove it, and it is made again"
                )
        texts = {suffix.removesuffix(".csv"): held.decode() for suffix, held in data.items() if suffix != "csv"}
        if old is None:
            return cls.from_parts(read_frame(data["csv"], columns), settings, texts)
        try:
            return cls.from_parts(_whole_frame(data["csv"], columns), settings, texts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{directory / f'{name}.csv'} must be the frame that {name}.json describes, got another ({error}); copy both files again"
            ) from error


def _first_schema(path: Path, kind: str) -> dict[str, Any] | None:
    """The json file of schema 1, which had no sums; None if it is of another schema.

    Raises:
        FileNotFoundError: If it is not there.
        ArtifactError: If it holds another kind of result.
    """
    try:
        held = json.loads(path.read_bytes())
    except ValueError:
        return None
    if not isinstance(held, dict) or held.get("schema") != 1 or "files" in held or "columns" not in held:
        return None
    if held["kind"] != kind:
        raise ArtifactError(f"{path.name} must hold a {kind}, got a {held['kind']}; load it with that class")
    return held


def _whole_frame(content: bytes, columns: Mapping[str, str]) -> pd.DataFrame:
    """A frame of schema 1, whose file has no sum: its columns and the end of its last row are all that can be checked."""
    if not content.endswith(b"\n"):
        raise ValueError("its last row is cut off")
    frame = read_frame(content, columns)
    if [*map(str, frame.columns)] != [*columns]:
        raise ValueError(f"it has the columns {[*map(str, frame.columns)]}")
    return frame


def _finite(settings: dict[str, Any]) -> dict[str, Any] | str:
    """Settings for the json file; as a text where they hold NaN or infinity, which JSON does not have."""
    try:
        json.dumps(settings, allow_nan=False)
    except ValueError:
        return json.dumps(settings)
    return settings


def column_types(frame: pd.DataFrame) -> dict[str, str]:
    """The types of a frame's columns, for :func:`read_frame`."""
    return {str(column): str(dtype) for column, dtype in frame.dtypes.items()}


def read_frame(content: bytes, columns: Mapping[str, str]) -> pd.DataFrame:
    """A frame from its csv file, with the column types it had and floats to the bit; a missing text comes back empty."""
    textual = [defused_text(column) for column, dtype in columns.items() if dtype in _TEXTUAL]
    floats = [defused_text(column) for column, dtype in columns.items() if dtype.lower().startswith("float")]
    frame = pd.read_csv(
        io.BytesIO(content),
        dtype={column: "str" for column in textual},
        converters={column: _exact for column in floats},
        keep_default_na=False,
        na_values={column: [""] for column in map(defused_text, columns) if column not in textual},
    )
    return restored(frame).astype(dict(columns))


def _exact(text: str) -> float:
    """The float that was written, to the bit, whatever the version of pandas."""
    return float(text) if text else float("nan")
