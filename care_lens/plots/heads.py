"""Effects of heads by layer and head, and of mediators that have no such place."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.core.site import Site
from care_lens.plots import theme
from care_lens.plots.effects import plot_effects
from care_lens.plots.frames import MARK, frame_of, half_widths, largest_of, marked, only, towers_in_order, where, with_n

_COLUMNS = ("tower", "layer", "head", "position", "effect", "value", "ci_low", "ci_high")
_CELL, _GAP, _MARGINS = 26, 70, 160
MOST = 30


def plot_heads(result: FrameResult | pd.DataFrame, *, effect: str | None = None) -> go.Figure:
    """Effects of attention heads, layers by heads, one panel a tower and a set of positions.

    Args:
        result: A ``MediationResult`` of heads (``mediate(lvlm, pairs, sites=heads(lvlm))``), an ``AttributionResult``, or the frame of one;
            rows that are no heads are left out.
        effect: Which effect; None: "NIE" if it is there, else the first.

    Returns:
        The figure. A dot marks cells whose interval excludes 0 and that are at least 5 % of the largest.

    Raises:
        ValueError: If the frame has no heads, or no such effect.
    """
    frame = frame_of(result, _COLUMNS)
    frame = pd.DataFrame(frame[frame["head"].notna() & frame["layer"].notna()])
    if frame.empty:
        raise ValueError("result must hold attention heads, got none; mediate with sites=heads(lvlm)")
    if effect is None:
        effect = "NIE" if "NIE" in set(frame["effect"]) else str(frame["effect"].iloc[0])
    frame = pd.DataFrame(only(frame, "effect", effect)).astype({"layer": int, "head": int})
    panels = [
        (tower, str(position))
        for tower in towers_in_order(frame["tower"])
        for position in dict.fromkeys(where(frame, tower=tower)["position"])
    ]
    rows = [int(where(frame, tower=tower)["layer"].max()) + 1 for tower, _ in panels]
    height = _CELL * sum(rows) + _GAP * (len(panels) - 1) + _MARGINS
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=rows,
        vertical_spacing=_GAP / (height - _MARGINS) if len(panels) > 1 else 0.0,
        subplot_titles=[
            f"{tower} tower, {'all' if tower != 'language' else position} tokens" for tower, position in panels
        ],
    )
    largest = largest_of(frame["value"])
    for row, (tower, position) in enumerate(panels, start=1):
        part = where(frame, tower=tower, position=position)
        layers, heads = int(part["layer"].max()) + 1, int(part["head"].max()) + 1
        value, text = np.full((layers, heads), np.nan), np.full((layers, heads), "", dtype=object)
        detail = np.full((layers, heads, 2), np.nan)
        at = part["layer"].to_numpy(), part["head"].to_numpy()
        value[at] = part["value"].to_numpy(dtype=float)
        text[at] = np.where(marked(part, largest), MARK, "")
        detail[at] = part[["ci_low", "ci_high"]].to_numpy(dtype=float)
        heat = go.Heatmap(
            z=value,
            text=text,
            texttemplate="%{text}",
            textfont={"size": 9},
            customdata=detail,
            hovertemplate=f"layer %{{y}}, head %{{x}}<br>{effect} %{{z:.3g}} [%{{customdata[0]:.3g}}, %{{customdata[1]:.3g}}]<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            name=effect,
        )
        figure.add_trace(heat, row=row, col=1)
        figure.update_yaxes(title_text="layer", dtick=max(1, layers // 8), row=row, col=1)
        figure.update_xaxes(dtick=max(1, heads // 16), row=row, col=1)
    figure.update_xaxes(showgrid=False, showline=False, ticks="", zeroline=False)
    figure.update_yaxes(showgrid=False, showline=False, ticks="", zeroline=False)
    figure.update_xaxes(title_text=with_n("head", frame, "pairs"), row=len(panels), col=1)
    figure.update_annotations(x=0, xanchor="left")
    limit = largest or 1.0
    bar = {"title": {"text": effect, "side": "top"}, "thickness": 16, "tickformat": ".3~g"}
    scale = {"colorscale": theme.DIVERGING, "cmin": -limit, "cmid": 0, "cmax": limit, "colorbar": bar}
    figure.update_layout(template=theme.TEMPLATE, height=height, coloraxis=scale, margin={"t": 50})
    return figure


def plot_mediators(result: FrameResult | pd.DataFrame, *, effect: str = "NIE", top: int = MOST) -> go.Figure:
    """Effects of mediators of any kind (neurons, groups of sites), the largest in size first, with intervals.

    Args:
        result: A ``MediationResult`` or its frame.
        effect: Which effect.
        top: How many of each set of positions.

    Returns:
        The figure: one curve a set of positions.

    Raises:
        ValueError: If the frame is not such, or has no such effect.
    """
    frame = only(frame_of(result, ("mediator", "position", "effect", "value", "ci_low", "ci_high")), "effect", effect)
    figure, drawn = go.Figure(), set()
    for index, position in enumerate(dict.fromkeys(frame["position"])):
        part = where(frame, position=position)
        order = part["value"].astype(float).abs().to_numpy().argsort(kind="stable")[::-1][:top]
        part = part.iloc[order]
        drawn |= set(part["mediator"])
        figure.add_trace(
            go.Scatter(
                x=part["value"].astype(float).tolist(),
                y=part["mediator"].tolist(),
                error_x={**half_widths(part), "thickness": 1.5, "width": 3},
                mode="markers",
                marker=theme.marker(index),
                hovertemplate="%{y}: %{x:.3g}",
                name=str(position),
            )
        )
    figure.add_vline(x=0, line={"width": 1, "color": theme.INK})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title_text=with_n(effect, frame, "pairs"))
    figure.update_layout(template=theme.TEMPLATE, height=160 + 22 * len(drawn), showlegend=len(tuple(figure.data)) > 1)
    return figure


def plot_mediation(result: FrameResult | pd.DataFrame) -> go.Figure:
    """The figure that fits the mediators: whole sites by layer, heads by layer and head, and others one under another.

    Args:
        result: A ``MediationResult`` or its frame. Of whole sites together with parts of sites, the whole sites are drawn.

    Returns:
        The figure of :func:`plot_effects`, :func:`plot_heads` or :func:`plot_mediators`.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("mediator", "component", "head", "neuron", "position", "effect", "value"))
    site = [_is_site(str(name)) for name in frame["mediator"]]
    if any(site):
        return plot_effects(pd.DataFrame(frame[site]))
    return plot_heads(frame) if bool(frame["head"].notna().all()) else plot_mediators(frame)


def _is_site(name: str) -> bool:
    """Whether a mediator is a whole site: it is called as one."""
    try:
        Site.parse(name)
    except ValueError:
        return False
    return True
