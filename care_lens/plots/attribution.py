"""Attributions, their check by exact patching, attention knockouts and path effects."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import component_label, frame_of, half_widths, largest_of, marked, only, where, with_n

_INTERVAL = ("value", "ci_low", "ci_high", "n")
_UNITS = {"site": "sites", "head": "heads", "neuron": "neurons", "patch": "patches"}


def plot_attribution(result: FrameResult | pd.DataFrame, *, top: int = 12) -> go.Figure:
    """The largest attributions of each kind of unit (in size), with intervals.

    Args:
        result: An ``AttributionResult`` or its frame.
        top: How many of each kind.

    Returns:
        The figure: one curve a kind.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("kind", "mediator", "position", *_INTERVAL))
    figure, drawn = go.Figure(), 0
    for index, kind in enumerate(dict.fromkeys(frame["kind"])):
        part = where(frame, kind=kind)
        order = part["value"].astype(float).abs().to_numpy().argsort()[::-1][:top]
        part = part.iloc[order]
        drawn += len(part)
        labels = [
            name if position == "all" else f"{name}, {position}"
            for name, position in zip(part["mediator"], part["position"], strict=True)
        ]
        figure.add_trace(_points(part, labels, str(kind), index))
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(
        title_text=with_n(str(frame["effect"].iloc[0]) if "effect" in frame.columns else "value", frame)
    )
    figure.update_layout(template=theme.TEMPLATE, height=160 + 20 * drawn)
    return figure


def plot_verified(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Rank correlation and miss rate of each kind of unit, with intervals.

    Args:
        result: A ``VerifiedResult`` or its frame.

    Returns:
        The figure: one curve a measure. Kinds of units whose effects are all the same, as those of a tower that gets the same picture in both
        twins, have no rank: they are left out, and named under the axis.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("tower", "component", "effect", *_INTERVAL))
    units = [
        f"{row['tower']} {_UNITS.get(str(row['kind']), str(row['kind']))}, {component_label(str(row['component']))}"
        for row in frame.to_dict("records")
    ]
    frame = frame.assign(unit=units)
    known = set(frame.loc[frame["value"].notna(), "unit"])
    unknown = [unit for unit in dict.fromkeys(units) if unit not in known] if known else []
    frame = pd.DataFrame(frame[~frame["unit"].isin(unknown)])
    figure = go.Figure()
    for index, effect in enumerate(dict.fromkeys(frame["effect"])):
        part = where(frame, effect=effect)
        figure.add_trace(_points(part, part["unit"].tolist(), str(effect), index))
    figure.update_yaxes(autorange="reversed", type="category")
    beneath = f"<br>no effect to rank: {_told(unknown, known)}" if unknown else ""
    figure.update_xaxes(title_text=f"{with_n('correlation or share', frame, 'units')}{beneath}")
    figure.update_layout(template=theme.TEMPLATE, height=180 + 60 * frame["unit"].nunique() + 20 * bool(unknown))
    return figure


def _told(unknown: list[str], known: set[str]) -> str:
    """Units by name, or their tower alone where it has no others."""
    others = {unit.partition(" ")[0] for unit in known}
    towers = dict.fromkeys(unit.partition(" ")[0] for unit in unknown if unit.partition(" ")[0] not in others)
    whole = [tower if tower == "projector" else f"{tower} tower" for tower in towers]
    return "; ".join([*whole, *(unit for unit in unknown if unit.partition(" ")[0] in others)])


def plot_knockout(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Effect of an attention knockout by window of layers: one curve a way of knocking out and effect, told apart by colour, symbol and dash.

    Args:
        result: A ``KnockoutResult`` or its frame.

    Returns:
        The figure.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("layers", "mode", "effect", "position", *_INTERVAL))
    figure = go.Figure()
    for index, (mode, effect) in enumerate(dict.fromkeys(zip(frame["mode"], frame["effect"], strict=True))):
        part = where(frame, mode=mode, effect=effect)
        figure.add_trace(
            go.Scatter(
                x=part["layers"].tolist(),
                y=part["value"].astype(float).tolist(),
                error_y={**half_widths(part), "thickness": 1.5, "width": 3},
                mode="lines+markers",
                **theme.series(index),
                customdata=part["n"].tolist(),
                hovertemplate="layers %{x}: %{y:.3g}, n = %{customdata}",
                name=f"{effect}, {mode}",
            )
        )
    figure.add_hline(y=0, line={"width": 1})
    figure.update_xaxes(
        title_text=with_n(f"layers in which {frame['position'].iloc[0]} is cut", frame), type="category"
    )
    figure.update_yaxes(title_text="change of the outcome")
    figure.update_layout(template=theme.TEMPLATE)
    return figure


def plot_paths(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Path effects, senders by receivers; a dot marks those whose interval excludes 0 and that are at least 5 % of the largest.

    Args:
        result: A ``PathResult`` or its frame.

    Returns:
        The figure, one heat map of the first position.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("sender", "receiver", "position", *_INTERVAL))
    part = only(frame, "position", str(frame["position"].iloc[0]))
    senders, receivers = list(dict.fromkeys(part["sender"])), list(dict.fromkeys(part["receiver"]))
    value = np.full((len(senders), len(receivers)), np.nan)
    text = np.full(value.shape, "", dtype=object)
    for cell in part.assign(mark=marked(part, largest_of(part["value"]))).to_dict("records"):
        at = senders.index(cell["sender"]), receivers.index(cell["receiver"])
        value[at] = cell["value"]
        text[at] = "\N{BLACK CIRCLE}" if cell["mark"] else ""
    limit = largest_of(value) or 1.0
    heat = go.Heatmap(
        z=value,
        x=receivers,
        y=senders,
        text=text,
        texttemplate="%{text}",
        colorscale=theme.DIVERGING,
        zmin=-limit,
        zmid=0,
        zmax=limit,
        xgap=1,
        ygap=1,
        colorbar={"title": {"text": "effect"}, "nticks": 5},
        hovertemplate="%{y} to %{x}: %{z:.3g}<extra></extra>",
    )
    figure = go.Figure(heat)
    figure.update_xaxes(title_text=with_n("receiver", part), type="category")
    figure.update_yaxes(title_text="sender", type="category", autorange="reversed")
    figure.update_layout(template=theme.TEMPLATE, height=340 + 26 * len(senders))
    return figure


def _points(part: pd.DataFrame, labels: list[str], name: str, index: int) -> go.Scatter:
    return go.Scatter(
        x=part["value"].astype(float).tolist(),
        y=labels,
        error_x={**half_widths(part), "thickness": 1.5, "width": 3},
        mode="markers",
        marker=theme.marker(index),
        customdata=part["n"].tolist(),
        hovertemplate="%{y}: %{x:.3g}, n = %{customdata}",
        name=name,
    )
