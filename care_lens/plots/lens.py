"""What a lens reads, by layer and over a picture."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from care_lens.core.pictures import shown_picture
from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, half_widths, literal, where, with_n

_COLUMNS = ("tower", "layer", "component", "span", "metric", "value", "ci_low", "ci_high", "chance", "n")
_PATCHES = (
    "grid",
    "row",
    "col",
    "x0",
    "y0",
    "x1",
    "y1",
    "word",
    "probability",
    "neighbour",
    "similarity",
    "effect",
    "kind",
)
_FITS = 9
"""Patches a side up to which their words are written into them."""


def plot_lens(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Each measure of a lens by layer: one panel a measure, one curve a span, and in grey what it is by chance.

    Args:
        result: A ``LensResult`` or ``NeighbourResult``, or its frame.

    Returns:
        The figure: sites in the order of the forward pass, the vision tower's first.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, _COLUMNS)
    metrics, spans = list(dict.fromkeys(frame["metric"])), list(dict.fromkeys(frame["span"]))
    sites = _sites(frame)
    figure = make_subplots(
        rows=len(metrics),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.1 / max(1, len(metrics) - 1),
        subplot_titles=metrics,
    )
    for row, metric in enumerate(metrics, start=1):
        for index, span in enumerate(spans):
            part = where(frame, metric=metric, span=span)
            if part.empty:
                continue
            shared = {"x": [_short(one) for one in part[["tower", "layer", "component"]].itertuples(index=False)]}
            figure.add_trace(
                go.Scatter(
                    **shared, y=part["chance"].astype(float).tolist(), mode="lines", name=f"{span}, chance", legendgroup=f"{span}, chance",
                    line={"color": "#8a929b", "width": 1.5, "dash": ("dash", "dot", "dashdot")[index % 3]}, showlegend=row == 1,
                    hovertemplate="%{x}, by chance: %{y:.3g}<extra></extra>",
                ),
                row=row, col=1,
            )  # fmt: skip
            figure.add_trace(
                go.Scatter(
                    **shared, y=part["value"].astype(float).tolist(), error_y={**half_widths(part), "thickness": 1.5, "width": 3},
                    mode="lines+markers", marker=theme.marker(index), line={"color": theme.COLOURS[index], "width": 2}, name=span,
                    legendgroup=span, showlegend=row == 1, customdata=part["n"].tolist(),
                    hovertemplate="%{x}: %{y:.3g}, n = %{customdata}<extra></extra>",
                ),
                row=row, col=1,
            )  # fmt: skip
    figure.update_xaxes(type="category", categoryorder="array", categoryarray=sites)
    figure.update_xaxes(
        title_text=with_n("residual stream, v: after a vision block, else before a language block", frame),
        row=len(metrics),
        col=1,
    )
    figure.update_layout(
        template=theme.TEMPLATE, height=140 + 190 * len(metrics), legend={"y": 1.06 if len(metrics) > 2 else 1.12}
    )
    return figure


def plot_picture_reading(
    result: FrameResult | pd.DataFrame, *, image: Image.Image | None = None, grid: int = 0, stacked: bool = False
) -> go.Figure:
    """A picture three times: the lens's word at each patch, the word it is most like, and what the patch does to the outcome.

    Args:
        result: A ``PictureReading`` or its frame.
        image: The picture, drawn in grey below.
        grid: Which grid of a picture that is cut in tiles.
        stacked: Whether the panels stand below each other, as one column of a paper needs them, where words are to be written into patches.

    Returns:
        The figure; words are written where patches are few, and shown on hover always. A frame marks patches that are read. Without
        neighbours there are two panels.

    Raises:
        ValueError: If the frame is not such, or there is no such grid.
    """
    frame = frame_of(result, _PATCHES)
    part = pd.DataFrame(frame[frame["grid"] == grid])
    if part.empty:
        raise ValueError(f"grid must be one of {sorted(set(frame['grid']))}, got {grid}")
    near = bool((part["neighbour"].fillna("") != "").any())
    panels = [
        ("lens word", "word", "probability"),
        *([("nearest word", "neighbour", "similarity")] if near else []),
        ("NIE", "", "effect"),
    ]
    down, across = (len(panels), 1) if stacked else (1, len(panels))
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[title for title, _, _ in panels],
        horizontal_spacing=0.09 if near else 0.14,
        vertical_spacing=0.16 / down,
    )
    rows, cols = int(part["row"].max()) + 1, int(part["col"].max()) + 1
    left, top = float(part["x0"].min()), float(part["y0"].min())
    wide, high = (float(part["x1"].max()) - left) / cols, (float(part["y1"].max()) - top) / rows
    most = float(np.nanmax(np.abs(part["effect"]), initial=0.0)) or 1.0
    at = part["row"].to_numpy(dtype=int), part["col"].to_numpy(dtype=int)

    def spread(values: pd.Series, empty: object) -> np.ndarray:
        out = np.full((rows, cols), empty, dtype=object)
        out[at] = values.to_numpy()
        return out

    kinds = spread(part["kind"], "")
    for number, (title, word, value) in enumerate(panels):
        place: dict[str, Any] = {"row": number + 1, "col": 1} if stacked else {"row": 1, "col": number + 1}
        signed = value == "effect"
        words = spread(part[word].fillna(""), "") if word else np.full((rows, cols), "", dtype=object)
        length = max((len(str(text)) for text in words.flat), default=1)
        words = np.vectorize(lambda text: literal(str(text)), otypes=[object])(words)
        written = word != "" and max(rows, cols) <= _FITS
        figure.add_trace(
            go.Heatmap(
                z=spread(part[value], np.nan).astype(float), x0=left + wide / 2, dx=wide, y0=top + high / 2, dy=high,
                colorscale=theme.DIVERGING if signed else [[0, theme.PAPER], [1, theme.COLOURS[0]]],
                zmin=-most if signed else 0, zmax=most if signed else 1, opacity=0.6 if image is not None else 1.0,
                text=words, texttemplate="%{text}" if written else None,
                textfont={"size": max(7, min(13, int(540 / max(1, length * cols)))), "color": theme.INK},
                customdata=np.stack([words, kinds], axis=-1),
                hovertemplate=f"{title}: %{{customdata[0]}} %{{z:.3g}}<br>%{{customdata[1]}}<extra></extra>",
            ),
            **place,
        )  # fmt: skip
        drawn: Any = figure.data[-1]
        axes = drawn.xaxis or "x", drawn.yaxis or "y"
        (_, right), (low, up) = (figure.layout[f"{name[0]}axis{name[1:]}"].domain for name in axes)
        drawn.colorbar = {
            "thickness": 10, "x": right, "y": (low + up) / 2, "len": 0.9 * (up - low),
            "title": {"text": "" if signed else value, "side": "right", "font": {"size": 13}}, "tickfont": {"size": 12},
            # Both ends are told: round numbers alone can leave 0 as the only tick.
            **({"tickvals": [-most, 0, most], "tickformat": ".2g"} if signed else {"nticks": 4}),
        }  # fmt: skip
        if image is not None:
            figure.add_layout_image(
                source=shown_picture(image).convert("L").convert("RGB"), x=0, y=0, sizex=image.width, sizey=image.height,
                sizing="stretch", layer="below", xref=axes[0], yref=axes[1],
            )  # fmt: skip
        for patch in pd.DataFrame(part[part["kind"] == "read"]).to_dict("records"):
            figure.add_shape(
                type="rect", x0=patch["x0"], x1=patch["x1"], y0=patch["y0"], y1=patch["y1"], line={"color": theme.COLOURS[1], "width": 2},
                **place,
            )  # fmt: skip
        figure.update_yaxes(scaleanchor=axes[0], **place)
    bare = {
        "showgrid": False,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "showticklabels": False,
        "constrain": "domain",
    }
    figure.update_xaxes(**bare)
    figure.update_yaxes(**bare, autorange="reversed")
    if "read" in set(part["kind"]):
        frame_mark = {"symbol": "square-open", "size": 12, "color": theme.COLOURS[1], "line": {"width": 2}}
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", marker=frame_mark, name="read: legible, and acts"), row=1, col=1
        )  # fmt: skip
    figure.update_layout(
        template=theme.TEMPLATE, width=100 + 370 * across, height=100 + 380 * down, showlegend=True,
        margin={"l": 10, "r": 10, "t": 80, "b": 10}, legend={"y": 1 + 40 / (380 * down), "font": {"size": 13}},
    )  # fmt: skip
    return figure


def _sites(frame: pd.DataFrame) -> list[str]:
    places = frame[["tower", "layer", "component"]].drop_duplicates()
    order = {"vision": 0, "language": 1}
    keyed = sorted(
        places.itertuples(index=False),
        key=lambda one: (
            order.get(str(one.tower), 2),
            int(one.layer),
            one.component != "hook_resid_pre",
            one.component,
        ),
    )
    return [_short(one) for one in keyed]


def _short(place: object) -> str:
    tower, layer, component = place  # type: ignore[misc]
    if tower == "vision":
        return f"v{layer}"
    return {"hook_resid_pre": f"{layer}", "hook_resid_mid": f"{layer} mid", "hook_resid_post": f"{layer} end"}.get(
        component, str(layer)
    )
