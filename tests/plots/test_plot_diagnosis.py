"""Figures of the diagnosis show the numbers of their frames."""

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from PIL import Image

from care_lens.core import PatchGrid
from care_lens.plots import plot_ablation, plot_effects, plot_patch_effects, plot_separability


def effect_row(tower, layer, component, position, effect, value, low, high):
    cell = {"tower": tower, "layer": layer, "component": component, "position": position}
    return {**cell, "effect": effect, "value": value, "ci_low": low, "ci_high": high, "n": 5}


@pytest.fixture
def effects():
    rows = [
        effect_row("language", 0, "hook_mlp_out", "last", "NIE", -2.0, -3.0, -1.0),
        effect_row("language", 2, "hook_attn_out", "last", "NIE", 0.5, -0.5, 1.5),
        effect_row("language", 1, "hook_mlp_out", "text", "NIE", 1.0, 0.5, 1.5),
        effect_row("projector", None, "hook_out", "all", "NIE", 0.25, 0.1, 0.4),
        effect_row("vision", 1, "hook_resid_pre", "all", "NIE", 4.0, 3.0, 5.0),
        effect_row("language", 0, "hook_mlp_out", "last", "TE", 8.0, 7.0, 9.0),
    ]
    frame = pd.DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def test_effects_stand_in_their_panel_layer_and_component(effects):
    figure = plot_effects(effects)
    maps = {(t.name, t.xaxis): t for t in figure.data}
    titles = [a.text for a in figure.layout.annotations]
    assert titles == [
        "vision tower",
        "projector",
        "language tower, last token",
        "language tower, text tokens",
    ]
    last = maps["NIE", "x3"]
    assert list(last.y) == ["attn_out", "mlp_out"]
    expected = np.full((2, 3), np.nan)
    expected[1, 0], expected[0, 2] = -2.0, 0.5
    np.testing.assert_array_equal(np.array(last.z, dtype=float), expected)
    assert np.array(maps["NIE", "x"].z, dtype=float)[0, 1] == 4.0
    assert np.array(maps["NIE", "x2"].z, dtype=float).tolist() == [[0.25]]
    np.testing.assert_array_equal(last.customdata[1][0], [-3.0, -1.0, 5.0])


def test_a_dot_marks_the_cells_whose_interval_excludes_zero(effects):
    last = next(t for t in plot_effects(effects).data if t.name == "NIE" and t.xaxis == "x3")
    assert [[bool(mark) for mark in row] for row in last.text] == [
        [False, False, False],
        [True, False, False],
    ]


def test_effects_have_a_diverging_scale_that_is_symmetric_around_zero(effects):
    scale = plot_effects(effects).layout.coloraxis
    assert (scale.cmin, scale.cmid, scale.cmax) == (-4.0, 0, 4.0)
    # The first colour of RdBu is red: what is negative, and so safer, is red.
    red, _, blue = (int(c) for c in scale.colorscale[0][1].removeprefix("rgb(").removesuffix(")").split(","))
    assert red > blue


def test_the_menu_shows_one_effect_at_its_own_scale(effects):
    figure = plot_effects(effects, effect="TE")
    assert {t.name for t in figure.data if t.visible} == {"TE"}
    nie, te = figure.layout.updatemenus[0].buttons
    assert [t.name for t, shown in zip(figure.data, nie.args[0]["visible"], strict=True) if shown] == ["NIE"] * 4
    assert te.args[1]["coloraxis"]["cmax"] == 8.0


def test_an_effect_without_any_value_is_drawn_empty(effects):
    unclear = effects[effects["effect"] == "TE"].assign(effect="proportion", value=np.nan, ci_low=np.nan)
    figure = plot_effects(pd.concat([effects, unclear]), effect="proportion")
    assert figure.layout.coloraxis.cmax == 1.0


def test_effects_refuse_what_they_cannot_draw(effects):
    with pytest.raises(ValueError, match="effect must be one of"):
        plot_effects(effects, effect="nothing")
    with pytest.raises(ValueError, match="none called"):
        plot_effects(effects.drop(columns="ci_low"))
    with pytest.raises(ValueError, match="at least one row"):
        plot_effects(effects.iloc[:0])


@pytest.fixture
def ablation():
    rows = []
    for component, layer, value in [
        ("none", None, 0.9),
        ("hook_mlp_out", 1, 0.2),
        ("hook_mlp_out", 0, 0.4),
        ("hook_attn_out", 0, 0.8),
    ]:
        for metric, share in (("complied", value), ("refused", 1 - value)):
            where = {"tower": "language", "layer": layer, "component": component, "effect": "share"}
            rows.append(
                {
                    **where,
                    "metric": metric,
                    "value": share,
                    "ci_low": share - 0.1,
                    "ci_high": share + 0.05,
                    "n": 20,
                }
            )
    rows.append({**rows[2], "effect": "difference", "metric": "complied change", "value": -0.7})
    frame = pd.DataFrame(rows)
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def test_ablation_draws_a_curve_and_a_band_for_each_component_and_the_baseline(ablation):
    figure = plot_ablation(ablation)
    traces = {t.name: t for t in figure.data}
    assert set(traces) == {"attn_out", "attn_out interval", "mlp_out", "mlp_out interval", "no ablation"}
    assert list(traces["mlp_out"].x) == [0, 1]
    assert list(traces["mlp_out"].y) == [0.4, 0.2]
    band = traces["mlp_out interval"]
    assert list(band.x) == [0, 1, 1, 0]
    assert list(band.y) == pytest.approx([0.45, 0.25, 0.1, 0.3])
    baseline = traces["no ablation"]
    assert (list(baseline.y), baseline.line.dash) == ([0.9, 0.9], "dash")


def test_ablation_can_show_another_share(ablation):
    figure = plot_ablation(ablation, metric="refused")
    assert list({t.name: t for t in figure.data}["mlp_out"].y) == pytest.approx([0.6, 0.8])
    with pytest.raises(ValueError, match="metric must be one of"):
        plot_ablation(ablation, metric="complied change")


@pytest.fixture
def patches():
    rows = [{"row": r, "col": c, "value": float(3 * r + c) - 4, "effect": "NIE"} for r in range(2) for c in range(3)]
    frame = pd.DataFrame(rows)
    return frame.assign(ci_low=frame["value"] - 1.5, ci_high=frame["value"] + 1.5, n=4)


def test_patches_lie_on_the_part_of_the_picture_that_they_cover(patches):
    grid = PatchGrid(start=0, rows=2, cols=3, width=30, height=20, left=5, top=2)
    figure = plot_patch_effects(patches.sample(frac=1, random_state=0), image=Image.new("RGB", (40, 24)), grid=grid)
    heat = figure.data[0]
    np.testing.assert_array_equal(heat.z, [[-4, -3, -2], [-1, 0, 1]])
    assert (heat.x0, heat.dx, heat.y0, heat.dy) == (10.0, 10.0, 7.0, 10.0)
    assert (heat.zmin, heat.zmax) == (-4.0, 4.0)
    assert [[bool(mark) for mark in row] for row in heat.text] == [[True, True, True], [False, False, False]]
    picture = figure.layout.images[0]
    assert (picture.x, picture.y, picture.sizex, picture.sizey) == (0, 0, 40, 24)
    assert figure.layout.yaxis.autorange == "reversed"


def test_patches_cover_the_whole_picture_unless_told_otherwise(patches):
    heat = plot_patch_effects(patches, image=Image.new("RGB", (60, 40))).data[0]
    assert (heat.x0, heat.dx, heat.y0, heat.dy) == (10.0, 20.0, 10.0, 20.0)
    assert not plot_patch_effects(patches).layout.images


def test_patches_without_intervals_are_not_marked(patches):
    figure = plot_patch_effects(patches[["row", "col", "value"]])
    assert not any(mark for row in figure.data[0].text for mark in row)


def test_patches_refuse_a_grid_of_another_shape_and_several_pairs(patches):
    with pytest.raises(ValueError, match="2 x 3 patches"):
        plot_patch_effects(patches, grid=PatchGrid(start=0, rows=3, cols=2, width=6, height=6))
    with pytest.raises(ValueError, match="each patch must occur once"):
        plot_patch_effects(pd.concat([patches, patches]))


def test_separability_has_a_panel_a_measure_and_a_curve_a_site():
    rows = [
        {
            "layer": layer,
            "component": component,
            "metric": metric,
            "value": value,
            "ci_low": low,
            "ci_high": high,
        }
        for layer, component, metric, value, low, high in [
            (1, "hook_mlp_out", "probe_auc", 0.9, 0.8, 0.95),
            (0, "hook_mlp_out", "probe_auc", 0.7, 0.6, 0.75),
            (0, "hook_mlp_out", "fisher", 2.0, np.nan, np.nan),
            (0, "hook_attn_out", "probe_auc", 0.6, 0.5, 0.7),
        ]
    ]
    figure = plot_separability(pd.DataFrame(rows).assign(tower="language", position="last", n=8))
    assert [axis.title.text for axis in figure.select_yaxes()] == ["probe AUC", "between / within scatter"]
    by_place = {(t.yaxis, t.name): t for t in figure.data}
    curve = by_place["y", "language mlp_out, last"]
    assert (list(curve.x), list(curve.y)) == ([0, 1], [0.7, 0.9])
    assert list(curve.error_y.array) == pytest.approx([0.05, 0.05])
    assert list(curve.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert by_place["y2", "language mlp_out, last"].error_y.array is None


def test_importing_the_figures_leaves_plotly_as_it_was():
    assert pio.templates.default == "plotly"
