"""The look of all figures: templates, colours and what they mean, light and dark.

Blue says less safe and red or orange says safer, everywhere: the positive end of a signed scale, attacks and malicious rows are
blue; the negative end, refusals and benign rows are red or orange. What has no such sign (gate values, norms, overlaps) is drawn
in a sequential scale that holds neither.
"""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.colors import get_colorscale

TEMPLATE = "care_lens"
"""Name of the template, registered with plotly when this module is imported; plotly's default stays."""

DARK_TEMPLATE = "care_lens_dark"
"""The same on a dark page; :func:`~care_lens.plots.paper` and the report put figures into it."""

DIVERGING = "RdBu"
"""Colours of signed values, centred on 0."""

SEQUENTIAL = "Viridis"
"""Colours of values without a sign, that are neither safe nor unsafe."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D5D5D", "#8C6D1F")
"""Colours of series; after Okabe and Ito, told apart with colour-blind eyes and in print."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
"""Marker of each series, so that colour is never all that tells them apart."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
"""Line of each series."""

LESS_SAFE, SAFER = COLOURS[0], COLOURS[1]
"""Colours of two series of which one is less safe: attacks and benign prompts, complied and refused. As in ``DIVERGING``."""

INK, GRID, PAPER = "#1C2430", "#DDE2EA", "#FFFFFF"
_DARK_INK, _DARK_GRID, _DARK_PAPER = "#E6E9EE", "#3A434F", "#14181F"
_DARK_COLOURS = ("#4C9BE8", "#FF8A3D", "#2CC295", "#E39BC4", "#FFC04D", "#9AD8FF", "#B4B9C2", "#CFAE55")
_DARK_DIVERGING = (
    "#FFB3A3", "#F4816F", "#D6554C", "#9C3A3C", "#5C2E35", "#2B313A", "#27425E", "#245F93", "#2F80C8", "#5BA9EC", "#A6D4FF",
)  # fmt: skip
DARK: dict[str, str] = {
    colour.lower(): dark
    for colour, dark in (
        (INK, _DARK_INK),
        (GRID, _DARK_GRID),
        (PAPER, _DARK_PAPER),
        ("white", _DARK_PAPER),
        *zip(COLOURS, _DARK_COLOURS),
        *((colour, dark) for (_, colour), dark in zip(get_colorscale(DIVERGING), _DARK_DIVERGING)),
    )
}
"""What each colour of the light figures is on a dark page, the stops of the diverging scale among them."""


def in_dark(part: Any) -> Any:
    """A part of a figure's JSON with the colours of the dark page; what is no colour of these figures stays."""
    if isinstance(part, dict):
        return {key: in_dark(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [in_dark(value) for value in part]
    return DARK.get(part.lower(), part) if isinstance(part, str) else part


def _template() -> go.layout.Template:
    axis = {
        "gridcolor": GRID,
        "linecolor": INK,
        "zerolinecolor": GRID,
        "showline": True,
        "ticks": "outside",
        "automargin": True,
        "title": {"font": {"size": 17}, "standoff": 8},
    }
    return go.layout.Template(
        layout={
            "font": {"family": "Arial, Helvetica, sans-serif", "size": 16, "color": INK},
            "title": {"font": {"size": 18}, "x": 0, "xref": "paper", "xanchor": "left"},
            "annotationdefaults": {"font": {"size": 16}},
            "colorway": COLOURS,
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "hoverlabel": {"align": "left"},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 60},
        }
    )


pio.templates[TEMPLATE] = _template()
pio.templates[DARK_TEMPLATE] = go.layout.Template(in_dark(_template().to_plotly_json()))


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis for positive values, with labels of one size: 1, 2, 5, 10 and so on, or powers of ten where those were too many."""
    kept = [value for value in values if value > 0 and math.isfinite(value)] or [1.0]
    low, high = math.floor(math.log10(min(kept))), math.ceil(math.log10(max(kept)))
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def whole(last: int) -> dict[str, Any]:
    """An axis of whole numbers from 1, such as directions: ticks at whole numbers alone, some six of them."""
    step = max(1, last // 6)
    return {"tick0": 0 if step > 1 else 1, "dtick": step}


def marker(index: int, *, size: int = 8) -> dict[str, Any]:
    """Colour and symbol of the curve of that number: the same in every figure, so that no curve is told by colour alone."""
    return {"color": COLOURS[index % len(COLOURS)], "symbol": symbol(index), "size": size}


def symbol(index: int) -> str:
    """The symbol of the curve of that number; from the ninth on each colour has another symbol than before."""
    return SYMBOLS[(index + index // len(COLOURS)) % len(SYMBOLS)]


def series(index: int, *, size: int = 8, width: float | int = 2) -> dict[str, Any]:
    """Marker and line of the curve of that number: colour, symbol and dash together tell it from the others."""
    line = {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index % len(DASHES)], "width": width}
    return {"marker": marker(index, size=size), "line": line}
