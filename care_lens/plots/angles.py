"""Principal angles between subspaces: of modalities, of layers, of model families."""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from care_lens.plots import theme
from care_lens.plots.frames import MARK
from care_lens.subspace import SafetySubspace
from care_lens.subspace.comparison import compare_bases

Which = Literal["smallest", "largest"]
_DRAWS = 200
_TAIL = 0.05


def plot_principal_angles(subspaces: Mapping[str, SafetySubspace], *, which: Which = "smallest") -> go.Figure:
    """The principal angle between every two subspaces of one space, in degrees.

    A dot marks pairs that are closer than 95 % of random subspaces of their ranks (200 draws): in many dimensions two random
    directions are nearly orthogonal, so that an angle says little without it.

    Args:
        subspaces: Subspaces of one width, by what they are called: modalities at a site, or layers.
        which: The smallest angle (0: they share a direction) or the largest (0: one lies in the other).

    Returns:
        The figure: one heat map; hovering gives the overlap, 1 for equal and 0 for orthogonal subspaces, and what chance gives.

    Raises:
        ValueError: If there are fewer than two, or they are of different widths.
    """
    names = list(subspaces)
    if len(names) < 2:
        raise ValueError(f"subspaces must be two or more, got {len(names)}; of one, see plot_spectrum")
    widths = {name: int(one.basis.shape[0]) for name, one in subspaces.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"subspaces must be of one width, got {widths}; those of other models have no angle between them"
        )
    if which not in ("smallest", "largest"):
        raise ValueError(f"which must be 'smallest' or 'largest', got {which!r}")
    value, detail = np.full((len(names),) * 2, np.nan), np.full((len(names), len(names), 2), np.nan)
    text = np.full(value.shape, "", dtype=object)
    for i, first in enumerate(subspaces.values()):
        for j, second in enumerate(subspaces.values()):
            found = compare_bases(first.basis, second.basis)
            angle = _degrees(found.angles, which)
            low, _ = _chance(first.basis.shape[0], first.basis.shape[1], second.basis.shape[1], which)
            value[i, j], detail[i, j] = angle, (found.normalized, found.chance)
            text[i, j] = f"{angle:.0f}{' ' + MARK if angle < low and i != j else ''}"
    heat = go.Heatmap(
        z=value,
        x=names,
        y=names,
        text=text,
        texttemplate="%{text}",
        customdata=detail,
        hovertemplate="%{y} and %{x}: %{z:.1f} degrees, overlap %{customdata[0]:.3f} (chance %{customdata[1]:.3f})<extra></extra>",
        colorscale=theme.SEQUENTIAL,
        reversescale=True,
        zmin=0,
        zmax=90,
        xgap=1,
        ygap=1,
        colorbar={
            "title": {"text": "degrees", "side": "right"},
            "tickvals": [0, 30, 60, 90],
            "thickness": 16,
        },
    )
    figure = go.Figure(heat)
    figure.update_xaxes(type="category", showgrid=False, showline=False, ticks="", tickangle=-90)
    figure.update_yaxes(type="category", showgrid=False, showline=False, ticks="", autorange="reversed")
    figure.update_layout(template=theme.TEMPLATE, height=210 + 46 * len(names), margin={"t": 30})
    return figure


def plot_angles_by_layer(
    pairs: Mapping[str, Mapping[int, tuple[SafetySubspace, SafetySubspace]]], *, which: Which = "smallest"
) -> go.Figure:
    """The principal angle between two subspaces of each layer, such as the visual and the textual one; a curve for each model.

    Models of different widths can stand in one figure, since each angle is within one model. Grey bands are where 90 % of random
    subspaces of the same ranks and width lie.

    Args:
        pairs: By the name of the model or family, then by layer: the two subspaces.
        which: The smallest angle or the largest.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no pairs.
    """
    if not pairs or not all(pairs.values()):
        raise ValueError("pairs must hold at least one layer of each model, got none; fit two subspaces at one site")
    figure, drawn = go.Figure(), set()
    for index, (name, layers) in enumerate(pairs.items()):
        at = sorted(layers)
        angles = [_degrees(compare_bases(layers[k][0].basis, layers[k][1].basis).angles, which) for k in at]
        bands = [_chance(layers[k][0].basis.shape[0], layers[k][0].rank, layers[k][1].rank, which) for k in at]
        low, high = [band[0] for band in bands], [band[1] for band in bands]
        shade = {
            "fill": "toself",
            "fillcolor": theme.COLOURS[6],
            "opacity": 0.18,
            "line": {"width": 0},
            "mode": "lines",
        }
        band = tuple(zip(at, low, high, strict=True))
        if band not in drawn:  # models of one width have one band; laid on each other they would hide what lies below
            figure.add_trace(
                go.Scatter(
                    x=[*at, *at[::-1]], y=[*high, *low[::-1]], **shade, hoverinfo="skip", showlegend=not drawn,
                    name="90 % of random subspaces",
                )
            )  # fmt: skip
        drawn.add(band)
        figure.add_trace(
            go.Scatter(
                x=at,
                y=angles,
                mode="lines+markers",
                **theme.series(index),
                hovertemplate="layer %{x}: %{y:.1f} degrees",
                name=name,
            )
        )
    layers = sorted({k for one in pairs.values() for k in one})
    figure.update_xaxes(title_text="layer", tick0=0, dtick=max(1, (layers[-1] - layers[0]) // 8))
    figure.update_yaxes(title_text=f"{which} angle, degrees", range=[-2, 94], tickvals=[0, 30, 60, 90])
    figure.update_layout(template=theme.TEMPLATE, height=400, showlegend=True)
    return figure


def _degrees(angles: Any, which: Which) -> float:
    ordered = [math.degrees(float(angle)) for angle in angles]
    return min(ordered) if which == "smallest" else max(ordered)


@lru_cache(maxsize=256)
def _chance(width: int, first: int, second: int, which: Which) -> tuple[float, float]:
    """The 5 % and 95 % quantiles of the angle between random subspaces of these ranks, in degrees.

    By rotation, one of the two may be the first coordinates: the cosines are the singular values of that part of the other.
    """
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_DRAWS):
        basis = np.linalg.qr(rng.standard_normal((width, second)))[0]
        cosines = np.linalg.svd(basis[:first], compute_uv=False).clip(0, 1)
        found.append(math.degrees(math.acos(cosines.max() if which == "smallest" else cosines.min())))
    low, high = np.quantile(found, [_TAIL, 1 - _TAIL])
    return float(low), float(high)
