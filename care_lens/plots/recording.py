"""What a repair did to the tokens of one row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from PIL import Image
from plotly.subplots import make_subplots

from care_lens.core.spans import PatchGrid
from care_lens.plots import theme
from care_lens.plots.frames import literal, token_label
from care_lens.plots.patches import add_picture

_MODALITIES = ("visual", "textual")


_GRID = 300
_CORNERS = {"image": "top left", "generated": "bottom right"}
_PICTURE = 8.0


def plot_recording(
    frame: pd.DataFrame,
    *,
    grids: Sequence[tuple[PatchGrid, int]] = (),
    tokens: Sequence[str] | None = None,
    image: Image.Image | None = None,
) -> go.Figure:
    """Gate values, weights of the modalities and norm of the edit over the tokens of one row, and over its picture.

    Args:
        frame: The rows of one row of a batch, as ``Recording.to_dataframe`` gives them.
        grids: The patch grids of the row, each with the position of its first token; the norm of the edit is summed over
            sites for each patch.
        tokens: The text of each token of the row and of its answer, by position; written under the last panel, image tokens left out. None: positions.
        image: The picture, laid without its colours under the first grid.

    Returns:
        The figure: three panels over the tokens, image tokens shaded, and one heat map for each grid below them.

    Raises:
        ValueError: If there are fewer tokens than positions.
    """
    sites = list(dict.fromkeys(frame.site))
    titles = ["gate value (largest over sites)", "weight (mean over sites where it acts)", "norm of the edit"]
    titles += [f"norm of the edit over picture region {i + 1}" for i in range(len(grids))]
    last = int(frame.position.max())
    if tokens is not None and len(tokens) <= last:
        raise ValueError(f"tokens must be {last + 1} or more, one for each position, got {len(tokens)}")
    figure = make_subplots(
        rows=3 + len(grids),
        cols=1,
        subplot_titles=titles,
        vertical_spacing=(0.4 if tokens is None else 0.8) / (3 + len(grids)),
        row_heights=[1.0] * 3 + [1.6] * len(grids),
    )
    by_token = frame.groupby("position")
    at = _places(frame, folded=tokens is not None)
    for panel, measure in enumerate(("gate", "weight"), start=1):
        for i, name in enumerate(_MODALITIES):
            column = f"{measure}_{name}"
            values: pd.Series = by_token[column].max()  # type: ignore[assignment]
            if panel == 2:
                acting: pd.Series = frame[frame.edit_norm > 0].groupby("position")[column].mean()  # type: ignore[assignment]
                values = acting.reindex(values.index)
            figure.add_trace(
                go.Scatter(
                    x=[at[p] for p in values.index],
                    y=values,
                    name=name,
                    legendgroup=name,
                    showlegend=panel == 1,
                    mode="lines+markers",
                    **theme.series(i, size=5),
                ),
                row=panel,
                col=1,
            )
        figure.update_yaxes(range=[-0.05, 1.05], row=panel, col=1)
    for i, site in enumerate(sites):
        here = frame[frame.site == site]
        figure.add_trace(
            go.Bar(
                x=[at[p] for p in here.position],
                y=here.edit_norm,
                name=site,
                marker={"color": theme.COLOURS[(i + 2) % 8]},
            ),
            row=3,
            col=1,
        )
    at_image = frame[frame.span == "image"].position
    shade: dict[str, Any] = {"fillcolor": theme.GRID, "opacity": 0.5, "line_width": 0, "layer": "below"}
    for panel in (1, 2, 3):
        if len(at_image):
            place: dict[str, Any] = {"row": panel, "col": 1}
            figure.add_vrect(x0=at[at_image.min()] - 0.5, x1=at[at_image.max()] + 0.5, **shade, **place)
        figure.update_xaxes(range=[-1, at[last] + 1], row=panel, col=1)
    figure.update_xaxes(title="position in the row" if tokens is None else "token", row=3, col=1)
    if tokens is not None:
        pictured = set(at_image.tolist())
        named = [p for p in sorted(set(frame.position)) if p not in pictured]
        labels = [token_label(str(tokens[p])) for p in named]
        if pictured:
            named, labels = [*named, (min(pictured) + max(pictured)) // 2], [*labels, f"image ({len(pictured)})"]
        figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, row=1, col=1)
        figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, row=2, col=1)
        figure.update_xaxes(tickvals=[at[p] for p in named], ticktext=labels, tickangle=-90, row=3, col=1)
    norms = by_token.edit_norm.sum()
    for i, (grid, first) in enumerate(grids):
        shift = first - grid.start
        shown = np.array([norms.get(p + shift, np.nan) for p in grid.positions()]).reshape(grid.rows, grid.cols)
        scale: dict[str, Any] = {"colorscale": theme.SEQUENTIAL, "zmin": 0, "zmax": float(norms.max()) or 1.0}
        if over := image if i == 0 else None:
            wide, high = grid.width / grid.cols, grid.height / grid.rows
            scale |= {"x0": grid.left + wide / 2, "dx": wide, "y0": grid.top + high / 2, "dy": high, "opacity": 0.65}
        figure.add_trace(go.Heatmap(z=shown, **scale, showscale=i == 0, colorbar=_bar(figure, 4 + i)), row=4 + i, col=1)
        heat: Any = figure.data[-1]
        if over is not None:
            add_picture(figure, over, heat.xaxis, heat.yaxis)
        square: dict[str, Any] = {"scaleanchor": heat.xaxis, "constrain": "domain", "autorange": "reversed"}
        unit = "pixel" if over is not None else "patch"
        figure.update_yaxes(title=f"{unit} row", showgrid=False, **square, row=4 + i, col=1)
        figure.update_xaxes(title=f"{unit} column", showgrid=False, constrain="domain", row=4 + i, col=1)
    figure.update_layout(
        template=theme.TEMPLATE,
        height=660 + 260 * (tokens is not None) + _GRID * len(grids),
        width=760,
        barmode="stack",
    )
    return figure


def _places(frame: pd.DataFrame, *, folded: bool) -> dict[int, float]:
    """Where each position stands: at itself, or with the picture's tokens drawn together to the width of a few."""
    pictured = set(frame.loc[frame.span == "image", "position"])
    step = _PICTURE / max(len(pictured), 1) if folded and len(pictured) > _PICTURE else 1.0
    places, x = {}, 0.0
    for position in range(int(frame.position.max()) + 1):
        places[position] = x if folded else float(position)
        x += step if position in pictured else 1.0
    return places


def plot_trace(frame: pd.DataFrame, *, threshold: float | int | None = None) -> go.Figure:
    """The scores of readers over the tokens of one example.

    Args:
        frame: The rows of one example, as ``ScoreTrace.to_dataframe`` gives them; scores that are not finite are left out.
        threshold: Of a gate, drawn as a line.

    Returns:
        The figure: a line for each reader's score as it stands, and a mark for the score of each token by itself.
    """
    figure = go.Figure()
    for i, (reader, rows) in enumerate(frame.groupby("reader", sort=False)):
        look = {"color": theme.COLOURS[i % len(theme.COLOURS)], "dash": theme.DASHES[i % len(theme.DASHES)]}
        for column, mode in (("score", "lines"), ("own_score", "markers")):
            values = rows[column].where(np.isfinite(rows[column]))
            figure.add_trace(
                go.Scatter(
                    x=rows.position,
                    y=values,
                    name=f"{reader}, {'as it stands' if column == 'score' else 'of the token'}",
                    mode=mode,
                    showlegend=column == "score",
                    line=look,
                    marker={"color": look["color"], "symbol": theme.symbol(i), "size": 6},
                    text=[literal(str(token)) for token in rows.token],
                    hovertemplate="%{x} %{text}: %{y:.3g}<extra>%{fullData.name}</extra>",
                )
            )
    for span in ("image", "generated"):
        at = frame[frame.span == span].position
        if len(at):
            shade: dict[str, Any] = {"fillcolor": theme.GRID, "opacity": 0.5, "line_width": 0, "layer": "below"}
            figure.add_vrect(
                x0=at.min() - 0.5, x1=at.max() + 0.5, annotation_text=span, annotation_position=_CORNERS[span], **shade
            )
    if threshold is not None:
        figure.add_hline(y=float(threshold), line_dash="dash", annotation_text="threshold")
    figure.update_layout(
        template=theme.TEMPLATE, xaxis_title="position in the row", yaxis_title="score (marks: of single tokens)"
    )
    return figure


def _bar(figure: go.Figure, row: int) -> dict[str, Any]:
    """A colour bar as high as one panel, beside it."""
    axis: Any = next(iter(figure.select_yaxes(row=row, col=1)))
    low, high = axis.domain
    return {"y": (low + high) / 2, "len": high - low, "thickness": 14}
