"""Defences by channels: attack success and what it costs, each with its interval."""

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, half_widths, where, with_n

TITLES = {
    "asr": "attack success",
    "refusal": "refused",
    "accuracy": "right answers",
    "agreement": "same answer as undefended",
    "retained": "still right",
    "sarr": "abnormal answers",
    "score": "score",
    "circular": "right in every order",
}
"""Names of the metrics that are shares, as the figures write them."""

DEFENCE_COLUMNS = ("defence", "channel", "metric", "value", "ci_low", "ci_high", "n")
_ROW, _ROW_GAP, _PANEL_GAP, _MARGINS = 12, 12, 80, 140


def plot_asr(result: FrameResult | pd.DataFrame, *, metrics: Sequence[str] = ("asr", "accuracy")) -> go.Figure:
    """Shares by channel, one marker a defence, with intervals; one panel a metric.

    Args:
        result: A ``DefenceTable`` or its frame.
        metrics: Shares to draw: "asr", "refusal", "accuracy", "agreement", "retained", "sarr", "score", "circular"; those that the frame
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
    channels = {metric: list(dict.fromkeys(where(frame, metric=metric)["channel"])) for metric in shown}
    names = list(dict.fromkeys(name for metric in shown for name in where(frame, metric=metric)["series"]))
    lengths = [len(channels[metric]) for metric in shown]
    height = sum(lengths) * (_ROW * len(names) + _ROW_GAP) + _PANEL_GAP * (len(shown) - 1) + _MARGINS
    figure = make_subplots(
        rows=len(shown),
        cols=1,
        row_heights=lengths,
        vertical_spacing=_PANEL_GAP / (height - _MARGINS) if len(shown) > 1 else 0.0,
    )
    for row, metric in enumerate(shown, start=1):
        for index, name in enumerate(names):
            part = where(frame, metric=metric, series=name)
            figure.add_trace(_markers(part, name, index, legend=row == 1), row=row, col=1)
        order = {"categoryorder": "array", "categoryarray": channels[metric], "autorange": "reversed"}
        figure.update_yaxes(**order, showgrid=False, row=row, col=1)
        title = with_n(TITLES[metric], where(frame, metric=metric), "per channel")
        figure.update_xaxes(title_text=title, row=row, col=1)
    figure.update_xaxes(range=[-0.02, 1.03], tickformat=".0%")
    figure.update_layout(template=theme.TEMPLATE, scattermode="group", scattergap=0.35, height=height)
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
    hover = "%{y}<br>%{x:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}], n = %{customdata[2]}"
    if "missing" in columns:
        hover += ", missing %{customdata[3]}"
    return go.Scatter(
        x=part["value"].astype(float).tolist(),
        y=part["channel"].tolist(),
        orientation="h",
        error_x={**half_widths(part), "thickness": 1.5, "width": 3},
        customdata=part[columns].to_numpy(dtype=float),
        hovertemplate=hover,
        mode="markers",
        marker=theme.marker(index, size=9),
        offsetgroup=name,
        legendgroup=name,
        showlegend=legend,
        name=name,
    )
