"""Effects of single tokens: layers by positions, with the tokens' text, the picture's tokens folded into one column."""

from collections.abc import Sequence

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
    token_label,
    with_n,
)

_COLUMNS = ("layer", "component", "position", "effect", "value", "ci_low", "ci_high")
_ROW, _LEAST, _GAP, _MARGINS, _SHOWN = 22, 90, 64, 190, 60


def plot_positions(
    result: FrameResult | pd.DataFrame,
    *,
    effect: str = "NIE",
    tokens: Sequence[str] | None = None,
    image_token: str = "<image>",
) -> go.Figure:
    """Effects by layer and token, one panel per component.

    Args:
        result: A ``MediationResult`` of single tokens (``positions=("each",)`` or indices) or its frame; rows of spans and of other
            towers are left out.
        effect: Which effect.
        tokens: The text of each token of a row, by position; None: columns are called by their index. Of pairs of twins that differ in
            words, take one of them, or the words they share.
        image_token: Tokens that are this text are folded, each run of them into one column, which shows the effect that is largest in
            size. The image tokens of LLaVA are called so.

    Returns:
        The figure. A dot marks cells whose interval excludes 0 and that are at least 5 % of the largest.

    Raises:
        ValueError: If the frame has no single tokens or no such effect, or there are fewer tokens than positions.
    """
    frame = only(frame_of(result, _COLUMNS), "effect", effect)
    frame = pd.DataFrame(frame[frame["position"].map(is_token) & frame["layer"].notna()])
    if frame.empty:
        raise ValueError(
            "positions must be single tokens, got spans alone; mediate with positions=('each',), or see plot_effects"
        )
    frame = frame.assign(at=frame["position"].astype(int), layer=frame["layer"].astype(int))
    last = int(frame["at"].max())
    if tokens is not None and len(tokens) <= last:
        raise ValueError(f"tokens must be {last + 1} or more, one for each position, got {len(tokens)}")
    columns = _columns(sorted(set(frame["at"])), tokens, image_token)
    layers = sorted(set(frame["layer"]))
    components = in_order(frame["component"])
    largest = largest_of(frame["value"])
    panel = max(_ROW * len(layers), _LEAST)
    height = panel * len(components) + _GAP * (len(components) - 1) + _MARGINS
    figure = make_subplots(
        rows=len(components),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=_GAP / 2 / (height - _MARGINS) if len(components) > 1 else 0.0,
        subplot_titles=[component_label(component) for component in components],
    )
    for row, component in enumerate(components, start=1):
        part = pd.DataFrame(frame[frame["component"] == component])
        figure.add_trace(_heat(part, columns, layers, largest, effect), row=row, col=1)
        every = max(1, -(-len(layers) // 12))
        shown = {"tickvals": list(range(0, len(layers), every)), "ticktext": [str(k) for k in layers[::every]]}
        figure.update_yaxes(title_text="layer", **shown, row=row, col=1)
    step = max(1, -(-len(columns) // _SHOWN))
    figure.update_xaxes(
        showgrid=False, showline=False, ticks="", tickvals=list(range(0, len(columns), step)),
        ticktext=[label for label, _ in columns][::step], tickangle=-90 if len(columns) > 6 else 0,
    )  # fmt: skip
    figure.update_yaxes(showgrid=False, showline=False, ticks="")
    figure.update_xaxes(title_text=with_n("token", frame, "pairs"), row=len(components), col=1)
    figure.update_annotations(x=0, xanchor="left")
    bar = {"title": {"text": effect, "side": "top"}, "thickness": 16, "tickformat": ".3~g"}
    limit = largest or 1.0
    scale = {"colorscale": theme.DIVERGING, "cmin": -limit, "cmid": 0, "cmax": limit, "colorbar": bar}
    figure.update_layout(template=theme.TEMPLATE, height=height, coloraxis=scale, margin={"t": 50})
    return figure


def _columns(positions: Sequence[int], tokens: Sequence[str] | None, image_token: str) -> list[tuple[str, list[int]]]:
    """The columns, each with its label and the positions that are folded into it."""
    if tokens is None:
        return [(str(at), [at]) for at in positions]
    columns: list[tuple[str, list[int]]] = []
    run: list[int] = []
    for at in [*positions, -1]:
        if at >= 0 and tokens[at] == image_token and (not run or at == run[-1] + 1):
            run.append(at)
            continue
        if run:
            columns.append((f"image ({len(run)} tokens)", run))
            run = []
        if at >= 0:
            if tokens[at] == image_token:
                run = [at]
            else:
                columns.append((token_label(tokens[at]), [at]))
    return columns


def _heat(
    part: pd.DataFrame, columns: list[tuple[str, list[int]]], layers: list[int], largest: float, effect: str
) -> go.Heatmap:
    column_of = {at: index for index, (_, run) in enumerate(columns) for at in run}
    shape = (len(layers), len(columns))
    value, text = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    detail = np.full((*shape, 4), np.nan)
    for cell in part.assign(mark=marked(part, largest)).to_dict("records"):
        at = layers.index(cell["layer"]), column_of[cell["at"]]
        if np.isnan(value[at]) or abs(cell["value"]) > abs(value[at]):
            value[at], text[at] = cell["value"], MARK if cell["mark"] else ""
            detail[at] = cell["ci_low"], cell["ci_high"], cell["at"], cell["layer"]
    return go.Heatmap(
        z=value,
        x=list(range(len(columns))),
        y=list(range(len(layers))),
        text=text,
        texttemplate="%{text}",
        textfont={"size": 8},
        customdata=detail,
        hovertemplate=(
            f"layer %{{customdata[3]}}, token %{{customdata[2]}}<br>{effect} %{{z:.3f}} [%{{customdata[0]:.3f}}, %{{customdata[1]:.3f}}]<extra></extra>"
        ),
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        name=effect,
    )
