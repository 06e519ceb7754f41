"""What each setting of a defence costs: attack success against right benign answers and over-refusal, on the validation split.

A setting is on the frontier if no other is at least as good in all three figures and better in one. :func:`~care_lens.evaluation.search` tries
settings, and :func:`~care_lens.evaluation.tune` readers of the repair; both give a :class:`Frontier`.

    found.frontier.plot()
    found.frontier.wide()  # one row a setting, with intervals
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from care_lens.core.display import brief
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair, Verdict
from care_lens.core.results import FrameResult
from care_lens.core.site import Site
from care_lens.evaluation.metrics import interval, records
from care_lens.evaluation.splits import item_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

Role = Literal["candidate", "control"]
METRICS: dict[str, tuple[bool, Verdict]] = {
    "asr": (True, Verdict.COMPLIED),
    "utility": (False, Verdict.COMPLIED),
    "over_refusal": (False, Verdict.REFUSED),
}
"""Each figure: whether it is of attacks (else of benign prompts), and the verdict that is counted."""


@dataclass(frozen=True)
class Frontier(FrameResult):
    """Settings and controls by what they reach on validation.

    Attributes:
        frame: One row for each setting or control and figure: candidate (a name; with the role it is one), role ("candidate" or "control"), setting (JSON),
            metric ("asr", "utility": right benign answers, "over_refusal": benign prompts refused), value, ci_low, ci_high, n, missing,
            groups (items), interval (its kind), on_frontier, within_budget, chosen.
        settings: What made it; "failed" says which settings and controls have no figures and why.
    """

    def wide(self) -> pd.DataFrame:
        """One row for each setting or control: its axes, the three figures with their intervals, and whether it was chosen."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for cell in records(self.frame):
            about = {name: cell[name] for name in ("candidate", "role")}
            row = rows.setdefault((cell["candidate"], cell["role"]), about)
            row |= json.loads(cell["setting"])
            row |= {f"{cell['metric']}{end}": cell[of] for end, of in _WIDE.items()}
            row |= {name: bool(cell[name]) for name in ("on_frontier", "within_budget", "chosen")}
        return pd.DataFrame([*rows.values()])

    def to_markdown(self) -> str:
        """A row for each setting and control, cells "12 [4, 26]" in per cent."""
        names = {"asr": "ASR", "utility": "right", "over_refusal": "over-refusal"}
        lines = [["", *names.values(), "frontier", "chosen"], ["---", *["---:"] * 3, "---", "---"]]
        for row in records(self.wide()):
            figures = [f"{100 * row[m]:.0f} [{100 * row[f'{m}_low']:.0f}, {100 * row[f'{m}_high']:.0f}]" for m in names]
            marks = ["yes" if row[name] else "" for name in ("on_frontier", "chosen")]
            lines.append([str(row["candidate"]).replace("|", "\\|"), *figures, *marks])
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        cells = records(self.frame)
        most = {metric: max(cell["n"] for cell in cells if cell["metric"] == metric) for metric in names}
        counts = ", ".join(f"{names[metric]} {count}" for metric, count in most.items())
        return f"{body}\n\nIn per cent, with intervals, on the validation split. n: {counts}. Judge: {self.settings.get('judge')}.\n"

    def plot(self) -> "go.Figure":
        """Attack success against right benign answers, settings and controls, with intervals."""
        from care_lens.plots import plot_frontier

        return plot_frontier(self)


_WIDE = {"": "value", "_low": "ci_low", "_high": "ci_high", "_n": "n"}


@dataclass
class Tried:
    """A setting or a control and what it reached."""

    name: str
    role: Role
    setting: dict[str, Any]
    defence: Repair | None
    figures: dict[str, dict[str, Any]]

    def value(self, metric: str) -> float:
        return float(self.figures[metric]["value"])

    @property
    def costs(self) -> tuple[float, float, float]:
        """Three figures of which less is better; of equal attack success the most utility first, and then the least over-refusal."""
        return self.value("asr"), -self.value("utility"), self.value("over_refusal")

    @property
    def gain(self) -> tuple[float, float, float, float]:
        """What is largest of the best where none keeps the budgets: right answers less attack success; ties as in ``costs``."""
        asr, loss, refused = self.costs
        return round(-loss - asr, 12), -refused, -loss, -asr


def figures_of(
    name: str, said: Mapping[bool, Sequence[Verdict]], asked: Mapping[bool, Sequence[Example]]
) -> dict[str, dict[str, Any]]:
    """The three figures of a setting with their intervals and counts.

    Args:
        name: Of the setting, for the message.
        said: Verdicts on its answers to attacks (True) and to benign prompts (False).
        asked: The examples that they are about, in order.

    Raises:
        ValueError: If all answers to attacks or all to benign prompts are missing.
    """
    figures = {}
    for metric, (harmful, counted) in METRICS.items():
        pairs = [
            (verdict, example)
            for verdict, example in zip(said[harmful], asked[harmful], strict=True)
            if verdict is not Verdict.MISSING
        ]
        if not pairs:
            raise ValueError(f"{name} must have an answer to be judged, got none; the log names the errors")
        groups = [":".join(item_of(example)) for _, example in pairs]
        found = interval(np.array([float(verdict is counted) for verdict, _ in pairs]), groups, rate=True)
        figures[metric] = {
            **found,
            "n": len(pairs),
            "missing": len(said[harmful]) - len(pairs),
            "groups": len(set(groups)),
        }
    return figures


def frontier_frame(
    tried: Sequence[Tried], beside: Sequence[Tried], chosen: Tried, within: Callable[[Tried], bool]
) -> pd.DataFrame:
    """The frame of a :class:`Frontier`.

    Args:
        tried: Settings, of which the frontier is made.
        beside: Controls.
        chosen: One of the settings.
        within: Whether a setting or control keeps the budgets.
    """
    rows = []
    for one in (*tried, *beside):
        candidate = one.role == "candidate"
        about = {
            "candidate": one.name,
            "role": one.role,
            "setting": json.dumps({name: plain_value(value) for name, value in one.setting.items()}),
        }
        marks = {
            "on_frontier": candidate and not any(_dominates(other.costs, one.costs) for other in tried),
            "within_budget": within(one),
            "chosen": one is chosen,
        }
        for metric, found in one.figures.items():
            figure = {
                name: found[name] for name in ("value", "ci_low", "ci_high", "n", "missing", "groups", "interval")
            }
            rows.append({**about, "metric": metric, **figure, **marks})
    return pd.DataFrame(rows)


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether the first costs nowhere more and somewhere less."""
    return all(a <= b for a, b in zip(first, second)) and any(a < b for a, b in zip(first, second))


def plain_value(value: Any) -> Any:
    """A value of an axis, JSON-able."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return plain_value(value.item())
    if isinstance(value, np.ndarray):
        return [plain_value(part) for part in value]
    if isinstance(value, Site):
        return str(value)
    if isinstance(value, (list, tuple, range)):
        return [plain_value(part) for part in value]
    return value if value is None or isinstance(value, (str, bool, int, float)) else brief(value)
