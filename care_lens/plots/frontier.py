"""Settings of a defence by what they cost: attack success against right benign answers."""

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, half_widths, where, with_n

_COLUMNS = ("candidate", "role", "metric", "value", "ci_low", "ci_high", "n", "on_frontier", "chosen")


def plot_frontier(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Every setting and control with its intervals; the settings that no other beats are joined by a line.

    A setting is on the frontier in three figures, over-refusal among them, so that the line need not be monotone here. The good
    corner is the lower right.

    Args:
        result: A ``Frontier`` or its frame.

    Returns:
        The figure: traces "settings", "on the frontier", "chosen" and one for each control.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, _COLUMNS)
    tried, controls = where(frame, role="candidate"), where(frame, role="control")
    beaten = tried.query("not on_frontier and not chosen")
    series = [
        ("settings", beaten, 0),
        ("on the frontier", tried.query("on_frontier and not chosen"), 1),
        ("chosen", tried.query("chosen"), 2),
    ]
    names = list(dict.fromkeys(controls["candidate"]))
    series += [(str(name), where(controls, candidate=name), 3 + i) for i, name in enumerate(names)]
    figure = go.Figure()
    line = _paired(tried.query("on_frontier")).sort_values("x")
    if len(line) > 1:
        figure.add_trace(
            go.Scatter(
                x=line["x"].tolist(),
                y=line["y"].tolist(),
                mode="lines",
                line={"color": theme.COLOURS[1], "width": 1, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
                name="frontier",
            )
        )
    for name, part, index in series:
        if part.empty:
            continue
        points = _paired(part)
        right, asr = (where(part, metric=metric) for metric in ("utility", "asr"))
        figure.add_trace(
            go.Scatter(
                x=points["x"].tolist(),
                y=points["y"].tolist(),
                error_x={**half_widths(right), "thickness": 1, "width": 2},
                error_y={**half_widths(asr), "thickness": 1, "width": 2},
                customdata=points[["candidate", "refused", "n_x", "n_y"]].to_numpy(),
                hovertemplate=(
                    "%{customdata[0]}<br>right answers %{x:.1%} (n = %{customdata[2]})<br>attack success %{y:.1%} "
                    "(n = %{customdata[3]})<br>over-refusal %{customdata[1]:.1%}"
                ),
                mode="markers",
                marker={
                    "size": 13 if name == "chosen" else 9,
                    "color": theme.COLOURS[index % len(theme.COLOURS)],
                    "symbol": theme.SYMBOLS[index % len(theme.SYMBOLS)],
                },
                name=name,
            )
        )
    share = {"tickformat": ".0%", "range": [-0.03, 1.03]}
    figure.update_layout(
        template=theme.TEMPLATE,
        height=460,
        showlegend=True,
        xaxis={"title": {"text": with_n("right answers to benign prompts", where(frame, metric="utility"))}, **share},
        yaxis={"title": {"text": with_n("attack success", where(frame, metric="asr"))}, **share},
    )
    return figure


def _paired(part: pd.DataFrame) -> pd.DataFrame:
    """One row for each setting, with its figures as x, y and refused; in the order of the frame."""
    right, asr, refused = (where(part, metric=metric) for metric in ("utility", "asr", "over_refusal"))
    return pd.DataFrame(
        {
            "candidate": right["candidate"].to_numpy(),
            "x": right["value"].to_numpy(dtype=float),
            "y": asr["value"].to_numpy(dtype=float),
            "refused": refused["value"].to_numpy(dtype=float),
            "n_x": right["n"].to_numpy(),
            "n_y": asr["n"].to_numpy(),
        }
    )
