"""Regions over a picture, and patch effects of pictures that are cut in tiles."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from care_lens.core.pictures import shown_picture
from care_lens.core.results import FrameResult
from care_lens.core.spans import PatchGrid
from care_lens.plots import theme
from care_lens.plots.frames import MARK, frame_of, largest_of, marked, n_text
from care_lens.plots.patches import add_picture

if TYPE_CHECKING:
    from care_lens.mediation.regions import Region

_SIDE = 460


def plot_region(region: "Region", image: Image.Image, *, grids: Sequence[PatchGrid] = (), value: str = "") -> go.Figure:
    """A region over its picture, with the rectangles of its tokens.

    Args:
        region: The region; not one a pair, of which ``region.of(pair)`` is one.
        image: The picture.
        grids: The patch grids of the prepared example; None: tokens are not drawn.
        value: What is written beside the name.

    Returns:
        The figure, in pixels of the picture.
    """
    figure = _over(image)
    _draw(figure, region, image, grids, theme.COLOURS[1], value)
    return figure


def plot_regions(
    result: FrameResult | pd.DataFrame,
    regions: "Sequence[Region]",
    image: Image.Image,
    *,
    site: str,
    effect: str = "NIE",
    pair: int = 0,
    grids: Sequence[PatchGrid] = (),
) -> go.Figure:
    """Regions over a picture, each with its effect and interval.

    Args:
        result: A ``MediationResult`` whose positions had the regions, or its frame.
        regions: The regions.
        image: A picture they are drawn on.
        site: Which mediator's effect is written.
        effect: Which effect.
        pair: Whose regions are drawn, where each pair has its own.
        grids: The patch grids of the prepared example, whose rectangles are then drawn.

    Returns:
        The figure.

    Raises:
        ValueError: If the frame has no such effect.
    """
    frame = frame_of(result, ("mediator", "position", "effect", "value", "ci_low", "ci_high", "n"))
    figure = _over(image)
    for index, region in enumerate(regions):
        at = (frame["mediator"] == site) & (frame["position"] == region.name) & (frame["effect"] == effect)
        part = frame[at]
        if len(part) != 1:
            raise ValueError(f"frame must hold one {effect} of {region.name!r} at {site!r}, got {len(part)}")
        row = part.iloc[0]
        # A single pair has no interval.
        between = f" [{row['ci_low']:.2g}, {row['ci_high']:.2g}]" if np.isfinite(row["ci_low"]) else ""
        text = f"{effect} {row['value']:.2g}{between}, n = {row['n']}"
        _draw(
            figure,
            region.of(pair),
            image,
            grids,
            theme.COLOURS[(index + 1) % len(theme.COLOURS)],
            text,
            name=region.name,
        )
    return figure


def plot_tiles(
    result: FrameResult | pd.DataFrame, *, image: Image.Image | Sequence[Image.Image] | None = None
) -> go.Figure:
    """Patch effects of a picture in tiles, or of several pictures: one panel a grid, one colour scale for all.

    Args:
        result: A ``PatchMapResult`` or its frame: columns grid, row, col, value, ci_low, ci_high and n.
        image: The picture of which the grids are parts, or one picture for each grid, drawn in grey below. It needs to be known which
            rectangle of it a patch covers: from the result's details (those of the first pair that has the grid), or from columns x0, y0, x1, y1 of the frame.

    Returns:
        The figure. A dot marks patches whose interval excludes 0, and whose effect is at least 5 % of the largest.

    Raises:
        ValueError: If the frame is not such, pictures are not as many as grids, or a picture is given and rectangles are not known.
    """
    frame = frame_of(result, ("grid", "row", "col", "value", "ci_low", "ci_high", "n"))
    numbers = sorted(set(frame["grid"]))
    if image is None or isinstance(image, Image.Image):
        below: list[Image.Image | None] = [image] * len(numbers)
    else:
        below = list(image)
    if len(below) != len(numbers):
        raise ValueError(f"image must be one picture, or one for each of {len(numbers)} grids, got {len(below)}")
    places = None if image is None else _rectangles(result, frame)
    across = min(len(numbers), 4)
    down = -(-len(numbers) // across)
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[f"grid {number + 1}" for number in numbers],
        horizontal_spacing=0.02,
        vertical_spacing=0.2 / down,
    )
    most = largest_of(frame["value"]) or 1.0
    for at, (number, under) in enumerate(zip(numbers, below, strict=True)):
        part = pd.DataFrame(frame[frame["grid"] == number])
        shape = int(part["row"].max()) + 1, int(part["col"].max()) + 1
        cell = part["row"].to_numpy(dtype=int), part["col"].to_numpy(dtype=int)
        value, text = np.full(shape, np.nan), np.full(shape, "", dtype=object)
        value[cell] = part["value"].to_numpy(dtype=float)
        text[cell] = np.where(marked(part, most), MARK, "")
        left, top, wide, high = 0.0, 0.0, 1.0, 1.0
        if places is not None:
            mine = places[places["grid"] == number]
            left, top = float(mine["x0"].min()), float(mine["y0"].min())
            wide, high = (float((mine[f"{c}1"] - mine[f"{c}0"]).mean()) for c in "xy")
            left, top = left - wide * int(mine["col"].min()), top - high * int(mine["row"].min())
        row, col = at // across + 1, at % across + 1
        figure.add_trace(
            go.Heatmap(
                z=value, x0=left + wide / 2, dx=wide, y0=top + high / 2, dy=high, text=text, texttemplate="%{text}", textfont={"size": 9},
                coloraxis="coloraxis", opacity=1.0 if under is None else 0.6,
                xgap=int(under is None), ygap=int(under is None),
                customdata=np.moveaxis(np.indices(shape), 0, -1),
                hovertemplate=f"grid {number + 1}, row %{{customdata[0]}}, column %{{customdata[1]}}: %{{z:.3g}}<extra></extra>",
            ),
            row=row, col=col,
        )  # fmt: skip
        drawn: Any = figure.data[-1]
        if under is not None:
            add_picture(figure, under, drawn.xaxis or "x", drawn.yaxis or "y")
        figure.update_xaxes(range=[left, left + wide * shape[1]], row=row, col=col)
        figure.update_yaxes(range=[top + high * shape[0], top], scaleanchor=drawn.xaxis or "x", row=row, col=col)
    bare = {
        "showgrid": False,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "showticklabels": False,
        "constrain": "domain",
    }
    figure.update_xaxes(**bare)
    figure.update_yaxes(**bare)
    figure.update_xaxes(title_text=n_text(frame, "pairs"), row=down, col=1)
    effect = str(frame["effect"].iloc[0]) if "effect" in frame.columns else "effect"
    scale = {
        "colorscale": theme.DIVERGING,
        "cmin": -most,
        "cmid": 0,
        "cmax": most,
        "colorbar": {"title": {"text": effect, "side": "top"}, "thickness": 16, "tickformat": ".3~g"},
    }
    figure.update_layout(
        template=theme.TEMPLATE, coloraxis=scale, width=140 + 200 * across, height=110 + 220 * down,
        margin={"l": 20, "r": 20, "t": 40, "b": 40},
    )  # fmt: skip
    return figure


def _rectangles(result: FrameResult | pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Grid, row, col and rectangle of each patch in its picture's pixels."""
    columns = ["grid", "row", "col", "x0", "y0", "x1", "y1"]
    details = getattr(result, "details", None)
    if details is not None and set(columns) <= set(details.columns):
        # The first pair may have fewer grids than another: of each grid the first pair that has it.
        return pd.DataFrame(details.loc[details["pair"] == details.groupby("grid")["pair"].transform("min"), columns])
    if set(columns) <= set(frame.columns):
        return pd.DataFrame(frame[columns])
    raise ValueError(
        "result must say which rectangle of the picture a patch covers; give the PatchMapResult, or leave image out"
    )


def _over(image: Image.Image) -> go.Figure:
    figure = go.Figure(go.Scatter(x=[], y=[], mode="markers", showlegend=False))
    figure.add_layout_image(
        source=shown_picture(image).convert("L").convert("RGB"), xref="x", yref="y", x=0, y=0, sizex=image.width, sizey=image.height,
        sizing="stretch", layer="below",
    )  # fmt: skip
    bare = {
        "showgrid": False,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "showticklabels": False,
        "constrain": "domain",
    }
    figure.update_xaxes(**bare, range=[0, image.width])
    figure.update_yaxes(**bare, range=[image.height, 0], scaleanchor="x")
    high = min(900.0, max(200.0, _SIDE * image.height / image.width))
    figure.update_layout(
        template=theme.TEMPLATE, width=_SIDE + 20, height=high + 90, margin={"l": 10, "r": 10, "t": 80, "b": 10},
        legend={"font": {"size": 13}, "y": 1.01},
    )  # fmt: skip
    return figure


def _draw(
    figure: go.Figure,
    region: "Region",
    image: Image.Image,
    grids: Sequence[PatchGrid],
    colour: str,
    value: str,
    *,
    name: str = "",
) -> None:
    label = f"{name or region.name}: {value}" if value else name or region.name
    if grids:
        rectangles = {at: grid.rectangle(at) for grid in grids for at in grid.positions()}
        lines: list[float | None] = []
        rows: list[float | None] = []
        for at in region.tokens(grids, size=image.size):
            x0, y0, x1, y1 = rectangles[at]
            lines += [x0, x1, x1, x0, x0, None]
            rows += [y0, y0, y1, y1, y0, None]
        figure.add_trace(
            go.Scatter(
                x=lines, y=rows, mode="lines", line={"color": colour, "width": 1, "dash": "dot"}, fill="toself", opacity=0.35,
                name="its tokens", showlegend=False, hoverinfo="skip",
            )
        )  # fmt: skip
    outline: dict[str, Any]
    if region.pixels is not None:
        edge = region.pixels & ~_eroded(region.pixels)
        y, x = np.nonzero(edge)
        outline = {
            "x": (x + 0.5).tolist(),
            "y": (y + 0.5).tolist(),
            "mode": "markers",
            "marker": {"color": colour, "size": 3, "symbol": "square"},
        }
    else:
        points = [*region.points, region.points[0]]
        outline = {
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "mode": "lines",
            "line": {"color": colour, "width": 3},
        }
    figure.add_trace(go.Scatter(**outline, name=label, showlegend=True, hovertemplate=label + "<extra></extra>"))


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
