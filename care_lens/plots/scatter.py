"""Rows in the coordinates of a safety subspace, before and after a repair."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from care_lens.plots import theme
from care_lens.subspace import SafetySubspace

_UNIT = "benign standard deviations"


def plot_before_after(
    subspace: SafetySubspace,
    before: Mapping[str, Float[Tensor, "_n d"]],
    after: Mapping[str, Float[Tensor, "_n d"]] | None = None,
    *,
    safe: str = "benign",
    most: int = 400,
) -> go.Figure:
    """Rows along the first two directions of a subspace: where they are, and where an edit puts them.

    A subspace of rank 1 has one direction; rows of a group are then spread over a strip, whose height says nothing.

    Args:
        subspace: The subspace.
        before: [n, d] activations at its site, by group: "benign", an attack channel, ...
        after: The same of groups after the edit; a group that is in both is joined by lines, row by row. None: no edit is shown.
        safe: The group that is drawn in the colour of what is safer; the first of the others is in that of what is less safe.
        most: How many rows of a group are drawn, spread evenly; all count in the caption of the axes.

    Returns:
        The figure: filled marks before, open ones after.

    Raises:
        ValueError: If there are no rows, or a group of ``after`` is not in ``before`` or has another number of rows.
        SubspaceMismatchError: If rows are of another width.
    """
    if not before or any(len(rows) == 0 for rows in before.values()):
        raise ValueError("before must hold rows of one group or more, got none")
    after = dict(after or {})
    if odd := [name for name, rows in after.items() if name not in before or len(rows) != len(before[name])]:
        raise ValueError(f"after must hold groups of before, row by row, got {odd}; give the same rows before the edit")
    colours = _colours(list(before), safe)
    figure = go.Figure()
    for place, (name, rows) in enumerate(before.items()):
        index, shown = colours[name], _spread(len(rows), most)
        start = _points(subspace, rows, place)[shown]
        look = {"color": theme.COLOURS[index], "size": 7, "symbol": theme.SYMBOLS[index]}
        if name in after:
            end = _points(subspace, after[name], place)[shown]
            joined = np.stack([start, end, np.full_like(start, np.nan)], axis=1).reshape(-1, 2)
            line = {"color": theme.COLOURS[index], "width": 0.6}
            figure.add_trace(_marks(joined, f"{name}, moves", mode="lines", line=line, opacity=0.35, showlegend=False))
            figure.add_trace(_marks(start, f"{name}, before", mode="markers", marker={**look, "opacity": 0.6}))
            opened = {**look, "symbol": f"{look['symbol']}-open", "line": {"width": 1.5}}
            figure.add_trace(_marks(end, f"{name}, after", mode="markers", marker=opened))
        else:
            figure.add_trace(_marks(start, name, mode="markers", marker={**look, "opacity": 0.6}))
    told = ", ".join(f"{name} {len(rows)}" for name, rows in before.items())
    flat = subspace.rank == 1
    figure.update_layout(
        template=theme.TEMPLATE,
        height=420,
        showlegend=True,
        xaxis={"title": {"text": f"direction 1, {_UNIT} (n: {told})"}},
        yaxis={"title": {"text": f"direction 2, {_UNIT}"}},
    )
    if flat:
        figure.update_yaxes(tickvals=list(range(len(before))), ticktext=list(before), title_text="", zeroline=False)
    return figure


def _colours(names: list[str], safe: str) -> dict[str, int]:
    """The colour of each group: the second is for what is safe, the first for the first of the others."""
    others = iter([0, *range(2, len(theme.COLOURS))] * (1 + len(names)))
    return {name: 1 if name == safe else next(others) for name in names}


def _spread(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))


def _points(subspace: SafetySubspace, rows: Tensor, place: int) -> np.ndarray:
    """[n, 2] coordinates; of rank 1 the second is a strip about the group's place."""
    found = subspace.coordinates(rows.detach().cpu()).double().numpy()
    if found.shape[1] > 1:
        return found[:, :2]
    strip = np.random.default_rng(0).uniform(-0.3, 0.3, size=len(found))
    return np.stack([found[:, 0], place + strip], axis=1)


def _marks(points: np.ndarray, name: str, **look: Any) -> go.Scatter:
    return go.Scatter(x=points[:, 0], y=points[:, 1], name=name, **look)
