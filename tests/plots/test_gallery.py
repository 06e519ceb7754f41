"""Every figure as a real browser draws it: nothing clipped, covered or too small, at both widths of a paper, light and dark."""

import math
import re

import pandas as pd
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


def test_figures_of_the_gallery_say_of_how_many(figures):
    silent = {name for name, figure in figures.items() if not re.search(r"\bn( = \d|: \w)", figure.to_json())}
    # Geometry of subspaces and texts, one row or a region of a picture, and a log of training: they have no n.
    assert silent <= {
        "angles",
        "angles_by_layer",
        "writing",
        "trace",
        "recording",
        "region",
        "training",
        "spectra",
        "reading",
        "uncertainty",  # its n are resamples
    }, silent


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


def _defences(channels: list[str], names: list[str]) -> pd.DataFrame:
    rows = [
        {"defence": name, "channel": f"{channel}{', benign' * (metric == 'accuracy')}", "metric": metric, "n": 20}
        | {"value": (at + 1) / 20, "ci_low": at / 20, "ci_high": (at + 3) / 20}
        for metric in ("asr", "accuracy")
        for at, name in enumerate(names)
        for channel in channels
    ]
    return pd.DataFrame(rows)


def _effects(layers: int, positions: list[str], components: tuple[str, ...] = ("hook_resid_pre",)) -> pd.DataFrame:
    rows = [
        {"tower": "language", "layer": layer, "component": component, "position": position, "effect": "NIE", "n": 10}
        | {"value": (value := math.sin(layer + 3 * at)), "ci_low": value - 0.1, "ci_high": value + 0.1}
        for layer in range(layers)
        for component in components
        for at, position in enumerate(positions)
    ]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def test_awkward_data_is_neither_clipped_covered_nor_too_small(gallery):
    long = "typographic+indirect+second turn, wrapped in a story"
    tokens = ["<s>", "USER", ":", *["<image>"] * 576, *(f"word{k}" for k in range(100)), "w" * 60, "</s>"]
    sites = {f"{k}.{m}": gallery.subspace(f"angles/{k}.{m}") for k in range(8) for m in ("visual", "textual")}
    longest = {f"a model with a long name, layer {name} tokens of the attack": one for name, one in sites.items()}
    row = gallery.frame("recording").iloc[0].to_dict()
    spans = ["text"] * 3 + ["image"] * 576 + ["text"] * 102
    recorded = pd.DataFrame([{**row, "position": at, "span": span} for at, span in enumerate(spans)])
    heads = _effects(60, ["all"]).loc[lambda f: f.index.repeat(32)].assign(head=[*range(32)] * 60, neuron=None)
    made = {
        "30 channels": plots.plot_asr(_defences([f"channel {k}" for k in range(30)], list("abcdef"))),
        "1 channel": plots.plot_asr_column(_defences(["one"], ["none"])),
        "long names": plots.plot_asr(_defences([f"{long} {k}" for k in range(4)], [f"{long} {k}" for k in "abc"])),
        "long names, column": plots.plot_asr_column(_defences([f"{long} {k}" for k in range(4)], ["a", "b"])),
        "60 layers": plots.plot_effects(_effects(60, ["text", "last", "image"], ("hook_attn_out", "hook_mlp_out"))),
        "60 layers of 32 heads": plots.plot_heads(heads),
        "681 tokens": plots.plot_positions(_effects(4, [str(k) for k in range(len(tokens))]), tokens=tokens),
        "12 subspaces": plots.plot_principal_angles(dict(list(sites.items())[:12])),
        "4 long names of subspaces": plots.plot_principal_angles(dict(list(longest.items())[:4])),
        "16 spectra of long names": plots.plot_spectra(longest),
        "576 patches recorded": plots.plot_recording(recorded, tokens=tokens),
        "long titles": plots.plot_patch_layers({f"residual stream before block {k}": gallery.frame("patches.0") for k in (1, 2, 3)}),
    }  # fmt: skip
    with browsing() as browser:
        for columns in (1, 2):
            assert layout_faults(browser, {n: paper(f, columns=columns) for n, f in made.items()}) == {}, columns
