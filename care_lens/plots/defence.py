"""Defences by channels: attack success and what it costs, each with its interval."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, half_widths, only, where

TITLES = {
    "asr": "attack success",
    "refusal": "refused",
    "accuracy": "right answers",
    "agreement": "same answer as undefended",
    "retained": "still right",
}
"""Names of the metrics that are shares, as the figures write them."""

DEFENCE_COLUMNS = ("defence", "channel", "metric", "value", "ci_low", "ci_high", "n")


def plot_asr(
    result: FrameResult | pd.DataFrame, *, metrics: Sequence[str] = ("asr", "accuracy")
) -> go.Figure:
    """Shares by channel, one marker a defence, with intervals; one panel a metric.

    Args:
        result: A ``DefenceTable`` or its frame.
        metrics: Shares to draw: "asr", "refusal", "accuracy", "agreement", "retained"; those that the frame
            lacks are left out.

    Returns:
        The figure: a trace for each panel and defence (judge and seed, where there are several).

    Raises:
        ValueError: If the frame is not such, has none of the metrics, or one of them is no share.
    """
    frame = frame_of(result, DEFENCE_COLUMNS)
    if unknown := [metric for metric in metrics if metric not in TITLES]:
        raise ValueError(f"metrics must be among {sorted(TITLES)}, got {unknown}")
    shown = [metric for metric in metrics if (frame["metric"] == metric).any()]
    if not shown:
        raise ValueError(f"metrics must be among {sorted(set(frame['metric']))}, got {list(metrics)}")
    frame = with_series(frame)
    frame = frame[frame["metric"].isin(shown)]
    figure = make_subplots(
        rows=len(shown), cols=1, vertical_spacing=0.3 / len(shown) if len(shown) > 1 else 0
    )
    names = list(dict.fromkeys(frame["series"]))
    for row, metric in enumerate(shown, start=1):
        part = only(frame, "metric", metric)
        first = row == 1
        for index, name in enumerate(names):
            figure.add_trace(_markers(where(part, series=name), name, index, legend=first), row=row, col=1)
        channels = list(dict.fromkeys(part["channel"]))
        figure.update_xaxes(categoryorder="array", categoryarray=channels, row=row, col=1)
        figure.update_yaxes(title_text=TITLES[metric], row=row, col=1)
    figure.update_xaxes(tickangle=-35, showgrid=False)
    figure.update_yaxes(range=[-0.04, 1.04], tickformat=".0%")
    figure.update_layout(
        template=theme.TEMPLATE, scattermode="group", scattergap=0.25, height=80 + 360 * len(shown)
    )
    return figure


def with_series(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with a column ``series``: the defence, with judge and seed where the frame has several."""
    name = frame["defence"].astype(str)
    for column in ("judge", "seed"):
        if column in frame.columns and frame[column].nunique() > 1:
            name = name + f", {column} " + frame[column].astype(str)
    return frame.assign(series=name.to_numpy())


def _markers(part: pd.DataFrame, name: str, index: int, *, legend: bool) -> go.Scatter:
    columns = ["ci_low", "ci_high", "n", *(["missing"] if "missing" in part.columns else [])]
    hover = "%{x}<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}], n = %{customdata[2]}"
    if "missing" in columns:
        hover += ", missing %{customdata[3]}"
    return go.Scatter(
        x=part["channel"].tolist(),
        y=part["value"].astype(float).tolist(),
        error_y={**half_widths(part), "thickness": 1.5, "width": 3},
        customdata=part[columns].to_numpy(dtype=float),
        hovertemplate=hover,
        mode="markers",
        marker={
            "size": 9,
            "color": theme.COLOURS[index % len(theme.COLOURS)],
            "symbol": theme.SYMBOLS[index % len(theme.SYMBOLS)],
        },
        offsetgroup=name,
        legendgroup=name,
        showlegend=legend,
        name=name,
    )
