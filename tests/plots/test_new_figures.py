"""Figures of tokens, patches by layer, angles, spectra, before and after, and training show their numbers."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import subspace_angles

from care_lens.core import PatchGrid
from care_lens.mediation import Region
from care_lens.plots import (
    plot_angles_by_layer,
    plot_before_after,
    plot_patch_layers,
    plot_positions,
    plot_principal_angles,
    plot_recording,
    plot_regions,
    plot_spectra,
    plot_spectrum,
    plot_training,
    training_frame,
)
from care_lens.subspace import SafetySubspace


def rows(seed, *, loud=(), n=60, d=8):
    made = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for at in loud:
        made[:, at] *= 5
    return made


def fitted(*loud, rank=2, seed=0, **options):
    return SafetySubspace.fit(rows(seed), rows(seed + 1, loud=loud), rank=rank, **options)


def each(values, component="hook_mlp_out"):
    made = [
        {"layer": k, "component": component, "position": str(at), "value": float(v), "ci_low": v - 1, "ci_high": v + 1}
        for k, line in enumerate(values)
        for at, v in enumerate(line)
    ]
    return pd.DataFrame(made).assign(tower="language", effect="NIE", n=5)


def test_image_tokens_are_folded_into_the_largest_of_them():
    values = [[1, 2, -9, 3, 4], [5, 0.1, 0.2, 0.3, -6]]
    figure = plot_positions(each(values), tokens=["say", "<image>", "<image>", "<image>", " it "])
    heat = figure.data[0]
    np.testing.assert_allclose(heat.z, [[1, -9, 4], [5, 0.3, -6]])
    assert list(figure.layout.xaxis.ticktext) == ["say", "image (3 tokens)", "it"]
    assert heat.customdata[0][1][2] == 2 and heat.customdata[1][1][2] == 3  # which token it was
    assert figure.layout.coloraxis.cmax == 9
    plain = plot_positions(each(values))
    assert np.array(plain.data[0].z).shape == (2, 5)
    two = plot_positions(pd.concat([each(values), each(values, "hook_attn_out")]))
    assert [note.text for note in two.layout.annotations] == ["attn_out", "mlp_out"]
    for given_, message in (
        ({"tokens": ["a"]}, "tokens must be 5 or more"),
        ({"effect": "TE"}, "effect must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_positions(each(values), **given_)
    with pytest.raises(ValueError, match="single tokens, got spans alone"):
        plot_positions(each(values).assign(position="text"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(["<image>", "a", "b"]), min_size=1, max_size=12))
def test_folding_loses_no_token(tokens):
    from care_lens.plots.positions import _columns

    columns = _columns(range(len(tokens)), tokens, "<image>")
    assert [at for _, run in columns for at in run] == list(range(len(tokens)))
    assert all(len(run) == 1 or {tokens[at] for at in run} == {"<image>"} for _, run in columns)


def test_patches_of_all_layers_have_one_colour_scale():
    maps = {
        f"layer {k}": pd.DataFrame(
            [{"row": r, "col": c, "value": k * (r - c), "n": 3} for r in range(2) for c in range(3)]
        )
        for k in (1, 5)
    }
    figure = plot_patch_layers(maps, image=Image.new("RGB", (30, 20)))
    np.testing.assert_allclose(figure.data[1].z, [[0, -5, -10], [5, 0, -5]])
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-10, 10)
    assert (figure.data[0].dx, figure.data[0].dy) == (10, 10) and len(figure.layout.images) == 2
    assert {(image.xref, image.yref) for image in figure.layout.images} == {("x", "y"), ("x2", "y2")}
    assert [note.text for note in figure.layout.annotations] == ["layer 1", "layer 5"]
    with pytest.raises(ValueError, match="of one grid"):
        plot_patch_layers({**maps, "other": maps["layer 1"].query("col < 2")})
    with pytest.raises(ValueError, match="at least one"):
        plot_patch_layers({})


@pytest.mark.parametrize("which", ["smallest", "largest"])
def test_angles_are_those_of_scipy(which):
    spaces = {"a": fitted(0, 1), "b": fitted(1, 2, seed=5), "c": fitted(6, rank=1, seed=9)}
    figure = plot_principal_angles(spaces, which=which)
    pick = min if which == "smallest" else max
    for i, one in enumerate(spaces.values()):
        for j, other in enumerate(spaces.values()):
            expected = pick(subspace_angles(one.basis.double().numpy(), other.basis.double().numpy()))
            assert figure.data[0].z[i][j] == pytest.approx(math.degrees(expected), abs=0.05)
    curve = plot_angles_by_layer({"m": {3: (spaces["a"], spaces["b"]), 1: (spaces["b"], spaces["c"])}}, which=which)
    assert list(curve.data[1].x) == [1, 3]
    assert list(curve.data[1].y) == pytest.approx([figure.data[0].z[1][2], figure.data[0].z[0][1]])


def test_only_angles_below_chance_are_marked():
    wide = 200
    basis = torch.eye(wide, dtype=torch.float64)
    noise = rows(3, n=500, d=wide)

    def along(direction):
        return SafetySubspace.fit(noise, noise + 20 * rows(7, n=500, d=1) * direction, rank=1)

    near, far = along(basis[0] + 0.2 * basis[1]), along(basis[50])
    text = plot_principal_angles({"one": along(basis[0]), "near": near, "far": far}).data[0].text
    marked = [["\N{BLACK CIRCLE}" in cell for cell in line] for line in text]
    assert marked == [[False, True, False], [True, False, False], [False, False, False]]


def test_angles_refuse_spaces_of_other_widths():
    other = SafetySubspace.fit(rows(0, d=5), rows(1, d=5, loud=(0,)), rank=1)
    with pytest.raises(ValueError, match="of one width"):
        plot_principal_angles({"a": fitted(0), "b": other})
    with pytest.raises(ValueError, match="two or more, got 1"):
        plot_principal_angles({"a": fitted(0)})
    with pytest.raises(ValueError, match="at least one layer"):
        plot_angles_by_layer({"m": {}})


@pytest.mark.parametrize(
    ("rule", "null"), [("auto", "benign against benign"), ("energy", "noise floor"), ("permutation", "permuted labels")]
)
def test_every_rank_rule_shows_its_null(rule, null):
    subspace = fitted(0, 1, rank=rule)
    traces = {trace.name: trace for trace in plot_spectrum(subspace).data}
    line = traces[f"null: {null}"]
    assert line.line.dash == "dash" and list(traces["fit"].y) == pytest.approx(subspace.eigenvalues.tolist())
    if rule == "auto":
        told = subspace.diagnostics["auto_rank"]
        assert list(line.y) == [told["threshold"]] * 2 and list(traces["held out"].y) == pytest.approx(
            told["heldout_ratios"]
        )
    else:
        told = subspace.diagnostics["rank_rule"]
        assert list(line.y)[: len(told["thresholds"])] == pytest.approx(told["thresholds"])
        assert list(traces.get("looked at", traces["fit"]).y) == pytest.approx(
            told["eigenvalues"][: len(line.y)] if "looked at" not in traces else told["eigenvalues"]
        )


def test_spectra_of_rank_one_are_points_and_others_curves():
    ones = {"visual": fitted(0, rank=1), "textual": fitted(1, rank=1)}
    figure = plot_spectra(ones)
    assert list(figure.data[0].y) == ["visual", "textual"]
    assert list(figure.data[0].x) == pytest.approx([float(one.eigenvalues[0]) for one in ones.values()])
    figure = plot_spectra({**ones, "wide": fitted(0, 1, rank=3)})
    assert [len(trace.y) for trace in figure.data] == [1, 1, 3, 2]  # and the line of 1
    assert figure.layout.xaxis.dtick == 1
    with pytest.raises(ValueError, match="at least one"):
        plot_spectra({})


def test_before_and_after_are_the_coordinates_of_the_subspace():
    subspace = fitted(0, 1)
    before = {"benign": rows(20), "attack": rows(21, loud=(0, 1))}
    after = {
        "attack": subspace.apply(before["attack"].float()) if hasattr(subspace, "apply") else before["attack"] * 0.5
    }
    figure = plot_before_after(subspace, before, after)
    traces = {trace.name: trace for trace in figure.data}
    for name, given_ in (
        ("benign", before["benign"]),
        ("attack, before", before["attack"]),
        ("attack, after", after["attack"]),
    ):
        expected = subspace.coordinates(given_).double().numpy()
        np.testing.assert_allclose(np.stack([traces[name].x, traces[name].y], axis=1), expected, rtol=1e-5)
    moves = traces["attack, moves"]
    assert (
        moves.x[0] == traces["attack, before"].x[0]
        and moves.x[1] == traces["attack, after"].x[0]
        and np.isnan(moves.x[2])
    )
    assert traces["benign"].marker.color != traces["attack, before"].marker.color
    assert traces["attack, after"].marker.symbol == f"{traces['attack, before'].marker.symbol}-open"
    assert "benign 60, attack 60" in figure.layout.xaxis.title.text
    flat = plot_before_after(fitted(0, rank=1), before)
    assert list(flat.layout.yaxis.ticktext) == ["benign", "attack"]
    assert len(plot_before_after(subspace, before, most=10).data[0].x) == 10
    with pytest.raises(ValueError, match="row by row"):
        plot_before_after(subspace, before, {"attack": rows(1, n=3)})
    with pytest.raises(ValueError, match="rows of one group"):
        plot_before_after(subspace, {})


LOG = """
2026-11-26 04:52:48,028 tower 50/100 20s loss 22.395 letters 0.01 progress 0.00
2026-11-26 04:53:07,163 tower 100/100 39s loss 2.5 letters 0.80 progress 1.00
2026-11-26 05:00:00,000 language 100/200 12s loss 1.5000
2026-11-26 05:01:00,071 exact match {'all': '0.13', 'make/named': '0.20'}
2026-11-26 05:02:00,000 language 200/200 24s loss 0.5
2026-11-26 05:03:00,000 language 100/120 12s loss 0.9
a line of something else
"""


def test_training_curves_are_those_of_the_log(tmp_path):
    path = tmp_path / "log"
    path.write_text(LOG)
    frame = training_frame(path)
    assert frame.equals(training_frame(LOG))
    told = {(row.stage, row.step, row.metric): row.value for row in frame.itertuples()}
    assert told["tower 1", 100, "loss"] == 2.5 and told["tower 1", 50, "letters"] == 0.01
    assert told["language 1", 100, "exact"] == 0.13 and told["language 2", 100, "loss"] == 0.9
    figure = plot_training(frame)
    losses = {trace.name: list(trace.y) for trace in figure.data}
    assert losses["loss, language 1"] == [1.5, 0.5] and losses["exact answers, language 1"] == [0.13]
    assert {trace.yaxis for trace in figure.data} == {"y", "y2"}
    with pytest.raises(ValueError, match="lines of python -m"):
        training_frame("nothing")


def test_a_recording_names_its_tokens_and_lies_on_its_picture():
    spans = ["text", "image", "image", "image", "image", "text", "generated"]
    row = {
        "site": "blocks.1.hook_resid_post",
        "gate_visual": 1.0,
        "gate_textual": 0.0,
        "weight_visual": 0.7,
        "weight_textual": 0.3,
    }
    frame = pd.DataFrame(
        [{"position": at, "span": span, "edit_norm": float(at), **row} for at, span in enumerate(spans)]
    )
    grid = PatchGrid(start=1, rows=2, cols=2, width=20, height=10)
    tokens = ["user", *["<image>"] * 4, "say", "sorry"]
    figure = plot_recording(frame, grids=[(grid, 1)], tokens=tokens, image=Image.new("RGB", (20, 10)))
    heat = figure.data[-1]
    np.testing.assert_allclose(heat.z, [[1, 2], [3, 4]])
    assert (heat.dx, heat.dy, heat.x0, heat.y0) == (10, 5, 5, 2.5)
    assert figure.layout.images[0].xref == heat.xaxis
    assert list(figure.layout.xaxis3.ticktext) == ["user", "say", "sorry", "image (4)"]
    with pytest.raises(ValueError, match="tokens must be 7 or more"):
        plot_recording(frame, tokens=tokens[:3])


def test_the_effect_of_a_region_of_one_pair_is_told_without_an_interval():
    word = Region.box(0, 0, 8, 8, name="word")
    told = {"mediator": "blocks.0.hook_resid_pre", "position": "word", "effect": "NIE", "value": 1.25}
    image = Image.new("RGB", (16, 16))
    for low, high, n, text in (
        (np.nan, np.nan, 1, "word: NIE 1.2, n = 1"),
        (0.5, 2.0, 4, "word: NIE 1.2 [0.5, 2], n = 4"),
    ):
        frame = pd.DataFrame([{**told, "ci_low": low, "ci_high": high, "n": n}])
        figure = plot_regions(frame, [word], image, site="blocks.0.hook_resid_pre")
        assert text in [trace.name for trace in figure.data]
