"""Patch effects at several layers, side by side in one colour scale."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import frame_of, largest_of, n_text
from care_lens.plots.patches import add_picture

_ACROSS, _SIDE, _GAP = 4, 150, 34


def plot_patch_layers(
    results: Mapping[str, FrameResult | pd.DataFrame], *, image: Image.Image | None = None, across: int = _ACROSS
) -> go.Figure:
    """The effect of each patch at several sites: one small map a site, all in one colour scale.

    Args:
        results: By what the site is called ("layer 0", ...), a ``PatchMapResult`` or its frame: columns row, col and value.
        image: The picture, of any size; its colours are left out.
        across: How many maps stand in a row.

    Returns:
        The figure.

    Raises:
        ValueError: If there are none, one is not such, or their grids differ.
    """
    if not results or across < 1:
        raise ValueError("results must hold at least one patch map, and across be 1 or more")
    frames = {name: frame_of(result, ("row", "col", "value")) for name, result in results.items()}
    shapes = {name: (int(f["row"].max()) + 1, int(f["col"].max()) + 1) for name, f in frames.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"results must be of one grid of patches, got {shapes}; draw each by plot_patch_effects")
    rows, cols = next(iter(shapes.values()))
    across = min(across, len(frames))
    down = math.ceil(len(frames) / across)
    height = down * (_SIDE + _GAP) + 80
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=list(frames),
        horizontal_spacing=0.02,
        vertical_spacing=_GAP / (height - 80) if down > 1 else 0.0,
    )
    wide, high = (1.0, 1.0) if image is None else (image.width / cols, image.height / rows)
    for index, (name, frame) in enumerate(frames.items()):
        if frame.duplicated(["row", "col"]).any():
            raise ValueError(
                f"each patch must occur once, got several rows of one in {name!r}; take the rows of one pair"
            )
        value = np.full((rows, cols), np.nan)
        value[frame["row"].to_numpy(dtype=int), frame["col"].to_numpy(dtype=int)] = frame["value"].to_numpy(dtype=float)
        at: dict[str, Any] = {"row": index // across + 1, "col": index % across + 1}
        heat = go.Heatmap(
            z=value,
            x0=wide / 2,
            dx=wide,
            y0=high / 2,
            dy=high,
            coloraxis="coloraxis",
            opacity=0.6 if image is not None else 1.0,
            hovertemplate=f"{name}: %{{z:.3g}}<extra></extra>",
            name=name,
        )
        figure.add_trace(heat, **at)
        drawn: Any = figure.data[-1]
        if image is not None:
            add_picture(figure, image, drawn.xaxis or "x", drawn.yaxis or "y")
        figure.update_yaxes(scaleanchor=drawn.xaxis or "x", constrain="domain", autorange="reversed", **at)
        figure.update_xaxes(constrain="domain", **at)
    bare = {"showgrid": False, "zeroline": False, "showline": False, "ticks": "", "showticklabels": False}
    figure.update_xaxes(**bare)
    figure.update_yaxes(**bare)
    limit = max(largest_of(frame["value"]) for frame in frames.values()) or 1.0
    first = next(iter(frames.values()))
    effect = str(first["effect"].iloc[0]) if "effect" in first.columns else "effect"
    bar = {"title": {"text": effect, "side": "top"}, "thickness": 16, "tickformat": ".3~g"}
    scale = {"colorscale": theme.DIVERGING, "cmin": -limit, "cmid": 0, "cmax": limit, "colorbar": bar}
    figure.update_xaxes(title_text=n_text(first, "pairs"), row=down, col=1)
    figure.update_layout(
        template=theme.TEMPLATE, width=across * _SIDE + 120, height=height, coloraxis=scale,
        margin={"l": 20, "r": 20, "t": 50, "b": 40},
    )  # fmt: skip
    return figure
