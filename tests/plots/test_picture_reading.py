"""Panels of a picture's reading, side by side or below each other."""

import pandas as pd
import pytest

from care_lens.plots import plot_picture_reading

ROWS = [
    {
        "grid": 0, "row": row, "col": col, "x0": 8.0 * col, "x1": 8.0 * col + 8, "y0": 8.0 * row, "y1": 8.0 * row + 8,
        "word": "cat", "probability": 0.5, "neighbour": "dog", "similarity": 0.25, "effect": effect, "kind": kind, "acts": kind == "read",
    }
    for row, col, effect, kind in ((0, 0, 1.0, "read"), (0, 1, -2.0, "acts"), (1, 0, 0.0, "legible"), (1, 1, 0.5, "neither"))
]  # fmt: skip


@pytest.mark.parametrize("stacked", [False, True])
def test_each_panel_has_its_own_place(stacked):
    figure = plot_picture_reading(pd.DataFrame(ROWS), stacked=stacked)
    heat = [trace for trace in figure.data if trace.type == "heatmap"]
    places = [
        (
            figure.layout[trace.xaxis.replace("x", "xaxis")].domain,
            figure.layout[trace.yaxis.replace("y", "yaxis")].domain,
        )
        for trace in heat
    ]
    assert [trace.z.tolist() for trace in heat] == [[[0.5] * 2] * 2, [[0.25] * 2] * 2, [[1.0, -2.0], [0.0, 0.5]]]
    assert len({(*x, *y) for x, y in places}) == 3
    across, down = len({x for x, _ in places}), len({y for _, y in places})
    assert (across, down) == ((1, 3) if stacked else (3, 1))
    # The first panel is the uppermost or the leftmost, as its title says.
    order = [-y[0] for _, y in places] if stacked else [x[0] for x, _ in places]
    assert order == sorted(order) and [note.text for note in figure.layout.annotations] == [
        "lens word",
        "nearest word",
        "NIE",
    ]
    marked = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert len(marked) == 3 and {(shape.x0, shape.y0, shape.x1, shape.y1) for shape in marked} == {(0.0, 0.0, 8.0, 8.0)}
    assert {shape.xref for shape in marked} == {trace.xaxis for trace in heat}


def test_without_neighbours_there_are_two_panels():
    figure = plot_picture_reading(pd.DataFrame(ROWS).assign(neighbour="", similarity=float("nan")), stacked=True)
    assert [note.text for note in figure.layout.annotations] == ["lens word", "NIE"]
