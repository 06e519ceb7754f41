"""Attack success in one column of a two-column paper."""

from collections.abc import Mapping, Sequence
from typing import cast

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.defence import DEFENCE_COLUMNS, TITLES, with_series
from care_lens.plots.frames import frame_of, half_widths, only, where, with_n

WIDTH = 320
"""Pixels; saved as PDF they are 240 points, 3.33 inches: the column of the usual two-column layouts, so that text of 10 pixels is printed in 7.5 points."""

_ROW, _GAP, _FRAME, _LEGEND, _FONT = 7, 7, 46, 15, 10


def plot_asr_column(
    result: FrameResult | pd.DataFrame,
    *,
    metric: str = "asr",
    channels: Sequence[str] | Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    width: int = WIDTH,
) -> go.Figure:
    """Shares by channel with their intervals, one marker a defence, small enough for one column.

    Args:
        result: A ``DefenceTable`` or its frame.
        metric: A share, such as "asr".
        channels: Which channels, from the top; a mapping gives the names they are printed by. None: all that have the metric.
        names: What defences are printed as.
        width: In pixels.

    Returns:
        The figure, whose height goes by what it shows; save it with :func:`~care_lens.plots.save_figure` as PDF.

    Raises:
        ValueError: If the frame is not such, the metric is no share or not there, or a channel is not there.
    """
    frame = frame_of(result, DEFENCE_COLUMNS)
    if metric not in TITLES:
        raise ValueError(f"metric must be among {sorted(TITLES)}, got {metric!r}")
    if width < 100:
        raise ValueError(f"width must be 100 pixels or more, got {width}")
    part = with_series(only(frame, "metric", metric))
    known = list(dict.fromkeys(part["channel"]))
    shown = known if channels is None else list(channels)
    if isinstance(channels, str) or (lacking := [channel for channel in shown if channel not in known]) or not shown:
        raise ValueError(
            f"channels must be some of {known}, got {channels!r:.60}"
            + ("" if isinstance(channels, str) else f"; {lacking} are not there")
        )
    printed = {channel: channels[channel] if isinstance(channels, Mapping) else channel for channel in shown}
    series = [str(name) for name in dict.fromkeys(part["series"])]
    called = {name: (names or {}).get(name, name) for name in series}
    figure = go.Figure()
    for index, name in enumerate(series):
        rows = where(part, series=name)
        rows = cast(pd.DataFrame, rows.loc[[channel in shown for channel in rows["channel"]]])
        figure.add_trace(
            go.Scatter(
                x=rows["value"].astype(float).tolist(),
                y=[printed[channel] for channel in rows["channel"]],
                orientation="h",
                error_x={**half_widths(rows), "thickness": 1, "width": 2},
                mode="markers",
                marker=theme.marker(index, size=5),
                offsetgroup=name,
                name=called[name],
            )
        )
    lines = -(-sum(len(called[name]) + 5 for name in series) // max(width // 6, 1))
    top = _LEGEND * lines + 4
    height = len(shown) * (_ROW * len(series) + _GAP) + _FRAME + top
    small = {"size": _FONT}
    figure.update_xaxes(
        range=[-0.02, 1.02],
        tickformat=".0%",
        nticks=6,
        title={"text": with_n(TITLES[metric], part), "font": small, "standoff": 2},
        tickfont=small,
        ticklen=3,
    )
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[printed[channel] for channel in shown],
        autorange="reversed",
        showgrid=False,
        tickfont=small,
        ticklen=3,
    )
    figure.update_layout(
        template=theme.TEMPLATE,
        width=width,
        height=height,
        font=small,
        scattermode="group",
        scattergap=0.3,
        margin={"l": 4, "r": 6, "t": top, "b": 4},
        legend={"font": small, "y": 1.0, "yanchor": "bottom", "x": 0, "itemwidth": 30, "tracegroupgap": 0},
    )
    return figure
