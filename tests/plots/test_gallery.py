"""Every figure as a real browser draws it: nothing clipped, covered or too small, at both widths of a paper, light and dark."""

import re

import plotly.graph_objects as go
import pytest
from in_browser import DOCS, browsing, gallery_module, layout_faults

from care_lens import plots
from care_lens.plots import paper


@pytest.fixture(scope="module")
def gallery():
    return gallery_module()


@pytest.fixture(scope="module")
def figures(gallery):
    return gallery.figures()


def test_every_figure_of_the_package_is_in_the_gallery(gallery, figures):
    source = (DOCS / "gallery_figures.py").read_text(encoding="utf-8")
    shown = set(re.findall(r"\bplot_\w+", source))
    lacking = {name for name in plots.__all__ if name.startswith("plot_")} - shown
    assert not lacking - {"plot_heads"}, lacking  # plot_mediation draws it
    assert set(figures) == set(gallery.ENTRIES)


def test_no_figure_is_clipped_covered_or_too_small(figures, tmp_path):
    with browsing() as browser:
        for columns, dark in ((1, False), (2, True)):  # colours move nothing
            made = {name: paper(figure, columns=columns, dark=dark) for name, figure in figures.items()}
            assert layout_faults(browser, made) == {}, (columns, dark)


def test_the_check_finds_what_is_wrong():
    clipped = go.Figure(go.Bar(x=["a"], y=[1])).update_layout(
        width=200, height=200, margin={"l": 0, "r": 0, "t": 0, "b": 0}
    )
    clipped.update_xaxes(title_text="a title that is far too long for such a narrow figure").update_yaxes(
        automargin=False
    )
    small = go.Figure(go.Scatter(y=[1, 2])).update_layout(width=300, height=200, font={"size": 7})
    notes = [{"text": text, "x": 1, "y": 1.5, "showarrow": False} for text in ("one note", "another note")]
    covered = go.Figure(go.Scatter(y=[1, 2], name="s", showlegend=True))
    covered.update_layout(width=300, height=200, annotations=notes, legend={"x": 0.2, "y": 0.5})
    fine = paper(go.Figure(go.Scatter(y=[1, 2], name="fine")))
    with browsing() as browser:
        found = layout_faults(browser, {"clipped": clipped, "small": small, "covered": covered, "fine": fine})
    assert set(found) == {"clipped", "small", "covered"}
    assert any("clipped" in fault for fault in found["clipped"])
    assert any("text of 7 px" in fault for fault in found["small"])
    assert any("on each other: one note" in fault for fault in found["covered"])
    assert any("legend covers a panel" in fault for fault in found["covered"])
