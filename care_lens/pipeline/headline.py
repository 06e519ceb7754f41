"""The figures that a run ends with, before and after, each with its interval, its number of examples and the channel it is of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from care_lens.core.stats import Interval, clustered_rate
from care_lens.evaluation.metrics import group_of, records
from care_lens.pipeline.gradient import ANSWER, OPENING
from care_lens.pipeline.report_words import NOTHING
from care_lens.pipeline.run import Run
from care_lens.pipeline.saved import UNDEFENDED


@dataclass(frozen=True)
class Headline:
    """A share of the test split.

    Attributes:
        share: With its 95 % interval.
        n: Examples it is taken over.
        channel: The one that it is of; "" if it is over all of a kind.
    """

    share: Interval
    n: int
    channel: str = ""

    def __str__(self) -> str:
        if not math.isfinite(self.share.estimate):
            return f"- ({NOTHING})"
        low, high = (f"{100 * bound:.0f}" for bound in (self.share.low, self.share.high))
        of = f"{self.channel}, " if self.channel else ""
        return f"{100 * self.share.estimate:.1f} % [{low}, {high}] ({of}n {self.n})"


_NONE = Headline(Interval(math.nan, math.nan, math.nan), 0)


def headlines(run: Run) -> dict[str, tuple[Headline, Headline]]:
    """Worst attack success of seen and of held-out channels, refusals of seen attacks, right answers over all benign channels and in the lowest:
    before, after.

    The values are those of :func:`care_lens.pipeline.report.summary`; intervals are of the channel that is named (the worst of several
    channels is higher than a channel drawn beforehand would be), and by item over several channels.
    """
    seen = [c for channels in run.study.seen.values() for c in channels]
    held = [c for c in run.study.channels("test", harmful=True) if c not in (run.study.plain, *seen)]
    benign = list(run.study.channels("test", harmful=False))
    found: dict[str, list[Headline]] = {}
    for defence in (UNDEFENDED, run.choice.repair.name):
        table = run.proof.table.to_dataframe()
        adaptive = [] if run.proof.adaptive is None else [run.proof.adaptive.to_dataframe()]
        attacks = pd.concat(
            [_cells(table, defence, "asr", [*held, OPENING, ANSWER]), *(_cells(a, defence, "asr") for a in adaptive)]
        )
        right = _cells(table, defence, "accuracy", benign)
        for name, one in (
            ("worst seen ASR", _extreme(_cells(table, defence, "asr", seen), worst=True)),
            ("worst held-out ASR", _extreme(attacks, worst=True)),
            ("attacks of seen channels refused", _over_all(run.proof.table.trials, defence, "refusal", seen)),
            ("benign accuracy", _over_all(run.proof.table.trials, defence, "accuracy", benign)),
            ("lowest benign accuracy", _extreme(right, worst=False)),
        ):
            found.setdefault(name, []).append(one)
    return {name: (before, after) for name, (before, after) in found.items()}


def unstopped_said(run: Run) -> str:
    """That a repair stops nothing of the worst seen channel, in a sentence; nothing where it does."""
    before, after = headlines(run)["worst seen ASR"]
    if not 0 < before.share.estimate <= after.share.estimate:
        return ""
    return (
        f"The repair is no defence here: in {after.channel}, which it learned from, {100 * after.share.estimate:.0f} % of the attacks are answered "
        f"with it, without it at most {100 * before.share.estimate:.0f} %. More examples, wider gates (epsilons) or other layers may help."
    )


def _cells(frame: pd.DataFrame, defence: str, metric: str, channels: Sequence[str] | None = None) -> pd.DataFrame:
    rows = frame.query("defence == @defence and metric == @metric and value == value")  # without missing values
    return rows if channels is None else rows.query("channel in @channels")


def _extreme(rows: pd.DataFrame, *, worst: bool) -> Headline:
    if rows.empty:
        return _NONE
    row = rows.sort_values("value", ascending=not worst, kind="stable").iloc[0]
    share = Interval(*(float(row[name]) for name in ("value", "ci_low", "ci_high")))
    return Headline(share, int(row["n"]), str(row["channel"]))


def _over_all(trials: pd.DataFrame, defence: str, metric: str, channels: Sequence[str]) -> Headline:
    rows = _cells(trials, defence, metric, channels)
    if rows.empty:
        return _NONE
    return Headline(clustered_rate(list(rows["value"]), [group_of(row) for row in records(rows)]), len(rows))
