"""The look of all figures, and how they are saved."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from care_lens.core.errors import CareLensError
from care_lens.core.files import write_whole

log = logging.getLogger(__name__)

TEMPLATE = "care_lens"
"""Name of the template, registered with plotly when this module is imported; plotly's default stays."""

DIVERGING = "RdBu"
"""Colours of signed values, centred on 0."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D5D5D", "#8C6D1F")
"""Colours of series; after Okabe and Ito, told apart with colour-blind eyes and in print."""

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down")
"""Marker of each series, so that colour is never all that tells them apart."""

INK, GRID = "#1C2430", "#DDE2EA"
STATIC_FORMATS = (".pdf", ".svg", ".png")
_WIDTH, _HEIGHT, _PNG_SCALE = 640, 420, 3


class ExportError(CareLensError, RuntimeError):
    """A static picture could not be made; the interactive figure was written."""


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
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hoverlabel": {"align": "left"},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
            "margin": {"l": 60, "r": 20, "t": 70, "b": 60},
        }
    )


pio.templates[TEMPLATE] = _template()


def figure_html(figure: go.Figure, *, include_plotlyjs: bool | str, full_html: bool = True, name: str = "") -> str:
    """The page of a figure, the same text whenever it is made of the same figure.

    Plotly calls a figure's element by a random id; here the id is a digest of the name and of the figure.

    Args:
        figure: The figure.
        include_plotlyjs: As :func:`plotly.io.to_html` takes it: "inline", "directory", or False where the page has the script already.
        full_html: Whether it is a page, or only the part that goes into one.
        name: What tells it from the other figures of a page.
    """
    made = hashlib.sha256(f"{name}\n{figure.to_json()}".encode()).hexdigest()
    script: Any = include_plotlyjs
    return pio.to_html(figure, include_plotlyjs=script, full_html=full_html, div_id=f"figure-{made[:16]}")


def _write_script(path: Path) -> None:
    """Plotly's own script, which the pages of a folder share, unless it is there whole."""
    script = get_plotlyjs().encode()
    if not path.exists() or path.stat().st_size != len(script):
        write_whole(path, script)


def save_figure(figure: go.Figure, path: str | Path) -> list[Path]:
    """Write a figure to files that stand side by side.

    The interactive page (``.html``) and the figure's data (``.json``) are always written; pages of one folder
    share one copy of plotly's script, so that they open without a network. A path that ends in .pdf, .svg or
    .png is written as well, without menus; that needs kaleido (the extra ``plots-export``) and a Chrome or
    Chromium. Page and data are whole or not written, and the same bytes whenever the same figure is saved.

    Args:
        figure: The figure.
        path: Where to; without a suffix it is taken as .html. The folder is made if it does not exist.

    Returns:
        The paths written, that of the page first.

    Raises:
        ValueError: If the suffix is another one.
        ExportError: If the static picture cannot be made; the page and the data are there all the same.
    """
    path = Path(path)
    suffix = path.suffix.lower() or ".html"
    if suffix not in (".html", *STATIC_FORMATS):
        raise ValueError(f"path must end in .html, .pdf, .svg or .png, got {path.name!r}")
    page, data = path.with_suffix(".html"), path.with_suffix(".json")
    _write_script(path.with_name("plotly.min.js"))
    write_whole(page, figure_html(figure, include_plotlyjs="directory"))
    write_whole(data, str(figure.to_json()))
    if suffix == ".html":
        return [page, data]
    width, height = figure.layout.width or _WIDTH, figure.layout.height or _HEIGHT  # type: ignore[attr-defined]
    still = go.Figure(figure).update_layout(updatemenus=[], overwrite=True)
    try:
        still.write_image(path, width=width, height=height, scale=_PNG_SCALE if suffix == ".png" else 1)
    except (ImportError, ValueError, RuntimeError, OSError) as error:
        raise ExportError(
            f"{path.name} could not be written ({type(error).__name__}); pip install "
            f"'care-lens[plots-export]' and a Chrome or Chromium, or use {page.name}"
        ) from error
    return [page, data, path]


def marker(index: int, *, size: int = 8) -> dict[str, Any]:
    """Colour and symbol of the curve of that number: the same in every figure, so that no curve is told by colour alone."""
    return {"color": COLOURS[index % len(COLOURS)], "symbol": SYMBOLS[index % len(SYMBOLS)], "size": size}
