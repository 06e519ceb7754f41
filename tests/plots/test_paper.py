"""The style of a paper: size, text, short names, dark pages, and files that are written or told why not."""

import base64
import importlib.util
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from in_browser import chromium
from plotly.subplots import make_subplots

from care_lens.plots import ExportError, paper, plot_effects, save_figure, short_site, theme
from care_lens.plots.theme import COLOURS, DARK, INK, LESS_SAFE, SAFER, in_dark


def fonts(part, key=""):
    """Every size of text that a layout or trace states."""
    if isinstance(part, dict):
        found = [part["size"]] if key.endswith("font") and "size" in part else []
        return found + [size for name, value in part.items() for size in fonts(value, name)]
    return [size for value in part for size in fonts(value, key)] if isinstance(part, (list, tuple)) else []


@pytest.fixture
def curve():
    names = ["blocks.3.hook_mlp_out", "vision.blocks.1.hook_attn_out"]
    figure = go.Figure([go.Scatter(x=[0, 1], y=[1, 2], name=name, line={"color": COLOURS[0]}) for name in names])
    menu = [{"buttons": [{"label": "TE"}]}]
    return figure.update_layout(template=theme.TEMPLATE, height=500, title="blocks.3.hook_mlp_out", updatemenus=menu)


@pytest.mark.parametrize(("columns", "inches"), [(1, 3.3), (2, 7.0)])
def test_a_figure_is_one_or_two_columns_wide_and_its_text_is_seven_points_or_more(curve, columns, inches):
    made = paper(curve, columns=columns)
    assert made.layout.width / 96 == pytest.approx(inches, abs=0.01)
    sizes = fonts({**made.to_plotly_json()["layout"], "template": {}}) + fonts(list(made.to_plotly_json()["data"]))
    assert sizes and min(sizes) * 72 / 96 >= 7
    assert [trace.name for trace in made.data] == ["L3 MLP", "V1 attn"] and made.layout.title.text == "L3 MLP"
    assert not made.layout.updatemenus and made.layout.height <= 9 * 96
    # The original is as it was.
    assert curve.layout.height == 500 and len(curve.layout.updatemenus) == 1 and curve.data[0].name.startswith("blocks")


def test_names_height_and_numbers_are_kept(curve):
    made = paper(curve, names={"blocks.3.hook_mlp_out": "where it is"}, height=2.5)
    assert made.data[0].name == "where it is" and made.layout.height == 240
    assert list(made.data[0].y) == [1, 2]
    assert paper(curve, height=12).layout.height == 12 * 96
    for options, message in (({"height": 0.1}, "half an inch"),):
        with pytest.raises(ValueError, match=message):
            paper(curve, **options)


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("blocks.12.hook_resid_post", "L12 resid"),
        ("blocks.5.attn.hook_z[3]", "L5 head[3]"),
        ("vision.blocks.0.mlp.hook_post[7]", "V0 neuron[7]"),
        ("blocks.3-5.hook_mlp_out", "L3-5 MLP"),
        ("projector.hook_out", "projector"),
        ("carried by blocks.0.hook_attn_out, blocks.6.hook_mlp_out.", "carried by L0 attn, L6 MLP."),
        ("benign plain", "benign plain"),
    ],
)
def test_sites_have_short_names(long, short):
    assert short_site(long) == short and short_site(short) == short


@given(st.text(alphabet="ab +/", min_size=1, max_size=120))
def test_breaking_a_label_keeps_its_words(text):
    from care_lens.plots.paper import _broken

    broken = _broken(text, 22)
    assert re.sub(r"\s", "", broken.replace("<br>", "")) == re.sub(r"\s", "", text)


def test_a_dark_figure_has_no_colour_of_the_light_page():
    light = go.Figure(go.Heatmap(z=[[-1, 1]], colorscale=theme.DIVERGING))
    light.add_scatter(x=[0, 1], y=[0, 1], line={"color": INK}, marker={"color": COLOURS[2]})
    made = paper(light, dark=True).to_plotly_json()
    text = json.dumps({"data": made["data"], "layout": {**made["layout"], "template": ""}}, default=list).lower()
    assert not [colour for colour in DARK if colour.startswith(("#", "rgb")) and f'"{colour}"' in text]
    template = json.dumps(paper(light, dark=True).layout.template.to_plotly_json(), default=list)
    assert "#14181F" in template and "#FFFFFF" not in template

    def bright(colour):
        return sum(int(colour[i : i + 2], 16) * w for i, w in ((1, 0.3), (3, 0.59), (5, 0.11)))

    assert all(bright(in_dark(colour)) > bright("#14181F") + 90 for colour in (INK, *COLOURS))


def test_less_safe_has_one_colour_in_series_and_scales():
    """Both are blue where it is less safe, and red or orange where it is safer."""

    def blue_over_red(colour):
        parts = (
            [int(part) for part in re.findall(r"\d+", colour)]
            if "rgb" in colour
            else [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        )
        return parts[2] > parts[0]

    scale = go.Figure(go.Heatmap(z=[[0, 1]], colorscale=theme.DIVERGING)).data[0].colorscale
    assert blue_over_red(scale[-1][1]) and blue_over_red(LESS_SAFE)
    assert not blue_over_red(scale[0][1]) and not blue_over_red(SAFER)
    assert blue_over_red(in_dark(scale[-1][1])) and not blue_over_red(in_dark(scale[0][1]))


def test_formats_are_written_in_the_papers_size(curve, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        go.Figure, "write_image", lambda self, path, **size: seen.update({path.suffix: (size["width"], size["scale"])})
    )
    written = save_figure(curve, tmp_path / "curve.pdf", columns=1, formats=("png", ".svg"))
    assert [path.suffix for path in written] == [".html", ".json", ".pdf", ".png", ".svg"]
    assert seen == {".pdf": (317, 1), ".png": (317, 4), ".svg": (317, 1)}
    for options, message in (
        ({"formats": ("docx",)}, r"formats must be among pdf, svg and png, got \['.docx'\]"),
        ({"dark": True}, "dark must come with columns"),
    ):
        with pytest.raises(ValueError, match=message):
            save_figure(curve, tmp_path / "none.pdf", **options)
    assert not (tmp_path / "none.html").exists()


def test_without_kaleido_the_error_says_what_to_install(curve, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ImportError("no kaleido")

    monkeypatch.setattr(go.Figure, "write_image", fail)
    monkeypatch.setattr("care_lens.plots.saving.find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match=r"curve.svg could not be written .*pip install 'care-lens\[plots-export\]'.*curve.html"
    ):
        save_figure(curve, tmp_path / "curve.svg", columns=2)
    assert (tmp_path / "curve.html").exists() and not (tmp_path / "curve.svg").exists()


def test_without_a_browser_the_error_says_so(curve, tmp_path, monkeypatch):
    pytest.importorskip("kaleido")
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ExportError, match=r"Chrome or Chromium.*BROWSER_PATH"):
        save_figure(curve, tmp_path / "curve.png", columns=1)


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="kaleido is not installed (extra plots-export)")
def test_a_real_pdf_is_as_wide_as_the_column(curve, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", chromium())
    path = save_figure(curve, tmp_path / "curve.pdf", columns=1)[-1]
    box = re.search(rb"/MediaBox \[([\d. ]+)\]", path.read_bytes())
    assert box is not None
    left, _, right, _ = map(float, box[1].split())
    assert (right - left) / 72 == pytest.approx(3.3, abs=0.05)


def test_effects_in_a_column_keep_their_cells():
    import pandas as pd

    cell = {"tower": "language", "layer": 3, "component": "hook_mlp_out", "position": "last", "effect": "NIE"}
    frame = pd.DataFrame([{**cell, "value": 1.0, "ci_low": 0.5, "ci_high": 2.0, "n": 7}])
    made = paper(plot_effects(frame))
    z = json.loads(made.to_json())["data"][0]["z"]
    if isinstance(z, dict):
        z = np.frombuffer(base64.b64decode(z["bdata"]), z["dtype"]).reshape([int(n) for n in z["shape"].split(",")])
    assert z[0][3] == 1.0 and list(made.data[0].y) == ["MLP"]
    assert made.layout.xaxis.title.text == "layer (n = 7 pairs)"


def test_words_in_cells_are_cut_to_what_a_cell_holds():
    dot = "\N{BLACK CIRCLE}"
    words = np.array([["fula", "picture"], ["mmmmmm", dot]])

    def cells(cols):
        wide = np.tile(words, (1, cols // 2))
        heat = go.Heatmap(z=np.zeros(wide.shape), text=wide, texttemplate="%{text}", colorbar={"thickness": 10})
        return [list(row)[:2] for row in paper(go.Figure(heat)).data[0].text]

    assert cells(2) == words.tolist()
    assert cells(10) == [["fula", "pic\N{HORIZONTAL ELLIPSIS}"], ["", dot]]
    assert cells(20) == [["", ""], ["", dot]]

    def numbers(cols):
        heat = go.Heatmap(z=np.zeros((1, cols)), text=np.full((1, cols), f"0.123 {dot}"), texttemplate="%{text}")
        return set(np.ravel(paper(go.Figure(heat)).data[0].text))

    assert numbers(4) == {f"0.123 {dot}"}
    assert numbers(40) == {dot}  # a cell of 6 pixels holds a dot, but no number of 7 points


def test_flat_figures_of_pictures_are_as_wide_as_two_columns():
    def height(wide, high, columns):
        figure = go.Figure(go.Heatmap(z=[[1]])).update_yaxes(scaleanchor="x").update_layout(width=wide, height=high)
        return paper(figure, columns=columns).layout.height

    assert height(1200, 300, 2) - height(1200, 300, 1) == pytest.approx((672 - 317) / 4, abs=2)
    assert height(500, 500, 2) == pytest.approx(height(500, 500, 1), abs=2)


@pytest.mark.parametrize("label", ["a", "a label that takes some room"])
def test_panels_are_as_far_apart_as_what_stands_between_them(label):
    figure = make_subplots(rows=2, cols=1, subplot_titles=["above", "below"], vertical_spacing=0.02)
    for row in (1, 2):
        figure.add_trace(go.Heatmap(z=[[1, 2]], x=[0, 1], y=["one"], showscale=False), row=row, col=1)
        figure.update_xaxes(tickvals=[0, 1], ticktext=[label, label], tickangle=-90, row=row, col=1)
    printed = paper(figure, columns=1)
    (low, _), (_, high) = printed.layout.yaxis.domain, printed.layout.yaxis2.domain
    margin, labels = printed.layout.margin, len(label) * 10 * 0.5  # upright ones, of 10 pixels, below both panels
    gap = (low - high) * (printed.layout.height - margin.t - margin.b - labels)
    assert labels + 10 < gap < labels + 50  # and the title of the lower panel
    titles = {note.text: note.y for note in printed.layout.annotations}
    assert titles["above"] == pytest.approx(1) and titles["below"] == pytest.approx(high)
