"""Tokens and neurons that a subspace writes towards."""

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, where

_COLUMNS = ("kind", "of", "sign", "rank", "unit", "value", "chance")


def plot_writing(result: FrameResult | pd.DataFrame, *, kind: str = "token", top: int = 5) -> go.Figure:
    """The leading tokens (or neurons) of each direction and point, of both signs.

    Args:
        result: A ``Writing`` or its frame.
        kind: "token" or "neuron".
        top: How many of each sign.

    Returns:
        The figure: one curve a direction or point; hovering tells what chance would give.

    Raises:
        ValueError: If the frame is not such, or has none of that kind.
    """
    frame = frame_of(result, _COLUMNS)
    frame = pd.DataFrame(frame[(frame["kind"] == kind) & (frame["rank"] <= top)])
    if frame.empty:
        raise ValueError(
            f"the result must hold units of kind {kind!r}, got none; there are no tokens in the vision tower"
        )
    figure = go.Figure()
    for index, name in enumerate(dict.fromkeys(frame["of"])):
        part = where(frame, of=name).sort_values("value", ascending=False)
        figure.add_trace(
            go.Scatter(
                x=part["value"].tolist(),
                y=[f"{name}: {unit}" for unit in part["unit"]],
                mode="markers",
                marker=theme.marker(index),
                customdata=part["chance"].tolist(),
                hovertemplate="%{y}: %{x:.3g}; largest by chance %{customdata:.3g}<extra></extra>",
                name=name,
            )
        )
    figure.add_vline(x=0, line={"width": 1})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(
        title_text="centred logit (points), its change per unit length (directions)" if kind == "token" else "cosine"
    )
    figure.update_layout(template=theme.TEMPLATE, height=160 + 20 * len(frame))
    return figure
