"""Patch effects over the picture."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image

from care_lens.core.pictures import shown_picture
from care_lens.core.results import FrameResult
from care_lens.core.spans import PatchGrid
from care_lens.plots import theme
from care_lens.plots.frames import MARK, frame_of, largest_of, marked, n_text

_COLUMNS = ("row", "col", "value")


def plot_patch_effects(
    result: FrameResult | pd.DataFrame,
    *,
    image: Image.Image | None = None,
    grid: PatchGrid | None = None,
) -> go.Figure:
    """The effect of each patch, drawn over a picture if one is given; its colours are left out.

    Args:
        result: A ``PatchMapResult`` or its frame, or the rows of one pair of its ``details``: columns row,
            col and value; ci_low, ci_high and n if there are intervals, whose cells are marked where they
            exclude 0 and the value is at least 5 % of the largest.
        image: The picture, of any size.
        grid: Which part of the picture the patches cover; None: all of it.

    Returns:
        The figure: one heat map in the picture's pixels (in patches without a picture).

    Raises:
        ValueError: If the frame is not such, a patch occurs twice (take one pair of the details), or the grid
            has another shape than the effects.
    """
    frame = frame_of(result, _COLUMNS)
    if frame.duplicated(["row", "col"]).any():
        raise ValueError("each patch must occur once, got several rows of one; take the rows of one pair and site")
    rows, cols = int(frame["row"].max()) + 1, int(frame["col"].max()) + 1
    if grid is None:
        width, height = (cols, rows) if image is None else image.size
        grid = PatchGrid(start=0, rows=rows, cols=cols, width=width, height=height)
    if (grid.rows, grid.cols) != (rows, cols):
        raise ValueError(f"grid must have {rows} x {cols} patches as the effects, got {grid.rows} x {grid.cols}")
    figure = go.Figure(_heatmap(frame, grid, over_picture=image is not None))
    if image is not None:
        add_picture(figure, image)
    axis = {"showgrid": False, "zeroline": False, "showline": False, "ticks": "", "showticklabels": False}
    figure.update_layout(
        template=theme.TEMPLATE,
        width=520,
        height=460,
        xaxis={**axis, "constrain": "domain", "title": {"text": n_text(frame, "pairs")}},
        yaxis={**axis, "autorange": "reversed", "scaleanchor": "x", "constrain": "domain"},
        margin={"l": 20, "r": 20, "t": 30, "b": 40 if n_text(frame) else 20},
    )
    return figure


def _heatmap(frame: pd.DataFrame, grid: PatchGrid, *, over_picture: bool) -> go.Heatmap:
    shape = (grid.rows, grid.cols)
    at = frame["row"].to_numpy(dtype=int), frame["col"].to_numpy(dtype=int)
    value = np.full(shape, np.nan)
    value[at] = frame["value"].to_numpy(dtype=float)
    with_interval = {"ci_low", "ci_high", "n"} <= set(frame.columns)
    hover = "row %{customdata[0]}, column %{customdata[1]}<br>effect %{z:.3f}"
    columns = ["row", "col"]
    text = np.full(shape, "", dtype=object)
    if with_interval:
        columns += ["ci_low", "ci_high", "n"]
        hover += " [%{customdata[2]:.3f}, %{customdata[3]:.3f}], n = %{customdata[4]}"
        text[at] = np.where(marked(frame, largest_of(frame["value"])), MARK, "")
    detail = np.full((*shape, len(columns)), np.nan)
    detail[at] = frame[columns].to_numpy(dtype=float)
    limit = largest_of(value) or 1.0
    effect = str(frame["effect"].iloc[0]) if "effect" in frame.columns else "effect"
    bar: dict[str, Any] = {"title": {"text": effect, "side": "top"}, "thickness": 16, "tickformat": ".3~g"}
    wide, high = grid.width / grid.cols, grid.height / grid.rows
    return go.Heatmap(
        z=value,
        x0=grid.left + wide / 2,
        dx=wide,
        y0=grid.top + high / 2,
        dy=high,
        text=text,
        texttemplate="%{text}",
        textfont={"size": 9},
        customdata=detail,
        hovertemplate=hover + "<extra></extra>",
        colorscale=theme.DIVERGING,
        zmin=-limit,
        zmid=0,
        zmax=limit,
        opacity=0.6 if over_picture else 1.0,
        colorbar=bar,
    )


def add_picture(figure: go.Figure, image: Image.Image, xref: str = "x", yref: str = "y") -> None:
    """Lay a picture, without its colours, under a panel whose axes are its pixels."""
    figure.add_layout_image(
        source=shown_picture(image).convert("L").convert("RGB"),
        xref=xref,
        yref=yref,
        x=0,
        y=0,
        sizex=image.width,
        sizey=image.height,
        sizing="stretch",
        layer="below",
    )
