"""Which defences differ, on the same trials, and which ranks hold: paired tests with Holm's correction.

    compare(table, against="none", metric="asr")  # every other defence against one
    rank(table, metric="asr")                     # all pairs; a rank is an interval where neighbours cannot be told apart

Differences have the paired intervals of :func:`~care_lens.evaluation.metrics.paired_difference`. p values are those of
:func:`care_lens.core.comparisons.sign_flip_test`: McNemar's exact test where trials share no group, else whole groups are flipped. ``p_holm`` is
adjusted for the number of tests of one call: it is the one to read where several rows are read.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from care_lens.core.comparisons import holm, sign_flip_test
from care_lens.core.renames import renamed
from care_lens.evaluation.metrics import (
    LOWER_IS_BETTER,
    paired_difference,
    paired_values,
    records,
    rows_where,
    trials_of,
)

Rows = list[dict[str, Any]]


def compare(
    trials: Any,
    *,
    against: str,
    metric: str = "asr",
    defences: Sequence[str] | None = None,
    channels: Sequence[str] | None = None,
    seed: int = 0,
    confidence: float = 0.95,
    max_missing: int | float = 0.02,
) -> pd.DataFrame:
    """Compare every defence with one of them, on the same trials, channel by channel; a channel that only one of two has is left out.

    Args:
        trials: A :class:`~care_lens.evaluation.table.DefenceTable`, or a frame with
            :data:`~care_lens.evaluation.metrics.TRIAL_COLUMNS`.
        against: The defence that the others are compared with.
        metric: What is compared.
        defences: The others; None: all that have the metric.
        channels: Which channels; None: all that have the metric. The fewer are asked about, the less is lost to Holm's correction, so choose them before
            looking.
        seed: Seed of what is sampled (only where the values are no rates).
        confidence: Coverage of the intervals, each by itself.
        max_missing: Largest share of trials that either defence misses.

    Returns:
        Frame with the columns channel, metric, first (the defence), second (``against``), value (first - second), ci_low, ci_high, n,
        missing, interval, up and down (groups that speak for more and for less), p, test, p_holm, judge, seed.

    Raises:
        ValueError: If a defence or a channel has no such trials, no two defences share a channel, or two were not tried on the same examples of one.
        TooManyMissingError: If too many are missing.

    Example:
        >>> import pandas as pd
        >>> from care_lens.evaluation import compare
        >>> rows = [
        ...     {"defence": name, "channel": "plain", "metric": "asr", "judge": "j", "seed": 0, "id": str(i), "group": str(i), "value": float(i < hits)}
        ...     for name, hits in (("none", 9), ("mine", 1)) for i in range(12)
        ... ]
        >>> found = compare(pd.DataFrame(rows), against="none").iloc[0]
        >>> found["test"], f"{found['value']:.2f}", f"{found['p_holm']:.4f}"
        ('mcnemar-exact', '-0.67', '0.0078')
    """
    table = _chosen(trials, metric, channels)
    known = list(dict.fromkeys(table["defence"]))
    if against not in known:
        raise ValueError(f"against must be a defence with trials of {metric!r}, one of {known}, got {against!r}")
    wanted = [name for name in (known if defences is None else defences) if name != against]
    if not wanted:
        raise ValueError(f"defences must hold one beside {against!r}, got {known}; compare a table of several")
    pairs = [(name, against) for name in wanted]
    return _tested(table, pairs, metric, seed=seed, confidence=confidence, max_missing=max_missing)


@renamed(alpha="significance")
def rank(
    trials: Any,
    *,
    metric: str = "asr",
    lower_is_better: bool | None = None,
    channels: Sequence[str] | None = None,
    seed: int = 0,
    significance: float = 0.05,
    max_missing: int | float = 0.02,
) -> pd.DataFrame:
    """Rank the defences of each channel; those that cannot be told apart share ranks.

    All pairs of a channel are tested, with Holm's correction over them. A defence's best rank is 1 + the number of defences that are significantly better,
    its worst one the number of defences less those that are significantly worse.

    Args:
        trials: A table, or a frame of trials.
        metric: What they are ranked by.
        lower_is_better: None: as the metric says. For "refusal" it must be said: refusals are good in harmful channels and bad in benign ones.
        channels: Which channels; None: all that have the metric.
        seed: Seed of what is sampled.
        significance: Probability of a false difference at which all the tests of a channel hold together.
        max_missing: Largest share of trials that a pair misses.

    Returns:
        Frame with the columns channel, metric, defence, value, rank_best, rank_worst, judge, seed, the best value first.

    Raises:
        ValueError: If the direction is not known, or as :func:`compare` does.
    """
    if lower_is_better is None:
        if metric not in LOWER_IS_BETTER:
            raise ValueError(
                f"lower_is_better must be said for {metric!r}, got None; known are {sorted(LOWER_IS_BETTER)}"
            )
        lower_is_better = LOWER_IS_BETTER[metric]
    if not 0 < significance < 1:
        raise ValueError(f"significance must be between 0 and 1, got {significance}")
    table = _chosen(trials, metric, channels)
    found: Rows = []
    cells = dict.fromkeys((row["channel"], row["judge"], row["seed"]) for row in records(table))
    for channel, judge, run in cells:
        mask = (table["channel"] == channel) & (table["judge"] == judge) & (table["seed"] == run)
        part = rows_where(table, mask)
        names = list(dict.fromkeys(part["defence"]))
        pairs = list(itertools.combinations(names, 2))
        better = dict.fromkeys(names, 0)
        worse = dict.fromkeys(names, 0)
        tests = _tested(part, pairs, metric, seed=seed, confidence=0.95, max_missing=max_missing) if pairs else None
        for row in [] if tests is None else records(tests):
            if row["p_holm"] <= significance and row["value"] != 0:
                first_wins = (row["value"] < 0) == lower_is_better
                winner, loser = (row["first"], row["second"]) if first_wins else (row["second"], row["first"])
                better[loser] += 1
                worse[winner] += 1
        values = {
            name: float(np.nanmean(part["value"].to_numpy()[part["defence"].to_numpy() == name])) for name in names
        }
        for name in sorted(names, key=lambda one: values[one] if lower_is_better else -values[one]):
            found.append(
                {
                    "channel": channel,
                    "metric": metric,
                    "defence": name,
                    "value": values[name],
                    "rank_best": 1 + better[name],
                    "rank_worst": len(names) - worse[name],
                    "judge": judge,
                    "seed": run,
                }
            )
    return pd.DataFrame(found)


def _chosen(trials: Any, metric: str, channels: Sequence[str] | None) -> pd.DataFrame:
    """The trials of a metric, in some channels."""
    table = trials_of(trials)
    part = rows_where(table, table["metric"] == metric)
    if part.empty:
        raise ValueError(f"metric must be one of {sorted(set(table['metric']))}, got {metric!r}")
    if channels is not None:
        if isinstance(channels, str):
            raise ValueError(f"channels must be a list of names, got the text {channels!r}; write [{channels!r}]")
        if unknown := sorted({*channels} - {*part["channel"]}):
            raise ValueError(
                f"channels must have trials of {metric!r}, some of {sorted(set(part['channel']))}, got {unknown}"
            )
        part = rows_where(part, [channel in channels for channel in part["channel"]])
    return part


def _tested(
    table: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    metric: str,
    *,
    seed: int,
    confidence: float,
    max_missing: int | float,
) -> pd.DataFrame:
    """Differences of pairs of defences with their tests; Holm's correction is over all of the rows."""
    parts = []
    channels = {
        name: set(rows_where(table, table["defence"] == name)["channel"])
        for name in dict.fromkeys(name for pair in pairs for name in pair)
    }
    for first, second in pairs:
        shared = channels[first] & channels[second]
        if channels[first] and channels[second] and not shared:
            continue
        # A defence without trials is named by what compares.
        both = rows_where(table, [channel in shared for channel in table["channel"]]) if shared else table
        options = {"metric": metric, "seed": seed, "confidence": confidence, "max_missing": max_missing}
        frame = paired_difference(both, first, second, **options)
        tests = []
        for _, rows in paired_values(both, first, second, metric=metric):
            there = [row for row in rows if np.isfinite(row["first"]) and np.isfinite(row["second"])]
            differences = [row["first"] - row["second"] for row in there]
            tests.append(sign_flip_test(differences, [row["cluster"] for row in there], seed=seed))
        parts.append(
            frame.assign(
                up=[test.up for test in tests],
                down=[test.down for test in tests],
                p=[test.p for test in tests],
                test=[test.test for test in tests],
            )
        )
    if not parts:
        raise ValueError(
            f"two defences must have trials of {metric!r} in one channel, got { ({name: sorted(of) for name, of in channels.items()}) }; run them on the "
            "same suites"
        )
    joined = pd.concat(parts, ignore_index=True)
    joined.insert(list(joined.columns).index("test") + 1, "p_holm", holm(joined["p"].to_numpy()))
    last = ["judge", "seed"]
    order = [column for column in joined.columns if column not in last]
    return joined.reindex(columns=[*order, *last])
