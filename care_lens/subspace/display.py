"""How a subspace introduces itself in a terminal and in a notebook."""

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from care_lens.core import display

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace

_BARS = "▁▂▃▄▅▆▇█"
_MOST_BARS = 32


def summary(subspace: "SafetySubspace") -> dict[str, str]:
    """What the subspace is, by heading; headings without a value are left out."""
    notes = subspace.diagnostics
    rows = {
        "site": "" if subspace.site is None else str(subspace.site),
        "modality": subspace.modality or "",
        "model": ""
        if subspace.model is None
        else " ".join(filter(None, (subspace.model.label, subspace.model.revision))),
        "rank": f"{subspace.rank} of width {subspace.width}",
        "made by": str(notes.get("operation", "")),
        "control": str(notes.get("control", "")),
        "contrast": str(notes.get("contrast", "")),
        "projection": str(notes.get("projection", "")),
    }
    if "n_benign" in notes:
        rows["rows"] = f"{notes['n_benign']} benign, {notes['n_malicious']} malicious"
        rows["shrinkage"] = f"{notes['shrinkage_benign']:.3g} benign, {notes['shrinkage_malicious']:.3g} malicious"
    if "residual" in notes:  # along given directions there is nothing to solve
        rows["solver"] = f"{notes['solver']}, order {notes['order']}, residual {notes['residual']:.1e}"
    if choice := notes.get("auto_rank"):
        rows["rank chosen"] = (
            f"{choice['passed']} directions above {choice['threshold']:.3g} held out (benign against benign)"
        )
    if rule := notes.get("rank_rule"):
        rows["rank chosen"] = f"{rule['passed']} directions by {rule['rule']}"
    if measured := notes.get("uncertainty"):
        value, low, high = measured["heldout_ratio"]
        rows["held out"] = f"{value:.3g} [{low:.3g}, {high:.3g}] malicious/benign energy"
        value, low, high = measured["largest_angle_between_halves"]
        rows["halves apart"] = f"{value:.2g} [{low:.2g}, {high:.2g}] radians at the largest angle"
    return {heading: value for heading, value in rows.items() if value}


_LINES = (
    ("rank", ("rank", "rank chosen")),
    ("where", ("site", "modality", "model")),
    ("made by", ("made by", "control")),
    ("fit", ("contrast", "projection", "rows", "shrinkage")),
    ("solver", ("solver",)),
    ("measured", ("held out", "halves apart")),
)
"""The lines of the text and the headings of the summary in each."""
_NAMED = ("control", "shrinkage", "held out", "halves apart")
"""Headings whose values do not say what they are."""


def as_text(rows: Mapping[str, str], eigenvalues: Tensor) -> str:
    """Eight lines at most under the class name, each with several headings of the summary."""
    said = {heading: f"{heading} {value}" if heading in _NAMED else value for heading, value in rows.items()}
    lines = {name: ", ".join(said[heading] for heading in headings if heading in said) for name, headings in _LINES}
    return display.as_text("SafetySubspace", {**lines, "eigenvalues": spectrum(eigenvalues)}, widest=160)


def as_html(rows: Mapping[str, str], eigenvalues: Tensor) -> str:
    """A two-column table."""
    return display.as_html("SafetySubspace", {**rows, "eigenvalues": spectrum(eigenvalues)})


def spectrum(eigenvalues: Tensor) -> str:
    """First to last, and bars on a linear scale from 0."""
    values = eigenvalues.detach().double().cpu().tolist()
    if not all(map(isfinite, values)):
        return "not known"
    top = max(values[0], 1e-300)
    heights = [min(int(len(_BARS) * max(value, 0) / top), len(_BARS) - 1) for value in values[:_MOST_BARS]]
    bars = "".join(_BARS[height] for height in heights)
    ends = f"{values[0]:.3g}" if len(values) == 1 else f"{values[0]:.3g} to {values[-1]:.3g}"
    return f"{ends}  {bars}{'...' if len(values) > _MOST_BARS else ''}"
