"""Edges between heads and MLPs of both towers, their check, and circuits of them."""

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, half_widths, with_n

_INTERVAL = ("value", "ci_low", "ci_high", "n")


def plot_edges(result: FrameResult | pd.DataFrame, *, top: int = 20) -> go.Figure:
    """The leading edges with their scores.

    Args:
        result: An ``EdgeResult`` or its frame.
        top: How many.

    Returns:
        The figure, the largest score on top.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("sender", "receiver", *_INTERVAL))
    part = frame.iloc[frame["value"].astype(float).abs().to_numpy().argsort(kind="stable")[::-1][:top]]
    labels = [
        f"{_short(a)} \N{RIGHTWARDS ARROW} {_short(b)}" for a, b in zip(part["sender"], part["receiver"], strict=True)
    ]
    figure = go.Figure(
        go.Scatter(
            x=part["value"].astype(float).tolist(), y=labels, error_x={**half_widths(part), "thickness": 1.5, "width": 3}, mode="markers",
            marker=theme.marker(0), hovertemplate="%{y}: %{x:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_vline(x=0, line={"width": 1})
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(title_text=with_n("edge estimate, in the outcome's unit", part, "pairs"))
    figure.update_layout(template=theme.TEMPLATE, height=140 + 22 * len(part), margin={"t": 20})
    return figure


def plot_edge_verification(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Exact effects of edges against their scores, leading ones and those drawn at random.

    Args:
        result: An ``EdgeVerification`` or its details.

    Returns:
        The figure; on the dashed line score and exact effect agree.

    Raises:
        ValueError: If they are not such.
    """
    details = frame_of(getattr(result, "details", result), ("sender", "receiver", "top", "estimate", *_INTERVAL))
    figure = go.Figure()
    for index, (flag, name) in enumerate(((1.0, "leading"), (0.0, "drawn at random"))):
        part = pd.DataFrame(details[details["top"] == flag])
        if part.empty:
            continue
        figure.add_trace(
            go.Scatter(
                x=part["estimate"].tolist(), y=part["value"].tolist(), error_y={**half_widths(part), "thickness": 1, "width": 2},
                mode="markers", marker=theme.marker(index), name=name,
                text=[f"{_short(a)} \N{RIGHTWARDS ARROW} {_short(b)}" for a, b in zip(part["sender"], part["receiver"], strict=True)],
                hovertemplate="%{text}<br>score %{x:.3g}, exact %{y:.3g}<extra></extra>",
            )
        )  # fmt: skip
    ends = [float(details["estimate"].min()), float(details["estimate"].max())]
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", line={"color": "#8a929b", "dash": "dash"}, name="equal", hoverinfo="skip"
        )
    )
    figure.update_xaxes(title_text=with_n("edge estimate", details, "pairs"))
    figure.update_yaxes(title_text="exact effect of the edge")
    figure.update_layout(template=theme.TEMPLATE, height=420)
    return figure


def plot_faithfulness(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Share of the total effect that circuits leave, by size, with the range of random circuits.

    Args:
        result: A ``FaithfulnessResult`` or its frame.

    Returns:
        The figure.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, ("edges", "nodes", "chance", "chance_low", "chance_high", *_INTERVAL)).sort_values("edges")
    x = frame["edges"].astype(int).tolist()
    figure = go.Figure()
    grey = "#8a929b"
    figure.add_trace(
        go.Scatter(
            x=x, y=frame["chance_low"].tolist(), mode="lines", line={"width": 0}, showlegend=False, hoverinfo="skip"
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x, y=frame["chance_high"].tolist(), mode="lines", line={"width": 0}, fill="tonexty", fillcolor="rgba(138,146,155,0.25)",
            name="random circuits, range", hoverinfo="skip",
        )
    )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=x,
            y=frame["chance"].tolist(),
            mode="lines",
            line={"color": grey, "dash": "dash"},
            name="random circuits, mean",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=x, y=frame["value"].astype(float).tolist(), error_y={**half_widths(frame), "thickness": 1.5, "width": 3}, mode="lines+markers",
            marker=theme.marker(0), line={"color": theme.COLOURS[0]}, name="leading edges", customdata=frame["nodes"].tolist(),
            hovertemplate="%{x} edges, %{customdata} heads and MLPs: %{y:.3g}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_hline(y=1, line={"width": 1, "dash": "dot"})
    figure.update_xaxes(title_text=with_n("leading edges in the circuit", frame, "pairs"))
    figure.update_yaxes(title_text="faithfulness (share of TE)")
    figure.update_layout(template=theme.TEMPLATE, height=420)
    return figure


def _short(name: str) -> str:
    """A node in few characters: v2.h1 (head 1 of vision block 2), 5.mlp, projector, end."""
    if name == "end" or name.startswith("projector"):
        return name.partition(".")[0]
    tower = "v" if name.startswith("vision.") else ""
    layer, _, rest = name.removeprefix("vision.").removeprefix("blocks.").partition(".")
    return f"{tower}{layer}.{'h' + rest.partition('[')[2].rstrip(']') if '[' in rest else 'mlp'}"
