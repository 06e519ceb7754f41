"""Where the panels of a printed figure stand: as far apart as the labels and titles between them need, each with a height that is seen.

All functions take the traces and the layout of a figure as plotly's json has them, in their printed form (:mod:`care_lens.plots.paper`).
"""

import re
from html import unescape
from itertools import pairwise
from typing import Any

import numpy as np

FONT = 10
"""Pixels: 7.5 points on paper."""
BESIDE = 50
"""Pixels of a colour bar with its labels."""
_PANEL = 40
"""Pixels of a panel, at least."""


def axes(layout: dict[str, Any], letter: str) -> dict[str, dict[str, Any]]:
    """The axes of one letter, by what traces call them: x, x2, ..."""
    return {name.replace("axis", ""): part for name, part in layout.items() if re.fullmatch(rf"{letter}axis\d*", name)}


def on(data: list[dict[str, Any]], axis: str) -> list[str]:
    """The categories along an axis: the texts that traces have there, in their printed form."""
    traces = (trace for trace in data if trace.get(f"{axis[0]}axis", axis[0]) == axis)
    return list(dict.fromkeys(v for trace in traces for v in trace.get(axis[0]) or () if isinstance(v, str)))


def wide(text: str) -> float:
    """Pixels of the longest line of a text."""
    return max(len(line) for line in unescape(text).split("<br>")) * FONT * 0.53


def _beneath(data: list[dict[str, Any]], axis: dict[str, Any], name: str) -> float:
    """Pixels that an x axis takes below its panel: its labels, which may stand upright, and its title."""
    title = axis.get("title") or {}
    title = title if isinstance(title, str) else title.get("text") or ""
    labels = [str(text) for text in axis.get("ticktext") or on(data, name)]
    if axis.get("showticklabels") is False:
        took = 4.0
    elif labels and axis.get("tickangle") in (-90, 90):
        took = max(map(wide, labels)) + 8
    else:
        took = FONT * 1.3 * max((label.count("<br>") + 1 for label in labels), default=1) + 8
    return took + (FONT * 1.3 * (title.count("<br>") + 1) + 4 if title else 0)


def has_bar(data: list[dict[str, Any]], layout: dict[str, Any]) -> bool:
    """Whether a colour bar stands beside the panels."""
    return any(name.startswith("coloraxis") for name in layout) or any(
        trace["type"] == "heatmap" and "coloraxis" not in trace and trace.get("showscale", True) for trace in data
    )


def _rows_of(layout: dict[str, Any]) -> list[tuple[float, float]]:
    """The panels' places from the top, as shares of the height; none where they overlap other than as whole rows."""
    domains = [axis.get("domain") or (0.0, 1.0) for axis in axes(layout, "y").values()]
    rows = sorted({(float(low), float(high)) for low, high in domains}, reverse=True)
    return [] if any(upper[0] < lower[1] for upper, lower in pairwise(rows)) else rows


def _notes(layout: dict[str, Any]) -> list[dict[str, Any]]:
    """The titles of the panels."""
    return [n for n in layout.get("annotations", []) if n.get("yref") == "paper" and not n.get("showarrow", True)]


def _between(
    data: list[dict[str, Any]], layout: dict[str, Any]
) -> tuple[list[tuple[float, float]], list[float], float]:
    """The rows of panels, the pixels that stand between them (labels and titles), and those below the last; no rows where they overlap."""
    rows, x_axes, y_axes = _rows_of(layout), axes(layout, "x"), axes(layout, "y")
    took = []
    for low, high in rows:
        below = [
            _beneath(data, x_axes[str(y.get("anchor", "x"))], str(y.get("anchor", "x")))
            for y in y_axes.values()
            if tuple(y.get("domain") or (0, 1)) == (low, high) and str(y.get("anchor", "x")) in x_axes
        ]
        heads = [str(n.get("text", "")).count("<br>") + 1 for n in _notes(layout) if abs(n.get("y", -1) - high) < 1e-6]
        took.append((max(below, default=0.0), max(heads, default=0) * FONT * 1.4 + 4 if heads else 0.0))
    gaps = [took[at][0] + took[at + 1][1] + 4 for at in range(len(rows) - 1)]
    return rows, gaps, took[-1][0] if took else 0.0


def least(data: list[dict[str, Any]], layout: dict[str, Any]) -> float:
    """Pixels below the head that a figure needs, so that each category has its lines and each panel a height that is seen."""
    need = 0.0
    for name, axis in axes(layout, "y").items():
        low, high = axis.get("domain") or (0.0, 1.0)
        lines = [label.count("<br>") + 1 for label in on(data, name)]
        need = max(need, max(sum(lines) and max(lines) * len(lines) * FONT * 1.25, _PANEL) / max(high - low, 1e-3))
    last = [_beneath(data, axis, name) for name, axis in axes(layout, "x").items()]
    rows, gaps, _ = _between(data, layout)
    if any(name.startswith("coloraxis") for name in layout):
        need = max(need, 2.0 * _PANEL)
    return max(need, _PANEL * len(rows) + sum(gaps)) + max(last, default=0.0)


def spaced(data: list[dict[str, Any]], layout: dict[str, Any]) -> None:
    """Panels that stand below each other set as far apart as the labels and titles between them need, and no farther."""
    rows, gaps, last = _between(data, layout)
    if len(rows) < 2:
        return
    y_axes, notes = axes(layout, "y"), _notes(layout)
    whole = layout["height"] - layout["margin"]["t"] - layout["margin"]["b"] - last
    if (left := whole - sum(gaps)) < _PANEL * len(rows) / 2:
        return
    share = sum(high - low for low, high in rows)
    placed, top = {}, 1.0
    for at, (low, high) in enumerate(rows):
        size = (high - low) / share * left / whole
        placed[low, high] = (max(top - size, 0.0), top)
        top -= size + (gaps[at] / whole if at < len(gaps) else 0)

    def moved(y: float) -> float:
        for (low, high), (new_low, new_high) in placed.items():
            if low - 1e-6 <= y <= high + 1e-6:
                return new_low + (y - low) / (high - low) * (new_high - new_low)
        return y

    for axis in y_axes.values():
        axis["domain"] = list(placed[tuple(axis.get("domain") or (0, 1))])
    for note in notes:
        note["y"] = moved(note["y"])
    for name, part in [*layout.items(), *((f"trace {k}", trace) for k, trace in enumerate(data))]:
        bar = part.get("colorbar") if isinstance(part, dict) else None
        if bar and bar.get("y") is not None and bar.get("len") is not None and not name.startswith("coloraxis"):
            ends = [moved(bar["y"] + sign * bar["len"] / 2) for sign in (-1, 1)]
            bar |= {"y": sum(ends) / 2, "len": ends[1] - ends[0]}


def thinned(layout: dict[str, Any]) -> None:
    """Upright labels of an x axis that would stand on each other left out: the folded picture stays, then what comes first from the left."""
    for axis in axes(layout, "x").values():
        at, texts = axis.get("tickvals"), axis.get("ticktext")
        if at is None or texts is None or axis.get("tickangle") not in (-90, 90) or len(at) < 2:
            continue
        at, named = np.asarray(at, dtype=float).tolist(), [str(text) for text in texts]
        left, right = axis.get("domain") or (0, 1)
        ends = axis.get("range")
        low, high = (at[0] - 0.5, at[-1] + 0.5) if ends is None else (float(ends[0]), float(ends[1]))
        room = layout["width"] - BESIDE - (BESIDE if any(name.startswith("coloraxis") for name in layout) else 0)
        pixel = room * (right - left) / abs(float(high) - float(low))
        kept: list[int] = []
        for index in sorted(range(len(at)), key=lambda k: (not named[k].startswith("image ("), k)):
            if all(abs(at[index] - at[other]) * pixel >= FONT * 0.85 for other in kept):
                kept.append(index)
        kept.sort()
        axis |= {"tickvals": [at[k] for k in kept], "ticktext": [named[k] for k in kept]}
