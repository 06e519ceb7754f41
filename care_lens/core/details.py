"""What the results of lens and mediation share: a frame of details, names of outcomes, site columns."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, TypeVar

import pandas as pd

from care_lens.core.cells import restored
from care_lens.core.errors import ArtifactError
from care_lens.core.examples import Example
from care_lens.core.outcome import BaseOutcome, Outcome, given_outcome
from care_lens.core.results import FrameResult, package_versions
from care_lens.core.site import Site

_TEXTUAL = ("tower", "component", "mediator", "position", "group", "id", "channel", "text", "verdict")
_TEXTUAL += ("span", "token", "word", "context", "place", "sender", "receiver", "kind", "method", "plant")
_WHOLE = ("pair", "patch", "row", "col", "grid", "image", "example", "token_index", "rank", "word_id")
_SOMETIMES = ("layer", "head", "neuron", "bank_layer", "receiver_layer", "receiver_head")

Result = TypeVar("Result", bound="DetailedResult")


@dataclass(frozen=True)
class DetailedResult(FrameResult):
    """A result that also keeps what its means are of.

    Attributes:
        frame: One row a measured value.
        settings: What made it.
        details: One row a pair or an example of each cell, as the subclass says.
    """

    details: pd.DataFrame = field(default_factory=pd.DataFrame)

    def parts(self) -> dict[str, pd.DataFrame]:
        """The details."""
        return {"details": self.details}

    @classmethod
    def from_parts(
        cls: type[Result], frame: pd.DataFrame, settings: dict[str, Any], texts: Mapping[str, str]
    ) -> Result:
        """Build from what was saved.

        Raises:
            ArtifactError: If the details are missing.
        """
        if "details" not in texts:
            raise ArtifactError("the file of details must be beside the frame, got none; copy all files again")
        written = restored(pd.read_csv(io.StringIO(texts["details"]), dtype="str", keep_default_na=False))
        return cls(frame, settings, pd.DataFrame({name: _typed(written[name]) for name in written.columns}))


def metric_name(outcome: Outcome | BaseOutcome) -> str:
    """The name of an outcome in the column ``metric``."""
    outcome = given_outcome(outcome)
    return getattr(outcome, "__name__", type(outcome).__name__)


def describe_outcome(outcome: Outcome | BaseOutcome) -> str:
    """An outcome for the settings; the same text for the same outcome in another process."""
    outcome = given_outcome(outcome)
    return repr(outcome) if is_dataclass(outcome) else metric_name(outcome)


def groups_of(examples: Sequence[Example]) -> list[str]:
    """The item of each example, else its id, else its index: what intervals are clustered by."""
    return [example.group or example.id or str(i) for i, example in enumerate(examples)]


def site_columns(site: Site) -> dict[str, Any]:
    """Tower, layer and component of a site."""
    return {"tower": site.tower, "layer": site.layer, "component": site.component}


def sampling(n: int, groups: Sequence[str], n_boot: int, seed: int) -> dict[str, Any]:
    """What every result's settings say of its sample and its intervals.

    Args:
        n: Pairs or examples.
        groups: Their groups.
        n_boot: Bootstrap resamples.
        seed: Their seed.
    """
    return {
        "n": n,
        "groups": len(set(groups)),
        "n_boot": n_boot,
        "seed": seed,
        "confidence": 0.95,
        "versions": package_versions(),
    }


def tidy(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """Rows as a frame with these columns; layers, heads and neurons are whole numbers or missing."""
    frame = pd.DataFrame(rows, columns=list(columns))
    return frame.astype({name: "Int64" for name in _SOMETIMES if name in frame.columns})


def _typed(column: pd.Series) -> pd.Series:
    """A column of details from its strings; floats are those that were written, to the bit."""
    if column.name in _TEXTUAL:
        return column
    if column.name in _SOMETIMES:
        return pd.Series([int(text) if text else None for text in column], dtype="Int64")
    if column.name in _WHOLE and all(text.lstrip("-").isdigit() for text in column):  # a rank may be missing
        return column.map(int).astype("int64")
    return column.map(lambda text: float(text) if text else float("nan")).astype("float64")
