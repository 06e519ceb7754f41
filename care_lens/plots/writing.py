"""Tokens and neurons that a subspace writes towards."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, token_label, where

_COLUMNS = ("kind", "of", "sign", "rank", "unit", "value", "chance")


def plot_writing(result: FrameResult | pd.DataFrame, *, kind: str = "token", top: int = 5) -> go.Figure:
    """The leading tokens (or neurons) of each direction and point, of both signs.

    Args:
        result: A ``Writing`` or its frame.
        kind: "token" or "neuron".
        top: How many of each sign.

    Returns:
        The figure: one curve a direction or point; hovering tells what chance would give. Directions (whose unit is the change of a logit per
        unit length) and points (centred logits) have a panel each.

    Raises:
        ValueError: If the frame is not such, or has none of that kind.
    """
    frame = frame_of(result, _COLUMNS)
    frame = pd.DataFrame(frame[(frame["kind"] == kind) & (frame["rank"] <= top)])
    if frame.empty:
        raise ValueError(
            f"the result must hold units of kind {kind!r}, got none; there are no tokens in the vision tower"
        )
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(frame["of"]):
        groups.setdefault(_unit(kind, str(name)), []).append(str(name))
    rows = [int(frame["of"].isin(names).sum()) for names in groups.values()]
    height = 150 + 90 * (len(groups) - 1) + 20 * len(frame)
    figure = make_subplots(
        rows=len(groups),
        cols=1,
        row_heights=rows,
        vertical_spacing=90 / (height - 150) if len(groups) > 1 else 0.0,
    )
    index = 0
    for row, (unit, names) in enumerate(groups.items(), start=1):
        for name in names:
            part = where(frame, of=name).sort_values("value", ascending=False)
            trace = go.Scatter(
                x=part["value"].tolist(),
                y=[f"{name}: {token_label(str(unit))}" for unit in part["unit"]],
                mode="markers",
                marker=theme.marker(index),
                customdata=part["chance"].tolist(),
                hovertemplate="%{y}: %{x:.3g}; largest by chance %{customdata:.3g}<extra></extra>",
                name=name,
            )
            figure.add_trace(trace, row=row, col=1)
            index += 1
        figure.add_vline(x=0, line={"width": 1, "color": theme.INK}, row=row, col=1)  # type: ignore[arg-type]
        figure.update_xaxes(title_text=unit, row=row, col=1)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(template=theme.TEMPLATE, height=height)
    return figure


def _unit(kind: str, name: str) -> str:
    """The unit of the values of a direction or a point."""
    if kind != "token":
        return "cosine"
    return "change of the centred logit per unit length" if name.startswith("direction ") else "centred logit"
