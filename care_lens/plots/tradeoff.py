"""Safety against utility: where each defence stands."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.defence import DEFENCE_COLUMNS, with_series
from care_lens.plots.frames import frame_of, only, where, with_n

N_BOOT = 1000
_SEED = 0


def plot_tradeoff(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Attack success against right answers on benign channels, one point a defence.

    A point is the mean over channels, each counted once. Attack channels that succeed under no defence (and so tell none from
    another, as a channel that the undefended model refuses) are left out; axes say how many are counted. Bars are 95 % intervals of
    that mean, from a bootstrap of whole items over all channels at once (1000 resamples), where the result has its trials; a bare frame has
    none, and so no bars are drawn. Channels one by one are in ``plot_asr``. The good corner is the lower right.

    Args:
        result: A ``DefenceTable`` or its frame, with the metrics "asr" and "accuracy".

    Returns:
        The figure: a trace a defence (judge and seed, where there are several).

    Raises:
        ValueError: If the frame is not such, or lacks one of the two metrics.
    """
    frame = with_series(frame_of(result, DEFENCE_COLUMNS))
    trials = getattr(result, "trials", None)
    trials = with_series(trials) if isinstance(trials, pd.DataFrame) and len(trials) else None
    shown: dict[str, list[str]] = {}
    tables: dict[str, pd.DataFrame] = {}
    for metric in ("asr", "accuracy"):
        rows = only(frame, "metric", metric)
        channels = list(dict.fromkeys(rows["channel"]))
        if metric == "asr":
            moved = set(rows["channel"][rows["value"].astype(float) > 0])
            channels = [channel for channel in channels if channel in moved] or channels
        shown[metric] = channels
        rows = rows.assign(value=rows["value"].astype(float))
        tables[metric] = (
            rows[rows["channel"].isin(channels)].groupby("series", sort=False)["value"].agg(["mean", "min", "max"])
        )
    attack, benign = tables["asr"], tables["accuracy"]
    figure = go.Figure()
    for index, name in enumerate(name for name in attack.index if name in benign.index):
        x, y = benign.loc[name], attack.loc[name]
        bars = {
            f"error_{axis}": _bars(trials, str(name), metric, shown[metric], float(at["mean"]))
            for axis, metric, at in (("x", "accuracy", x), ("y", "asr", y))
        }
        figure.add_trace(
            go.Scatter(
                x=[float(x["mean"])],
                y=[float(y["mean"])],
                **bars,
                customdata=[[x["min"], x["max"], y["min"], y["max"]]],
                hovertemplate=(
                    "right answers %{x:.1%} (channels %{customdata[0]:.1%} to %{customdata[1]:.1%})<br>"
                    "attack success %{y:.1%} (channels %{customdata[2]:.1%} to %{customdata[3]:.1%})"
                ),
                mode="markers",
                marker=theme.marker(index, size=12),
                name=str(name),
            )
        )
    counted = {
        metric: pd.DataFrame(frame[(frame["metric"] == metric) & frame["channel"].isin(channels)])
        for metric, channels in shown.items()
    }
    asr = f"attack success, mean of {_counted(shown['asr'], 'channel')}"
    accuracy = f"right answers, mean of {_counted(shown['accuracy'], 'benign channel')}"
    titles = {
        "asr": with_n(asr, counted["asr"], "each" if len(shown["asr"]) > 1 else ""),
        "accuracy": with_n(accuracy, counted["accuracy"], "each" if len(shown["accuracy"]) > 1 else ""),
    }
    figure.update_layout(
        template=theme.TEMPLATE,
        height=460,
        showlegend=True,
        xaxis={"title": {"text": titles["accuracy"]}, "tickformat": ".0%", "range": _range(figure, "x")},
        yaxis={"title": {"text": titles["asr"].replace(" (n", "<br>(n")}, "tickformat": ".0%", "range": [-0.03, 1.03]},
    )
    return figure


def _counted(channels: list[str], what: str) -> str:
    return f"{len(channels)} {what}{'s' * (len(channels) != 1)}"


def _bars(
    trials: pd.DataFrame | None, name: str, metric: str, channels: list[str], value: float
) -> dict[str, Any] | None:
    """Error bars of a mean over channels; None without trials or with one item alone."""
    if trials is None:
        return None
    part = where(trials, series=name, metric=metric)
    part = pd.DataFrame(part[part["channel"].isin(channels) & part["value"].notna()])
    found = mean_interval(part)
    if found is None:
        return None
    low, high = found
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(high - value, 0.0)],
        "arrayminus": [max(value - low, 0.0)],
        "thickness": 1.5,
        "width": 4,
    }


def mean_interval(trials: pd.DataFrame, *, n_boot: int = N_BOOT, seed: int = _SEED) -> tuple[float, float] | None:
    """The 95 % percentile interval of the mean over channels of the channels' means, from resamples of whole items.

    An item (group) that stands in several channels is drawn for all of them, so that what channels share is in the interval.

    Args:
        trials: Columns channel, group (a trial without one is an item by itself), value and, where there are such, id.
        n_boot: Resamples.
        seed: Of the resamples.

    Returns:
        Both ends; None where there are fewer than two items.
    """
    own = trials["id"] if "id" in trials.columns else pd.Series(range(len(trials)), index=trials.index)
    alone = trials["group"].isna() | (trials["group"] == "")  # such a trial is an item of its own
    items = trials["group"].astype(object).where(~alone, "id:" + trials["channel"] + ":" + own.astype(str))
    groups, channels = pd.factorize(items)[0], pd.factorize(trials["channel"])[0]
    if len(trials) == 0 or groups.max() < 1:
        return None
    shape = groups.max() + 1, channels.max() + 1
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, (groups, channels), trials["value"].to_numpy(dtype=float))
    np.add.at(counts, (groups, channels), 1.0)
    times = np.random.default_rng(seed).multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=n_boot)
    drawn = times @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(drawn > 0, times @ sums / drawn, np.nan)
    low, high = np.nanquantile(np.nanmean(means, axis=1), [0.025, 0.975])
    return float(low), float(high)


def _range(figure: go.Figure, axis: str) -> list[float]:
    """From below the lowest point, in tenths, to just beyond 1."""
    traces: Any = figure.data
    lowest = min(getattr(trace, axis)[0] for trace in traces)
    return [max(-0.03, np.floor(lowest * 10 - 1) / 10 - 0.005), 1.015]
