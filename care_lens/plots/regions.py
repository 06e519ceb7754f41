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
from care_lens.plots.frames import excludes_zero, frame_of

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


def plot_tiles(result: FrameResult | pd.DataFrame, *, image: Image.Image | None = None) -> go.Figure:
    """Patch effects of a picture in tiles: one panel a grid, one colour scale for all.

    Args:
        result: A ``PatchMapResult`` or its frame.
        image: Drawn in grey below every panel where the details say where patches are; needs the result, not its frame.

    Returns:
        The figure. A dot marks patches whose interval excludes 0.
    """
    frame = frame_of(result, ("grid", "row", "col", "value", "ci_low", "ci_high", "n"))
    numbers = sorted(set(frame["grid"]))
    across = min(len(numbers), 4)
    down = -(-len(numbers) // across)
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=[f"grid {number + 1}" for number in numbers],
        horizontal_spacing=0.04,
        vertical_spacing=0.14,
    )
    most = float(np.nanmax(np.abs(frame["value"].to_numpy(dtype=float)), initial=0.0)) or 1.0
    for at, number in enumerate(numbers):
        part = pd.DataFrame(frame[frame["grid"] == number])
        shape = int(part["row"].max()) + 1, int(part["col"].max()) + 1
        cell = part["row"].to_numpy(dtype=int), part["col"].to_numpy(dtype=int)
        value, text = np.full(shape, np.nan), np.full(shape, "", dtype=object)
        value[cell], text[cell] = (
            part["value"].to_numpy(dtype=float),
            np.where(excludes_zero(part), "\N{BLACK CIRCLE}", ""),
        )
        row, col = at // across + 1, at % across + 1
        figure.add_trace(
            go.Heatmap(
                z=value, text=text, texttemplate="%{text}", coloraxis="coloraxis", xgap=1, ygap=1,
                hovertemplate=f"grid {number + 1}, row %{{y}}, column %{{x}}: %{{z:.3g}}<extra></extra>",
            ),
            row=row, col=col,
        )  # fmt: skip
        axis = "" if at == 0 else str(at + 1)
        figure.update_yaxes(autorange="reversed", scaleanchor=f"x{axis}", row=row, col=col)
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
    effect = str(frame["effect"].iloc[0]) if "effect" in frame.columns else "effect"
    scale = {
        "colorscale": theme.DIVERGING,
        "cmin": -most,
        "cmid": 0,
        "cmax": most,
        "colorbar": {"title": {"text": effect}, "thickness": 16},
    }
    figure.update_layout(template=theme.TEMPLATE, coloraxis=scale, width=140 + 200 * across, height=90 + 210 * down)
    return figure


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
