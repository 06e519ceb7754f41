"""Safety against utility: where each defence stands."""

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.defence import DEFENCE_COLUMNS, with_series
from care_lens.plots.frames import frame_of, only


def plot_tradeoff(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Attack success against right answers on benign channels, one point a defence.

    A point is the mean over channels, each counted once; bars reach from the lowest to the highest channel
    and are no confidence intervals, which belong to single channels (see ``plot_asr``). The good corner is
    the lower right.

    Args:
        result: A ``DefenceTable`` or its frame, with the metrics "asr" and "accuracy".

    Returns:
        The figure: a trace a defence (judge and seed, where there are several).

    Raises:
        ValueError: If the frame is not such, or lacks one of the two metrics.
    """
    frame = with_series(frame_of(result, DEFENCE_COLUMNS))
    attack, benign = (
        only(frame, "metric", metric).groupby("series", sort=False)["value"].agg(["mean", "min", "max"])
        for metric in ("asr", "accuracy")
    )
    figure = go.Figure()
    for index, name in enumerate(name for name in attack.index if name in benign.index):
        x, y = benign.loc[name], attack.loc[name]
        figure.add_trace(
            go.Scatter(
                x=[float(x["mean"])],
                y=[float(y["mean"])],
                error_x=_range(x),
                error_y=_range(y),
                customdata=[[x["min"], x["max"], y["min"], y["max"]]],
                hovertemplate=(
                    "right answers %{x:.1%} (channels %{customdata[0]:.1%} to %{customdata[1]:.1%})<br>"
                    "attack success %{y:.1%} (channels %{customdata[2]:.1%} to %{customdata[3]:.1%})"
                ),
                mode="markers",
                marker={
                    "size": 12,
                    "color": theme.COLOURS[index % len(theme.COLOURS)],
                    "symbol": theme.SYMBOLS[index % len(theme.SYMBOLS)],
                },
                name=str(name),
            )
        )
    figure.update_layout(
        template=theme.TEMPLATE,
        height=460,
        showlegend=True,
        xaxis={
            "title": {"text": "right answers, benign channels"},
            "tickformat": ".0%",
            "range": [-0.03, 1.03],
        },
        yaxis={"title": {"text": "attack success"}, "tickformat": ".0%", "range": [-0.03, 1.03]},
    )
    return figure


def _range(row: pd.Series) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [float(row["max"] - row["mean"])],
        "arrayminus": [float(row["mean"] - row["min"])],
        "thickness": 1.5,
        "width": 4,
    }
