"""At which rank methods put a planted place."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, half_widths, only, with_n


def plot_scorecard(result: FrameResult | pd.DataFrame) -> go.Figure:
    """The mean rank of each method with its interval, every case as a small mark behind it, and chance.

    Args:
        result: A ``Scorecard`` or its frame.

    Returns:
        The figure, on a logarithmic scale from rank 1.

    Raises:
        ValueError: If the frame is not such.
    """
    part = only(
        frame_of(result, ("method", "metric", "value", "ci_low", "ci_high", "chance", "n")), "metric", "mean rank"
    )
    methods = part["method"].tolist()
    figure = go.Figure()
    details = getattr(result, "details", None)
    if details is not None and len(details):
        cases = details[(details["took"] == 1) & details["rank"].notna()]
        jitter = np.random.default_rng(0).uniform(-0.22, 0.22, size=len(cases))
        figure.add_trace(
            go.Scatter(
                x=cases["rank"].tolist(), y=[methods.index(m) + j for m, j in zip(cases["method"], jitter, strict=True)], mode="markers",
                marker={"color": "#8a929b", "size": 5, "opacity": 0.6}, name="one plant and dose",
                text=[f"{p}, dose {d:g}" for p, d in zip(cases["plant"], cases["dose"], strict=True)], hovertemplate="%{text}: rank %{x}<extra></extra>",
            )
        )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=part["value"].astype(float).tolist(), y=list(range(len(methods))), error_x={**half_widths(part), "thickness": 2, "width": 4},
            mode="markers", marker=theme.marker(0, size=10), name="mean rank", hovertemplate="%{x:.3g}<extra></extra>",
        )
    )  # fmt: skip
    chance = float(part["chance"].mean())
    figure.add_vline(x=chance, line={"dash": "dash", "color": "#8a929b"})
    # On a logarithmic axis a line stands at its value, but a text at the logarithm of it.
    at = {"x": float(np.log10(chance)), "y": 1, "yref": "paper", "yanchor": "bottom"}
    figure.add_annotation(text="chance", showarrow=False, **at)
    most = float(np.nanmax([chance, *(details["of"].tolist() if details is not None and len(details) else [])]))
    figure.update_yaxes(tickvals=list(range(len(methods))), ticktext=methods, range=[len(methods) - 0.5, -0.5])
    figure.update_xaxes(
        title_text=with_n("rank of the planted place", part, "plants and doses"),
        type="log",
        range=[-0.05, float(np.log10(most)) + 0.03],
        tickvals=[1, 2, 3, 5, 10, 20],
    )
    figure.update_layout(template=theme.TEMPLATE, height=170 + 44 * len(methods))
    return figure
