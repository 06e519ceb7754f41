"""Ablation curves: what the model answers when one component of one layer is put out of action."""

from collections.abc import Hashable
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import component_label, frame_of, in_order, only, where, with_n

BASELINE = "none"
"""Component of the row without ablation."""

_COLUMNS = ("tower", "layer", "component", "metric", "effect", "value", "ci_low", "ci_high", "n")


def plot_ablation(result: FrameResult | pd.DataFrame, *, metric: str = "complied") -> go.Figure:
    """Share of answers by ablated layer, one curve a component, and the baseline as a dashed line.

    Args:
        result: An ``AblationResult`` or its frame.
        metric: Which share: "complied" (the attack success rate of harmful requests), "refused" or "other".

    Returns:
        The figure: a band (its interval) and a curve for each component.

    Raises:
        ValueError: If the frame is not such, has no such share, or lacks the baseline or an ablated component.
    """
    frame = only(only(frame_of(result, _COLUMNS), "effect", "share"), "metric", metric)
    baseline = only(frame, "component", BASELINE).to_dict("records")[0]
    if frame["layer"].isna().all():
        raise ValueError("frame must hold an ablated component, got the baseline alone; ablate a layer or more")
    figure = go.Figure()
    for index, component in enumerate(in_order(set(frame["component"]) - {BASELINE})):
        curve = where(frame, component=component).sort_values(by="layer")
        _add_curve(figure, curve, component_label(component), index)
    layers = frame["layer"].dropna().astype(int)
    figure.add_trace(_baseline(baseline, int(layers.min()), int(layers.max())))
    tower = next(iter(frame["tower"]))
    figure.update_layout(
        template=theme.TEMPLATE,
        height=420,
        xaxis={
            "title": {"text": with_n(f"ablated layer of the {tower} tower", frame, "answers")},
            "dtick": max(1, int(layers.max()) // 12),
        },
        yaxis={"title": {"text": f"share {metric}"}, "range": [-0.03, 1.06], "tickformat": ".0%"},
    )
    return figure


def _add_curve(figure: go.Figure, curve: pd.DataFrame, name: str, index: int) -> None:
    colour = theme.COLOURS[index % len(theme.COLOURS)]
    layers = curve["layer"].astype(int).tolist()
    low, high = curve["ci_low"].astype(float).tolist(), curve["ci_high"].astype(float).tolist()
    figure.add_trace(
        go.Scatter(
            x=layers + layers[::-1],
            y=high + low[::-1],
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.18,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            name=f"{name} interval",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=layers,
            y=curve["value"].astype(float).tolist(),
            customdata=curve[["ci_low", "ci_high", "n"]].astype(float).to_numpy(),
            hovertemplate=("layer %{x}<br>%{y:.1%} [%{customdata[0]:.1%}, %{customdata[1]:.1%}], n = %{customdata[2]}"),
            mode="lines+markers",
            **theme.series(index, size=9, width=3),
            legendgroup=name,
            name=name,
        )
    )


def _baseline(row: dict[Hashable, Any], first: int, last: int) -> go.Scatter:
    value, low, high = (float(row[column]) for column in ("value", "ci_low", "ci_high"))
    return go.Scatter(
        x=[first, last],
        y=[value, value],
        mode="lines",
        line={"dash": "dash", "color": theme.INK, "width": 2},
        hovertemplate=f"{value:.1%} [{low:.1%}, {high:.1%}], n = {row['n']}",
        name="no ablation",
    )
