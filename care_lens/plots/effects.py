"""Mediation effects as heat maps: components by layers, one panel a tower and a set of positions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import (
    MARK,
    component_label,
    frame_of,
    in_order,
    is_token,
    largest_of,
    marked,
    only,
    towers_in_order,
    where,
    with_n,
)
from care_lens.plots.positions import plot_positions

_COLUMNS = ("tower", "layer", "component", "position", "effect", "value", "ci_low", "ci_high", "n")
_CELL, _GAP, _MARGINS = 34, 58, 170


class _Panel(NamedTuple):
    tower: str
    position: str
    components: list[str]
    layers: int

    @property
    def title(self) -> str:
        if self.tower != "language":
            return {"vision": "vision tower"}.get(self.tower, self.tower)
        return f"language tower, {self.position} token{'s' * (self.position != 'last')}"


def plot_effects(result: FrameResult | pd.DataFrame, *, effect: str = "NIE") -> go.Figure:
    """Effects by layer, component and positions.

    A menu in the interactive figure switches between the effects of the result; each has a scale of its own.
    A dot marks cells whose interval excludes 0 and that are at least 5 % of the effect's largest cell. Panels in which nothing is
    exchanged, because both twins have the same there (the same picture, say), are left out and named below the figure. Single tokens
    (``positions=("each",)``) have a figure of their own, :func:`~care_lens.plots.plot_positions`: a frame that holds nothing else of the language
    tower is drawn by it, one token a column.

    Args:
        result: A ``MediationResult`` or its frame: columns tower, layer (missing outside the blocks),
            component, position, effect, value, ci_low, ci_high, n.
        effect: The effect shown first, and in static pictures.

    Returns:
        The figure: one heat map an effect and panel, of which those of ``effect`` are visible.

    Raises:
        ValueError: If the frame is not such, has no such effect, or no value at all.
    """
    frame = frame_of(result, _COLUMNS)
    only(frame, "effect", effect)
    if frame["value"].isna().all():
        raise ValueError(
            f"frame must hold a value, got {len(frame)} rows whose values are all missing; the log of the run names what failed"
        )
    single = frame["position"].map(is_token)
    if single.any():
        spans = pd.DataFrame(frame[~single])
        if not (spans["tower"] == "language").any():
            return plot_positions(pd.DataFrame(frame[single]), effect=effect)
        frame = spans
    effects = list(dict.fromkeys(frame["effect"]))
    panels, blank = _told_apart(frame, _panels(frame))
    rows = [len(panel.components) for panel in panels]
    height = _CELL * sum(rows) + _GAP * (len(panels) - 1) + _MARGINS
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        row_heights=rows,
        vertical_spacing=_GAP / (height - _MARGINS) if len(panels) > 1 else 0.0,
        subplot_titles=[panel.title for panel in panels],
    )
    for name in effects:
        largest = largest_of(where(frame, effect=name)["value"])
        for row, panel in enumerate(panels, start=1):
            part = where(frame, effect=name, tower=panel.tower, position=panel.position)
            figure.add_trace(_heatmap(part, panel, name, largest=largest, visible=name == effect), row=row, col=1)
    widest = max(panel.layers for panel in panels)
    figure.update_xaxes(range=[-0.5, widest - 0.5], showgrid=False, showline=False, ticks="")
    figure.update_yaxes(showgrid=False, showline=False, ticks="", autorange="reversed")
    for row, panel in enumerate(panels, start=1):
        layers = [] if panel.tower == "projector" else list(range(0, panel.layers, max(1, widest // 12)))
        figure.update_xaxes(tickvals=layers, row=row, col=1)
    figure.update_annotations(x=0, xanchor="left")
    told = with_n("layer", frame, "pairs")
    if blank:
        told += f"<br>the same in both twins: {', '.join(panel.title for panel in blank)}"
    if single.any():
        told += f"<br>{single.sum()} rows of single tokens: see plot_positions"
    figure.update_xaxes(title_text=told, row=len(panels), col=1)
    figure.update_layout(
        template=theme.TEMPLATE,
        height=height,
        coloraxis=_scale(frame, effect),
        updatemenus=_menu(frame, effects, effect, len(panels)),
        margin={"t": 90},
    )
    return figure


def _panels(frame: pd.DataFrame) -> list[_Panel]:
    """Towers in the order of the forward pass, positions in the order of the frame."""
    panels = []
    for tower in towers_in_order(frame["tower"]):
        for position in dict.fromkeys(where(frame, tower=tower)["position"]):
            here = where(frame, tower=tower, position=position)
            layers = 1 if pd.isna(here["layer"]).all() else int(here["layer"].max()) + 1
            panels.append(_Panel(tower, position, in_order(here["component"]), layers))
    return panels


def _told_apart(frame: pd.DataFrame, panels: list[_Panel]) -> tuple[list[_Panel], list[_Panel]]:
    """Panels in which something is exchanged, and those in which both twins have the same; all are of the first kind if none is."""
    by_exchange = pd.DataFrame(frame[frame["effect"].isin(("NIE", "TIE"))])
    if by_exchange.empty:
        return panels, []
    shown, blank = [], []
    for panel in panels:
        part = where(by_exchange, tower=panel.tower, position=panel.position)
        (shown if part.empty or largest_of(part["value"]) > 0 else blank).append(panel)
    return (shown, blank) if shown else (panels, [])


def _heatmap(part: pd.DataFrame, panel: _Panel, effect: str, *, largest: float, visible: bool) -> go.Heatmap:
    shape = (len(panel.components), panel.layers)
    value = np.full(shape, np.nan)
    text = np.full(shape, "", dtype=object)
    detail = np.full((*shape, 3), np.nan)
    cells = part.assign(mark=marked(part, largest)).to_dict("records")
    for cell in cells:
        at = panel.components.index(cell["component"]), 0 if pd.isna(cell["layer"]) else int(cell["layer"])
        value[at] = cell["value"]
        text[at] = MARK if cell["mark"] else ""
        detail[at] = cell["ci_low"], cell["ci_high"], cell["n"]
    return go.Heatmap(
        z=value,
        x=list(range(panel.layers)),
        y=[component_label(component) for component in panel.components],
        text=text,
        texttemplate="%{text}",
        textfont={"size": 10},
        customdata=detail,
        hovertemplate=(
            f"{panel.title}<br>layer %{{x}}, %{{y}}<br>{effect} %{{z:.3f}} "
            "[%{customdata[0]:.3f}, %{customdata[1]:.3f}], n = %{customdata[2]}<extra></extra>"
        ),
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        name=effect,
        visible=visible,
    )


def _scale(frame: pd.DataFrame, effect: str) -> dict[str, object]:
    """Symmetric around 0, as far as the effect's largest cell."""
    limit = largest_of(where(frame, effect=effect)["value"]) or 1.0
    bar = {"title": {"text": effect, "side": "top"}, "thickness": 16, "tickformat": ".3~g"}
    return {"colorscale": theme.DIVERGING, "cmin": -limit, "cmid": 0, "cmax": limit, "colorbar": bar}


def _menu(frame: pd.DataFrame, effects: Sequence[str], first: str, panels: int) -> list[dict[str, object]]:
    if len(effects) == 1:
        return []
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [
                {"visible": [name == shown for shown in effects for _ in range(panels)]},
                {"coloraxis": _scale(frame, name)},
            ],
        }
        for name in effects
    ]
    place = {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 34}}
    return [
        {
            "type": "dropdown",
            "direction": "down",
            "active": list(effects).index(first),
            "buttons": buttons,
            **place,
        }
    ]
