"""Places ranked by how far they carry the unsafe answer."""

import pandas as pd
import plotly.graph_objects as go

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, with_n

SHOWN = 20
_COLUMNS = ("rank", "mediator", "position", "score", "ci_low", "ci_high", "sufficient", "necessary", "first", "reason")


def plot_localisation(result: FrameResult | pd.DataFrame, *, shown: int = SHOWN) -> go.Figure:
    """The leading places: score with its interval, and the two shares it is the mean of.

    Args:
        result: A ``Localisation`` or its frame.
        shown: How many places, from the first.

    Returns:
        The figure, the first place on top.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, _COLUMNS).sort_values(by="rank").head(shown)
    twice = frame["mediator"].duplicated(keep=False)
    frame = frame.assign(mediator=frame["mediator"].where(~twice, frame["mediator"] + ", " + frame["position"]))
    bars = {
        "type": "data",
        "symmetric": False,
        "array": (frame["ci_high"] - frame["score"]).clip(lower=0),
        "arrayminus": (frame["score"] - frame["ci_low"]).clip(lower=0),
    }
    figure = go.Figure(
        go.Scatter(
            x=frame["score"], y=frame["mediator"], mode="markers", name="score", error_x=bars, text=frame["reason"],
            marker={"color": theme.COLOURS[0], "size": 9},
        )
    )  # fmt: skip
    for index, name in enumerate(("sufficient", "necessary"), start=1):
        marker = theme.marker(index, size=7)
        figure.add_trace(go.Scatter(x=frame[name], y=frame["mediator"], mode="markers", name=name, marker=marker))
    figure.update_yaxes(autorange="reversed", title_text="")
    figure.update_xaxes(title_text=with_n("share of the total effect", frame, "pairs"))
    figure.update_layout(template=theme.TEMPLATE, height=140 + 26 * len(frame))
    return figure
