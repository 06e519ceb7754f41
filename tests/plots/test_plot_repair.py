"""Figures of subspaces and defences show the numbers they are given, and are saved."""

import json

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from care_lens.plots import ExportError, plot_asr, plot_spectrum, plot_tradeoff, save_figure
from care_lens.subspace import SafetySubspace


@pytest.fixture
def table():
    rows = [
        ("none", "typographic", "asr", 1.0, 0.9, 1.0),
        ("none", "wrapper", "asr", 0.6, 0.4, 0.8),
        ("none", "hard read", "accuracy", 0.9, 0.8, 0.95),
        ("care", "wrapper", "asr", 0.1, 0.02, 0.3),
        ("care", "typographic", "asr", 0.0, 0.0, 0.1),
        ("care", "hard read", "accuracy", 0.8, 0.7, 0.9),
        ("care", "hard read", "kl", 0.05, 0.01, 0.1),
    ]
    frame = pd.DataFrame(rows, columns=["defence", "channel", "metric", "value", "ci_low", "ci_high"])
    return frame.assign(n=20, missing=1, judge="words", seed=0)


def test_asr_and_accuracy_have_a_panel_each_with_a_series_a_defence(table):
    figure = plot_asr(table)
    by_place = {(t.yaxis, t.name): t for t in figure.data}
    assert {t.orientation for t in figure.data} == {"h"}
    assert set(by_place) == {("y", "none"), ("y", "care"), ("y2", "none"), ("y2", "care")}
    care = by_place["y", "care"]
    assert dict(zip(care.y, care.x, strict=True)) == {"typographic": 0.0, "wrapper": 0.1}
    assert list(care.error_x.array) == pytest.approx([0.2, 0.1])
    assert list(care.error_x.arrayminus) == pytest.approx([0.08, 0.0])
    assert list(care.customdata[0]) == [0.02, 0.3, 20, 1]
    assert list(figure.layout.yaxis.categoryarray) == ["typographic", "wrapper"]
    assert list(by_place["y2", "none"].x) == [0.9]
    assert by_place["y", "care"].marker.symbol != by_place["y", "none"].marker.symbol


def test_metrics_that_a_frame_lacks_are_left_out_but_not_all_of_them(table):
    figure = plot_asr(table, metrics=("asr", "agreement"))
    assert {t.yaxis for t in figure.data} == {"y"}
    with pytest.raises(ValueError, match="got \\['agreement'\\]"):
        plot_asr(table, metrics=("agreement",))
    with pytest.raises(ValueError, match="got \\['kl'\\]"):
        plot_asr(table, metrics=("kl",))


def test_judges_are_told_apart_where_there_are_several(table):
    figure = plot_asr(pd.concat([table, table.assign(judge="classifier", value=0.5)]), metrics=("asr",))
    assert [t.name for t in figure.data] == [
        "none, judge words",
        "care, judge words",
        "none, judge classifier",
        "care, judge classifier",
    ]


def test_tradeoff_puts_a_defence_at_the_mean_over_channels(table):
    figure = plot_tradeoff(table)
    none, care = figure.data
    assert (none.name, care.name) == ("none", "care")
    assert (none.x[0], none.y[0]) == pytest.approx((0.9, 0.8))
    assert none.customdata[0] == pytest.approx((0.9, 0.9, 0.6, 1.0))  # lowest and highest channel, told on hovering
    assert (care.x[0], care.y[0]) == pytest.approx((0.8, 0.05))
    with pytest.raises(ValueError, match="metric must be one of"):
        plot_tradeoff(table[table["metric"] == "asr"])


@pytest.fixture
def subspace():
    generator = torch.Generator().manual_seed(0)
    benign = torch.randn(60, 6, generator=generator)
    malicious = torch.randn(60, 6, generator=generator)
    malicious[:, 2] *= 4
    return SafetySubspace.fit(benign, malicious, rank=3, site="blocks.2.hook_mlp_out", modality="visual")


def test_spectrum_is_logarithmic_and_counts_directions_from_one(subspace):
    figure = plot_spectrum(subspace)
    assert len(figure.data) == 1
    assert list(figure.data[0].x) == [1, 2, 3]
    assert list(figure.data[0].y) == pytest.approx(subspace.eigenvalues.tolist())
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.title.text == "visual, blocks.2.hook_mlp_out"


def test_spectrum_shows_what_held_out_rows_give(subspace):
    choice = {"heldout_ratios": [9.0, 1.1], "threshold": 1.5}
    subspace.diagnostics["auto_rank"] = choice
    figure = plot_spectrum(subspace)
    assert list(figure.data[1].y) == [9.0, 1.1]
    assert list(figure.data[2].y) == [1.5, 1.5]


def test_a_saved_figure_is_a_page_and_its_data(tmp_path):
    figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4]))
    page, data = save_figure(figure, tmp_path / "new" / "curve")
    assert page == tmp_path / "new" / "curve.html"
    assert (page.parent / "plotly.min.js").exists()
    assert "cdn.plot" not in page.read_text(encoding="utf-8")
    assert json.loads(data.read_text(encoding="utf-8"))["data"][0]["y"] == [3, 4]
    with pytest.raises(ValueError, match="must end in"):
        save_figure(figure, tmp_path / "curve.docx")


def test_a_static_picture_that_cannot_be_made_leaves_the_page(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no browser")

    monkeypatch.setattr(go.Figure, "write_image", fail)
    with pytest.raises(ExportError, match="plots-export"):
        save_figure(go.Figure(), tmp_path / "curve.pdf")
    assert (tmp_path / "curve.html").exists()


def test_a_static_picture_has_the_figures_size_and_no_menus(tmp_path, monkeypatch):
    seen = {}
    record = lambda self, path, **size: seen.update(size, path=path, menus=self.layout.updatemenus)  # noqa: E731
    monkeypatch.setattr(go.Figure, "write_image", record)
    figure = go.Figure(layout={"height": 300, "updatemenus": [{"buttons": [{"label": "TE"}]}]})
    written = save_figure(figure, tmp_path / "curve.svg")
    assert not seen["menus"] and len(figure.layout.updatemenus) == 1
    assert (seen["width"], seen["height"], seen["scale"]) == (640, 300, 1)
    assert written[-1] == seen["path"] == tmp_path / "curve.svg"
