"""The table of defences by channels: attack success, refusals, right answers and fidelity, with intervals."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from care_lens.core.errors import ArtifactError
from care_lens.core.results import FrameResult, read_frame
from care_lens.evaluation.comparison import compare, rank
from care_lens.evaluation.metrics import (
    LABELS,
    RATES,
    TRIAL_COLUMNS,
    paired_difference,
    records,
    summarise,
    unit_of,
)
from care_lens.evaluation.paper import paper_table

if TYPE_CHECKING:
    import plotly.graph_objects as go


def _no_trials() -> pd.DataFrame:
    return pd.DataFrame(columns=list(TRIAL_COLUMNS))


@dataclass(frozen=True)
class DefenceTable(FrameResult):
    """Defences by channels.

    Attributes:
        frame: Columns defence, channel, metric, value, ci_low, ci_high, n, missing, groups, interval, judge,
            seed. Metrics: "asr" and "refusal" in harmful channels; "accuracy" (or a grader's metric), "refusal" (over-refusal),
            "agreement", "retained", "kl" and "kl_answer" in benign ones, "sarr" in ordinary ones. Rates are in [0, 1], divergences in
            nats.
        settings: What made it.
        trials: The values behind it, one row a trial: see
            :data:`~care_lens.evaluation.metrics.TRIAL_COLUMNS`.
    """

    trials: pd.DataFrame = field(default_factory=_no_trials)

    @classmethod
    def from_trials(
        cls,
        trials: pd.DataFrame,
        *,
        settings: dict[str, Any],
        n_boot: int = 2000,
        seed: int = 0,
        confidence: float = 0.95,
        max_missing: int | float = 0.02,
    ) -> "DefenceTable":
        """Summarise trials; see :func:`~care_lens.evaluation.metrics.summarise`.

        Raises:
            TooManyMissingError: If a cell misses more than ``max_missing`` of its trials.
            ValueError: If there are no trials.
        """
        frame = summarise(trials, n_boot=n_boot, seed=seed, confidence=confidence, max_missing=max_missing)
        options = {"n_boot": n_boot, "seed": seed, "confidence": confidence, "max_missing": max_missing}
        return cls(
            frame,
            {**settings, **options, "n": max(row["n"] for row in records(frame))},
            trials.reset_index(drop=True),
        )

    def difference(self, first: str, second: str, *, metric: str, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Paired differences between two defences; see
        :func:`~care_lens.evaluation.metrics.paired_difference`."""
        options = {"n_boot": n_boot, "seed": seed, "max_missing": self._limit}
        return paired_difference(self, first, second, metric=metric, **options)

    def compare(self, against: str, *, metric: str = "asr", channels: Sequence[str] | None = None) -> pd.DataFrame:
        """Every other defence against one of them, with paired tests and Holm's correction; see :func:`~care_lens.evaluation.comparison.compare`."""
        return compare(self, against=against, metric=metric, channels=channels, max_missing=self._limit)

    def rank(self, *, metric: str = "asr", lower_is_better: bool | None = None) -> pd.DataFrame:
        """The defences of each channel in order, with the ranks that hold; see :func:`~care_lens.evaluation.comparison.rank`."""
        return rank(self, metric=metric, lower_is_better=lower_is_better, max_missing=self._limit)

    def to_latex(self, *, metrics: Sequence[str] = ("asr",), against: str | None = None, **options: Any) -> str:
        """The table in the layout of the paper, for LaTeX; see :func:`~care_lens.evaluation.paper.paper_table`."""
        options = {"max_missing": self._limit, **options}
        return paper_table(self, form="latex", metrics=metrics, against=against, **options)

    @property
    def _limit(self) -> float:
        """Largest share of missing trials: twice that of a cell, since a pair misses what either defence does."""
        return min(2 * float(self.settings.get("max_missing", 0.02)), 1.0)

    def to_markdown(self, *, metrics: Sequence[str] = ("asr", "accuracy")) -> str:
        """Rows are defences, columns channels, cells "12 [4, 26]" in per cent (divergences in nats).

        Args:
            metrics: Which metrics; channels without any of them are left out.

        Raises:
            ValueError: If the table has none of them.
        """
        head, rows, caption = self._cells(metrics)
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{body}\n\n{caption}\n"

    def to_html(self, *, metrics: Sequence[str] = ("asr", "accuracy")) -> str:
        """The same table as an HTML ``table`` element, without styles (class ``defence-table``).

        Args:
            metrics: Which metrics.

        Raises:
            ValueError: If the table has none of them.
        """
        head, rows, caption = self._cells(metrics)
        top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
        body = "\n".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        return (
            f'<table class="defence-table">\n<caption>{html.escape(caption)}</caption>\n'
            f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        )

    def plot(self) -> "go.Figure":
        """Attack success by channel under each defence, with intervals."""
        from care_lens.plots import plot_asr

        return plot_asr(self)

    def parts(self) -> dict[str, pd.DataFrame]:
        """The trials."""
        return {"trials": self.trials}

    @classmethod
    def from_parts(cls, frame: pd.DataFrame, settings: dict[str, Any], texts: Mapping[str, str]) -> "DefenceTable":
        """Build from what was saved.

        Raises:
            ArtifactError: If the trials are missing.
        """
        if "trials" not in texts:
            raise ArtifactError("the file of trials must be beside the table, got none; copy all files again")
        types = {column: "str" for column in TRIAL_COLUMNS} | {"value": "float64", "seed": "int64"}
        trials = read_frame(texts["trials"].encode(), types)
        return cls(frame, settings, trials)

    def _cells(self, metrics: Sequence[str]) -> tuple[list[str], list[list[str]], str]:
        """Head, rows and caption of the printed table."""
        if isinstance(metrics, str):
            raise ValueError(f"metrics must be a list of names, got the text {metrics!r}; write ({metrics!r},)")
        rows = [row for row in records(self.frame) if row["metric"] in metrics]
        if not rows:
            raise ValueError(f"metrics must be some of {sorted(set(self.frame['metric']))}, got {list(metrics)}")
        columns = sorted(
            dict.fromkeys((row["channel"], row["metric"]) for row in rows),
            key=lambda column: list(metrics).index(column[1]),
        )
        judges = {metric: {row["judge"] for row in rows if row["metric"] == metric} for metric in metrics}
        several = ["judge"] if any(len(names) > 1 for names in judges.values()) else []
        several += ["seed"] if len({row["seed"] for row in rows}) > 1 else []
        cells: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
        for row in rows:
            key = tuple(str(row[name]) for name in ("defence", *several))
            cells.setdefault(key, {})[row["channel"], row["metric"]] = _cell(row)
        head = ["defence", *several, *(_heading(*column) for column in columns)]
        body = [[*key, *(line.get(column, "") for column in columns)] for key, line in cells.items()]
        return head, body, _caption(rows, columns)


def _heading(channel: str, metric: str) -> str:
    return f"{channel} ({LABELS.get(metric, metric)})"


def _cell(row: Mapping[str, Any]) -> str:
    value, low, high = row["value"], row["ci_low"], row["ci_high"]
    if row["metric"] in RATES:
        return f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _caption(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """Units, intervals, numbers of trials, missing ones and judges."""
    counts = []
    for column in columns:
        n = sorted({row["n"] for row in rows if (row["channel"], row["metric"]) == column})
        counts.append(f"{_heading(*column)} {n[0] if len(n) == 1 else f'{n[0]}-{n[-1]}'}")
    units = " and ".join(dict.fromkeys(unit_of(metric) for _, metric in columns))
    kinds = ", ".join(sorted({row["interval"] for row in rows}))
    missing, judges = sum(row["missing"] for row in rows), ", ".join(sorted({row["judge"] for row in rows}))
    return f"In {units}, with intervals ({kinds}). n: {', '.join(counts)}; missing: {missing}. Judge: {judges}."
