"""Figures as files: an interactive page, its data, and PDF, SVG and PNG for papers."""

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from care_lens.core.errors import ArtifactError, CareLensError
from care_lens.core.files import write_whole
from care_lens.plots.paper import paper

STATIC_FORMATS = (".pdf", ".svg", ".png")
_WIDTH, _HEIGHT, _PNG_SCALE = 640, 420, 4


class ExportError(CareLensError, RuntimeError):
    """A static picture could not be made; the interactive figure was written."""


def figure_html(figure: go.Figure, *, include_plotlyjs: bool | str, full_html: bool = True, name: str = "") -> str:
    """The page of a figure, the same text whenever it is made of the same figure.

    Plotly calls a figure's element by a random id; here the id is a digest of the name and of the figure.

    Args:
        figure: The figure.
        include_plotlyjs: As :func:`plotly.io.to_html` takes it: "inline", "directory", or False where the page has the script already.
        full_html: Whether it is a page, or only the part that goes into one.
        name: What tells it from the other figures of a page.
    """
    script: Any = include_plotlyjs
    return pio.to_html(figure, include_plotlyjs=script, full_html=full_html, div_id=element_id(figure, name))


def element_id(figure: go.Figure, name: str) -> str:
    """The id of a figure's element: a digest of its name and of the figure."""
    made = hashlib.sha256(f"{name}\n{figure.to_json()}".encode()).hexdigest()
    return f"figure-{made[:16]}"


def _write_script(path: Path) -> None:
    """Plotly's own script, which the pages of a folder share, unless it is there whole."""
    script = get_plotlyjs().encode()
    if not path.exists() or path.stat().st_size != len(script):
        write_whole(path, script)


def _require_own(path: Path) -> None:
    """Refuse to write a figure's data over anything but a figure's data, such as the manifest of a saved result."""
    if not path.exists():
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        held = None
    if not (isinstance(held, dict) and {"data", "layout"} <= {*held}):
        raise ArtifactError(
            f"{path} must be a figure's data or not be there, got another file, which is left as it is; give the figure another name "
            "or folder (a saved result has files of its own name)"
        )


def save_figure(
    figure: go.Figure,
    path: str | Path,
    *,
    columns: Literal[1, 2] | None = None,
    dark: bool = False,
    formats: str | Sequence[str] = (),
) -> list[Path]:
    """Write a figure to files that stand side by side.

    The interactive page (``.html``) and the figure's data (``.json``) are always written; pages of one folder
    share one copy of plotly's script, so that they open without a network. A path that ends in .pdf, .svg or
    .png is written as well, without menus; that needs kaleido (the extra ``plots-export``) and a Chrome or
    Chromium. Page and data are whole or not written, and the same bytes whenever the same figure is saved.

    Args:
        figure: The figure.
        path: Where to; without a suffix it is taken as .html. The folder is made if it does not exist.
        columns: 1 or 2 puts PDF, SVG and PNG into the style of a paper, one column or two wide (:func:`~care_lens.plots.paper`);
            None: they are as large as the figure.
        dark: Whether PDF, SVG and PNG are for a dark page; only with ``columns``.
        formats: A further format, or several, beside that of the path: "pdf", "svg", "png".

    Returns:
        The paths written, that of the page first.

    Raises:
        ValueError: If the suffix or a format is another one, ``columns`` is not 1 or 2, or ``dark`` is asked for without ``columns``.
        ArtifactError: If the ``.json`` is there and is no figure's data (a result that was saved under the same name); nothing is written.
        ExportError: If the static picture cannot be made; the page and the data are there all the same.

    Example:
        A figure for one column of a paper, as PDF for the text and PNG for slides::

            save_figure(result.plot(), "figures/effects.pdf", columns=1, formats=("png",))
    """
    path = Path(path)
    suffix = path.suffix.lower() or ".html"
    if suffix not in (".html", *STATIC_FORMATS):
        raise ValueError(f"path must end in .html, .pdf, .svg or .png, got {path.name!r}")
    more = [f".{name.lower().removeprefix('.')}" for name in ([formats] if isinstance(formats, str) else formats)]
    if unknown := [name for name in more if name not in STATIC_FORMATS]:
        raise ValueError(f"formats must be among pdf, svg and png, got {unknown}")
    if dark and columns is None:
        raise ValueError("dark must come with columns, got dark=True alone; say columns=1 or columns=2 too")
    still = go.Figure(figure) if columns is None else paper(figure, columns=columns, dark=dark)
    still.update_layout(updatemenus=[], overwrite=True)
    page, data = path.with_suffix(".html"), path.with_suffix(".json")
    _require_own(data)
    _write_script(path.with_name("plotly.min.js"))
    write_whole(page, figure_html(figure, include_plotlyjs="directory"))
    write_whole(data, str(figure.to_json()))
    wanted = dict.fromkeys(name for name in (suffix, *more) if name != ".html")
    targets = [path if name == suffix else path.with_suffix(name) for name in wanted]
    for target in targets:
        _write_still(still, target, page=page.name)
    return [page, data, *targets]


def _write_still(figure: go.Figure, path: Path, *, page: str) -> None:
    layout: Any = figure.layout
    try:
        figure.write_image(
            path,
            width=layout.width or _WIDTH,
            height=layout.height or _HEIGHT,
            scale=_PNG_SCALE if path.suffix.lower() == ".png" else 1,
        )
    # Kaleido, its browser and asyncio each raise errors of their own, some of them plain Exceptions.
    except Exception as error:
        lacking = (
            "kaleido is not installed: pip install 'care-lens[plots-export]'"
            if find_spec("kaleido") is None
            else "kaleido needs a Chrome or Chromium that starts: install one (Debian: apt-get install chromium; elsewhere: "
            "plotly_get_chrome), and set BROWSER_PATH if it is at an unusual place; the extra plots-export has the rest"
        )
        raise ExportError(
            f"{path.name} could not be written ({type(error).__name__}); {lacking}; or use {page}, which was written"
        ) from error
