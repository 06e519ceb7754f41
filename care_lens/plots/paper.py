"""Figures as a paper prints them: one column or two wide, text of at least 7 points, nothing clipped or covered."""

import re
from collections.abc import Mapping
from html import unescape
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from care_lens.plots import theme
from care_lens.plots.frames import MARK, literal
from care_lens.plots.panels import BESIDE, FONT, axes, has_bar, least, on, spaced, thinned, wide

WIDTHS: dict[int, float] = {1: 3.3, 2: 7.0}
"""Inches, by columns: of the usual two-column layouts."""
PIXELS_PER_INCH = 96
"""Of a layout: a PDF of 96 pixels is one inch wide."""
TALLEST = 9.0
"""Inches: no figure is higher than the text of a page, unless it is told to be."""

_SHRINK = 0.62
_CHARACTER = 0.5 * FONT
_LINE = FONT * 1.5
_ITEM = 30
_EMS = dict.fromkeys("fijlrtI.,:;'|!() ", 0.3) | dict.fromkeys("mwMW@%", 0.85)
"""Widths of the letters that are far from the usual 0.56 em in Arial."""
_LABEL, _NAME, _TITLE = {1: 30, 2: 44}, {1: 24, 2: 34}, {1: 48, 2: 110}
_LABELS = ("x", "y", "name", "ticktext", "categoryarray")
_SITE = re.compile(r"(?P<vision>vision\.)?blocks\.(?P<layer>\d+(?:-\d+)?)\.(?P<component>(?:attn\.|mlp\.)?hook_\w+)")
_SHORT_COMPONENTS = {
    "hook_resid_pre": "resid in",
    "attn.hook_pattern": "pattern",
    "attn.hook_z": "head",
    "hook_attn_out": "attn",
    "hook_resid_mid": "resid mid",
    "mlp.hook_post": "neuron",
    "hook_mlp_out": "MLP",
    "hook_resid_post": "resid",
}
_COMPONENTS_ALONE = {name.replace("hook_", ""): short for name, short in _SHORT_COMPONENTS.items()}
_WORDS = {"projector.hook_out": "projector", "projector.hook_in": "projector in", "vision.hook_embed": "V embed"}
_TEXTS = (*_LABELS, "text")


def short_site(text: str) -> str:
    """A text with the names of sites made short: layer, then what it is; V for the vision tower.

    Example:
        >>> short_site("blocks.12.hook_mlp_out"), short_site("vision.blocks.3.attn.hook_z[4]")
        ('L12 MLP', 'V3 head[4]')
    """
    for long, short in _WORDS.items():
        text = text.replace(long, short)

    def brief(found: re.Match[str]) -> str:
        component = found["component"]
        return f"{'V' if found['vision'] else 'L'}{found['layer']} {_SHORT_COMPONENTS.get(component, component)}"

    return _SITE.sub(brief, text)


def paper(
    figure: go.Figure,
    *,
    columns: Literal[1, 2] = 1,
    dark: bool = False,
    names: Mapping[str, str] | None = None,
    height: float | int | None = None,
) -> go.Figure:
    """A copy of a figure as a paper prints it.

    Text is 7.5 points at the printed size, names of sites are short, long labels are broken into lines, the legend stands above the
    panels, colour bars stand beside them, and menus are left out (what they show first stays). Words in the cells of a heat map that
    a cell has no room for are cut, with an ellipsis, or left out.

    Args:
        figure: Any of the figures of this package; others work as far as they leave fonts and margins to the template.
        columns: 1 (3.3 inches) or 2 (7 inches).
        dark: Whether it is for a dark page.
        names: What texts are printed as, whole labels by whole labels: channels, defences, tokens.
        height: In inches; None: by what the figure shows.

    Returns:
        The figure; save it as PDF, SVG or PNG with :func:`~care_lens.plots.save_figure`, which also makes it of the original
        when it is given ``columns``.

    Raises:
        ValueError: If ``columns`` is not 1 or 2, or the height is below half an inch.

    Example:
        >>> import plotly.graph_objects as go
        >>> printed = paper(go.Figure(go.Scatter(y=[1, 2], name="blocks.3.hook_mlp_out")), columns=1)
        >>> printed.layout.width, printed.data[0].name
        (317, 'L3 MLP')
    """
    if columns not in WIDTHS:
        raise ValueError(f"columns must be 1 or 2, got {columns!r}")
    if height is not None and height < 0.5:
        raise ValueError(f"height must be half an inch or more, got {height}")
    made = figure.to_plotly_json()
    data, layout = made["data"], dict(made["layout"])
    layout.pop("template", None)
    layout.pop("updatemenus", None)
    names = dict(names or {})
    data = [_trace(trace, names, columns) for trace in data]
    width = round(WIDTHS[columns] * PIXELS_PER_INCH)
    layout = _small(_renamed(_titled(layout, names, width), names, columns))
    entry, lines = _legend(data, layout, width)
    top = _head(layout) + lines
    tallest = round((height or TALLEST) * PIXELS_PER_INCH)
    wanted = max(_height(figure, layout, width) + round(top), round(top + least(data, layout)))
    layout |= {
        "width": width,
        "height": tallest if height else min(wanted, tallest),
        "margin": {"l": 6, "r": 8, "t": round(top), "b": 6, "pad": 0},
        "font": {"size": FONT},
        "autosize": False,
        "minreducedheight": 20,
        "minreducedwidth": 40,
    }
    if title := layout.get("title", {}).get("text"):
        layout["title"] = {"text": title, "font": {"size": FONT}, "x": 0, "xref": "container", "xanchor": "left"}
        layout["title"] |= {"y": 1 - 2 / layout["height"], "yref": "container", "yanchor": "top", "pad": {"l": 4}}
    beneath = (_LINE if layout.get("title", {}).get("text") else 0) / layout["height"]
    layout["legend"] = {
        "orientation": "h",
        "font": {"size": FONT},
        "x": 0,
        "xref": "container",
        "xanchor": "left",
        "y": 1 - beneath,
        "yref": "container",
        "yanchor": "top",
        "itemwidth": _ITEM,
        "entrywidth": entry,
        "entrywidthmode": "pixels",
        "tracegroupgap": 0,
        "maxheight": 1,
    }
    for note in layout.get("annotations", []):
        note["font"] = {**note.get("font", {}), "size": FONT}
    for name, part in layout.items():
        if re.fullmatch(r"[xy]axis\d*", name):
            _axis(part)
        elif re.fullmatch(r"coloraxis\d*", name):
            _bar(part.setdefault("colorbar", {}))
    spaced(data, layout)
    thinned(layout)
    for trace in data:
        if trace["type"] == "heatmap" and trace.get("texttemplate"):
            _fit_words(trace, layout)
    if dark:
        data, layout = theme.in_dark(data), theme.in_dark(layout)
    return go.Figure(data, {**layout, "template": theme.DARK_TEMPLATE if dark else theme.TEMPLATE})


def _height(figure: go.Figure, layout: dict[str, Any], width: int) -> int:
    """The figure's own height, shrunk as its text is; of pictures with a square scale as its width is, in two columns up to a square of one column."""
    own: Any = figure.layout
    if any(part.get("scaleanchor") for name, part in layout.items() if name.startswith("yaxis")) and own.width:
        flat, column = (own.height or 420) / own.width, WIDTHS[1] * PIXELS_PER_INCH
        return round(min(flat * width, max(flat, 1) * column))
    return round((own.height or 420) * _SHRINK)


def _titled(layout: dict[str, Any], names: Mapping[str, str], width: int) -> dict[str, Any]:
    """Titles of panels that stand side by side broken to the width of their panel."""
    domains = [tuple(axis.get("domain") or (0.0, 1.0)) for axis in axes(layout, "x").values()]

    def fitted(note: dict[str, Any]) -> dict[str, Any]:
        over = [right - left for left, right in domains if abs((left + right) / 2 - note.get("x", -1)) < 1e-6]
        if note.get("xref") != "paper" or not over or min(over) > 0.6 or note.get("text") in names:
            return note
        room = int((width - BESIDE) * min(over) / _CHARACTER)
        return {**note, "text": _broken(short_site(str(note["text"])), max(room, 6))}

    return {**layout, "annotations": [fitted(note) for note in layout.get("annotations", [])]}


def _broken(text: str, longest: int) -> str:
    """Long text in lines, broken after spaces, slashes and plus signs."""
    if "<br>" in text:
        return "<br>".join(_broken(part, longest) for part in text.split("<br>"))
    if len(text) <= longest:
        return text
    lines, line = [], ""
    for word in re.split(r"(?<=[\s+/])", text):
        if line and len(line) + len(word.rstrip()) > longest:
            lines.append(line.rstrip())
            line = ""
        line += word
    return "<br>".join([*lines, line.rstrip()])


def _renamed(part: Any, names: Mapping[str, str], columns: int, key: str = "") -> Any:
    """Texts that are seen (labels, names, ticks, titles) in their printed form."""
    if isinstance(part, dict):
        return (
            part if "bdata" in part else {name: _renamed(value, names, columns, name) for name, value in part.items()}
        )
    if isinstance(part, np.ndarray):
        return part if part.dtype.kind in "biufM" else _renamed(part.tolist(), names, columns, key)
    if isinstance(part, (list, tuple)):
        return [_renamed(value, names, columns, key) for value in part]
    if not isinstance(part, str) or key not in _TEXTS:
        return part
    if part in names:
        return names[part]
    short = _COMPONENTS_ALONE.get(part) or short_site(part)
    return _broken(short, (_NAME if key == "name" else _LABEL if key in _LABELS else _TITLE)[columns])


def _trace(trace: dict[str, Any], names: Mapping[str, str], columns: int) -> dict[str, Any]:
    kept = {key: trace[key] for key in ("customdata", "hovertemplate", "z") if key in trace}
    trace = _small({**_renamed(trace, names, columns), **kept})
    marker = trace.get("marker")
    if isinstance(marker, dict) and isinstance(marker.get("size"), (int, float)):
        marker["size"] = max(4, round(marker["size"] * _SHRINK, 1))
    for key in ("error_x", "error_y"):
        if key in trace:
            trace[key] |= {"thickness": 1, "width": 2}
    if isinstance(trace.get("line"), dict) and trace["line"].get("width"):
        trace["line"]["width"] = max(1, trace["line"]["width"] * _SHRINK)
    if trace["type"] == "heatmap" and "coloraxis" not in trace and trace.get("showscale", True):
        _bar(trace.setdefault("colorbar", {}))
    return trace


def _bar(bar: dict[str, Any]) -> None:
    """A narrow colour bar beside what it is for."""
    title = bar.get("title") or {}
    title = {"text": title} if isinstance(title, str) else title
    side = "right" if len(title.get("text") or "") > 6 else "top"
    bar |= {
        "thickness": 8,
        "outlinewidth": 0,
        "ticklen": 2,
        "tickfont": {"size": FONT},
        "xpad": 4,
        "ypad": 2,
        "nticks": 5,
    }
    bar["title"] = {**title, "font": {"size": FONT}, "side": side}


def _fit_words(trace: dict[str, Any], layout: dict[str, Any]) -> None:
    """What stands in the cells of a heat map fitted to them: words cut or left out, numbers left out where one does not fit, dots smaller."""
    text = np.asarray(trace.get("text"), dtype=object)
    if text.ndim != 2:
        return
    x, y = (layout.get(f"{name}axis{trace.get(f'{name}axis', name)[1:]}", {}) for name in "xy")
    (left, right), (low, up) = (axis.get("domain") or (0, 1) for axis in (x, y))
    margin = layout["margin"]
    side = (layout["width"] - margin["l"] - margin["r"] - BESIDE) * (right - left) / text.shape[1]
    if y.get("scaleanchor"):
        side = min(side, (layout["height"] - margin["t"] - margin["b"]) * (up - low) / text.shape[0])
    if any(re.search("[^\\W\\d]", str(word)) for word in text.flat):
        trace["text"] = [[_cut(str(word), (side - 1) / FONT) for word in row] for row in text]
        return
    high = (layout["height"] - margin["t"] - margin["b"] - BESIDE) * (up - low) / text.shape[0]
    if not any(re.search(r"\d", str(word)) for word in text.flat):
        trace["textfont"] = {**trace.get("textfont", {}), "size": round(min(FONT, max(2.0, 0.7 * min(side, high))), 1)}
        return
    wide = max(len(word) for word in map(str, text.flat)) * _CHARACTER
    if min(side / (wide + 2), high / (FONT * 1.2)) >= 1:
        return
    dots = [["".join(re.findall(MARK, str(word))) for word in row] for row in text]
    trace["text"] = dots
    trace["textfont"] = {**trace.get("textfont", {}), "size": round(min(FONT, max(2.0, 0.7 * min(side, high))), 1)}


def _cut(word: str, room: float) -> str:
    """A word cut to a width in ems; nothing where less than two of its characters and the ellipsis, one em wide, would be left."""
    word = unescape(word)
    ends = np.cumsum([_EMS.get(letter, 0.56) for letter in word])
    if not len(ends) or ends[-1] <= room:
        return literal(word)
    kept = int((ends + 1 <= room).sum())
    return literal(f"{word[:kept]}\N{HORIZONTAL ELLIPSIS}") if kept > 1 else ""


def _small(part: Any, key: str = "") -> Any:
    """Fonts of the printed size."""
    if isinstance(part, dict):
        made = {name: _small(value, name) for name, value in part.items()}
        return {**made, "size": FONT} if key.endswith("font") else made
    if isinstance(part, list):
        return [_small(value, key) for value in part] if part and isinstance(part[0], dict) else part
    return part


def _axis(axis: dict[str, Any]) -> None:
    title = axis.get("title") or {}
    title = {"text": title} if isinstance(title, str) else title
    axis["title"] = {**title, "font": {"size": FONT}, "standoff": 3}
    axis["tickfont"] = {**axis.get("tickfont", {}), "size": FONT}
    axis.setdefault("ticklen", 3)
    axis["automargin"] = True


def _legend(data: list[dict[str, Any]], layout: dict[str, Any], width: int) -> tuple[int, float]:
    """Width of the text of an entry, and the height of the whole legend; 0 where there is none."""
    shown = [t for t in data if t.get("showlegend", True) and t.get("visible", True) is True and t["type"] != "heatmap"]
    if not shown or not layout.get("showlegend", len(shown) > 1):
        return 0, 0.0
    named = [str(trace.get("name", "")).split("<br>") for trace in shown]
    entry = max(len(line) for lines in named for line in lines) * _CHARACTER
    # Plotly sets entries beside each other in the width of the panels alone: without labels, titles and colour bars.
    beside = [
        max(map(wide, on(data, name) or [str(text) for text in axis.get("ticktext") or ()]), default=24.0)
        + (_LINE if axis.get("title") else 0)
        for name, axis in axes(layout, "y").items()
    ]
    room = width - 14 - max(beside, default=0.0) - (BESIDE if has_bar(data, layout) else 0)
    across = max(1, int(room // (entry + _ITEM + 16)))
    rows = [named[start : start + across] for start in range(0, len(named), across)]
    return round(entry), sum(max(map(len, row)) * FONT * 1.3 + 6 for row in rows) + 8


def _head(layout: dict[str, Any]) -> float:
    """Height of the titles above the panels: of the figure, and of the first panels."""
    notes = [n for n in layout.get("annotations", []) if n.get("yref", "paper") == "paper" and n.get("y", 0) > 0.98]
    lines = max((str(note.get("text", "")).count("<br>") + 1 for note in notes), default=0)
    return (_LINE if layout.get("title", {}).get("text") else 0.0) + lines * FONT * 1.3 + 6
