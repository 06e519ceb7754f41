"""How sure a safety subspace is: its spectrum and what held-out rows give, with intervals."""

import numpy as np
import plotly.graph_objects as go

from care_lens.plots import theme
from care_lens.subspace.uncertainty import SubspaceUncertainty

_SERIES = (("eigenvalue", "fit"), ("heldout_ratio", "held out"))


def plot_uncertainty(result: SubspaceUncertainty) -> go.Figure:
    """Malicious over benign energy along each direction, of the fit and on held-out rows.

    Args:
        result: The measured uncertainty.

    Returns:
        The figure, on a logarithmic scale. Bars are the intervals of the result; directions count from 1.
    """
    figure = go.Figure()
    for index, (metric, name) in enumerate(_SERIES):
        frame = result.of(metric)
        frame = frame.loc[frame["direction"] > 0]
        value, low, high = (frame[column].to_numpy(dtype=float) for column in ("value", "ci_low", "ci_high"))
        figure.add_trace(
            go.Scatter(
                x=frame["direction"],
                y=value,
                mode="markers",
                marker={"symbol": theme.SYMBOLS[index], "size": 8, "color": theme.COLOURS[index]},
                error_y={
                    "type": "data",
                    "symmetric": False,
                    # An inflated value may lie outside its own interval: the bar then ends at the marker.
                    "array": np.maximum(high - value, 0),
                    "arrayminus": np.maximum(value - low, 0),
                },
                hovertemplate="direction %{x}: %{y:.3g}",
                name=name,
            )
        )
    last = int(result.frame["direction"].max())
    same = {"mode": "lines", "line": {"dash": "dash", "color": theme.INK, "width": 2}, "hoverinfo": "skip"}
    figure.add_trace(go.Scatter(x=[1, last], y=[1, 1], name="1: as much as benign rows", **same))
    figure.update_layout(
        template=theme.TEMPLATE,
        height=400,
        xaxis={"title": {"text": "direction"}, **theme.whole(last)},
        yaxis={
            "title": {"text": "malicious / benign energy"},
            **theme.log_axis(
                [1.0, *result.frame.loc[result.frame["metric"].isin([m for m, _ in _SERIES]), "value"].astype(float)]
            ),
        },
        showlegend=True,
    )
    return figure
