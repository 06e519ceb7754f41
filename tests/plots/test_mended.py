"""Faults that figures had: each is checked where it was."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from care_lens.plots import (
    plot_ablation,
    plot_effects,
    plot_frontier,
    plot_heads,
    plot_knockout,
    plot_localisation,
    plot_mediation,
    plot_patch_effects,
    plot_paths,
    plot_tradeoff,
    plot_writing,
)
from care_lens.plots.tradeoff import mean_interval

INTERVAL = ("value", "ci_low", "ci_high")


def cell(layer, position, value, *, low=None, high=None, component="hook_mlp_out", effect="NIE", n=10, **more):
    low, high = value - 0.1 if low is None else low, value + 0.1 if high is None else high
    place = {"tower": "language", "layer": layer, "component": component, "position": position, **more}
    return {**place, "effect": effect, "value": value, "ci_low": low, "ci_high": high, "n": n}


def frame(*cells):
    return pd.DataFrame(list(cells)).astype({"layer": "Int64"})


def test_single_tokens_are_columns_of_one_panel_not_panels_of_their_own():
    each = frame(*(cell(layer, str(at), layer + at / 100) for layer in range(8) for at in range(70)))
    figure = plot_effects(each)
    assert len(figure.data) == 1 and figure.layout.height < 700
    heat = figure.data[0]
    assert np.array(heat.z).shape == (8, 70) and heat.z[3][20] == pytest.approx(3.2)
    # Beside spans they do not add panels, and the figure says where they are.
    both = plot_effects(pd.concat([each, frame(cell(0, "last", 1.0), cell(1, "last", 2.0))]))
    assert len(both.data) == 1 and "560 rows of single tokens" in both.layout.xaxis.title.text


def test_heads_have_a_figure():
    rows = [cell(k, "all", k - h, component="attn.hook_z", head=h, neuron=None) for k in range(3) for h in range(4)]
    heads = frame(*rows).assign(mediator=[f"blocks.{r['layer']}.attn.hook_z[{r['head']}]" for r in rows])
    figure = plot_mediation(heads)
    np.testing.assert_array_equal(figure.data[0].z, [[k - h for h in range(4)] for k in range(3)])
    assert figure.layout.coloraxis.cmax == 3 == -figure.layout.coloraxis.cmin
    groups = heads.assign(head=None, neuron=None, mediator=[f"group {i}" for i in range(12)])
    assert plot_mediation(groups).data[0].y[0] in ("group 3", "group 8")  # 0 - 3, the largest in size
    whole = frame(cell(0, "all", 1.0)).assign(mediator="blocks.0.hook_mlp_out", head=None, neuron=None)
    assert list(plot_mediation(pd.concat([whole, heads])).data[0].y) == ["mlp_out"]
    with pytest.raises(ValueError, match=r"must hold attention heads.*sites=heads\(lvlm\)"):
        plot_heads(whole)


def table(values, groups=20, seed=0):
    """A frame and trials of two defences: value by (defence, channel, metric)."""
    rng, rows, trials = np.random.default_rng(seed), [], []
    for (defence, channel, metric), share in values.items():
        outcomes = (rng.permutation(groups) < share * groups).astype(float)
        rows.append({"defence": defence, "channel": channel, "metric": metric, "value": outcomes.mean(), "n": groups})
        trials += [
            {"defence": defence, "channel": channel, "metric": metric, "group": f"item {i}", "value": v}
            for i, v in enumerate(outcomes)
        ]
    made = pd.DataFrame(rows)
    return made.assign(ci_low=made["value"] - 0.1, ci_high=made["value"] + 0.1), pd.DataFrame(trials)


VALUES = {
    ("none", "plain", "asr"): 0.0,
    ("none", "a", "asr"): 1.0,
    ("none", "b", "asr"): 0.5,
    ("none", "ok", "accuracy"): 0.9,
    ("care", "plain", "asr"): 0.0,
    ("care", "a", "asr"): 0.2,
    ("care", "b", "asr"): 0.0,
    ("care", "ok", "accuracy"): 0.8,
}


def test_tradeoff_leaves_out_channels_that_are_0_for_everybody_and_has_intervals_of_the_mean():
    from care_lens.evaluation import DefenceTable

    rows, trials = table(VALUES)
    bare = plot_tradeoff(rows)
    none, care = bare.data
    assert (none.y[0], care.y[0]) == pytest.approx((0.75, 0.1))  # of a and b; b is 0 for care alone
    assert "mean of 2 channels" in bare.layout.yaxis.title.text
    assert none.error_y.array is None  # lowest and highest channel are no interval
    figure = plot_tradeoff(DefenceTable(rows, {}, trials))
    low, high = mean_interval(trials.query("defence == 'none' and metric == 'asr' and channel != 'plain'"))
    assert figure.data[0].error_y.array[0] == pytest.approx(high - 0.75)
    assert figure.data[0].error_y.arrayminus[0] == pytest.approx(0.75 - low)
    assert 0.0 < high - low < 0.5


def test_the_interval_of_a_mean_over_channels_is_the_bootstrap_of_scipy_where_channels_are_one():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).random(40)
    trials = pd.DataFrame({"channel": "a", "group": [f"i{k}" for k in range(40)], "value": values})
    ours = mean_interval(trials, n_boot=20000)
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.004)
    # Two channels with the same values of the same items say no more than one: items are drawn for both.
    twice = mean_interval(pd.concat([trials, trials.assign(channel="b")]), n_boot=20000)
    assert twice == pytest.approx(ours, abs=1e-9)
    assert mean_interval(trials.head(1)) is None
    for blank in ("", None, float("nan")):  # trials without a group are items of their own
        assert mean_interval(trials.assign(group=blank, id=trials["group"]), n_boot=20000) == pytest.approx(
            ours, abs=1e-9
        )


def test_writing_has_a_panel_for_each_unit():
    rows = [
        {"kind": "token", "of": of, "sign": "+", "rank": 1, "unit": "red", "value": value, "chance": 0.1}
        for of, value in (("direction 0", 0.2), ("benign mean", 9.0), ("direction 1", 0.3))
    ]
    figure = plot_writing(pd.DataFrame(rows))
    places = {trace.name: trace.xaxis for trace in figure.data}
    assert places == {"direction 0": "x", "direction 1": "x", "benign mean": "x2"}
    titles = [figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text]
    assert titles == ["change of the centred logit per unit length", "centred logit"]


def test_curves_of_a_knockout_differ_in_more_than_colour():
    rows = [
        {**cell(k, "text->last", k, effect=effect), "mode": mode, "layers": str(k)}
        for mode in ("zero", "renormalised")
        for effect in ("safe change", "unsafe change", "TE change")
        for k in range(3)
    ]
    looks = [(trace.line.dash, trace.marker.symbol) for trace in plot_knockout(pd.DataFrame(rows)).data]
    assert len(looks) == 6 == len(set(looks)) == len({dash for dash, _ in looks})


def test_cells_next_to_nothing_are_not_marked():
    patches = pd.DataFrame([{"row": 0, "col": c, "value": v, "n": 4} for c, v in enumerate((10.0, 0.4, -0.6, 1.0))])
    patches = patches.assign(ci_low=patches["value"] * 0.9, ci_high=patches["value"] * 1.1)
    patches.loc[2, ["ci_low", "ci_high"]] = (-0.7, -0.5)
    patches.loc[3, ["ci_low", "ci_high"]] = (-1.0, 3.0)
    marks = plot_patch_effects(patches, image=Image.new("RGB", (8, 8))).data[0].text
    assert [bool(mark) for mark in marks[0]] == [True, False, True, False]
    effects = frame(cell(0, "last", 10.0), cell(1, "last", 0.4), cell(2, "last", 0.6))
    assert [bool(mark) for mark in plot_effects(effects).data[0].text[0]] == [True, False, True]
    ways = pd.DataFrame([{**cell(0, "all", v), "sender": "a", "receiver": str(v)} for v in (10.0, 0.4, 0.6)])
    assert [bool(mark) for mark in plot_paths(ways).data[0].text[0]] == [True, False, True]


def test_panels_in_which_both_twins_have_the_same_are_left_out_and_named():
    same = [cell(k, "image", 0.0, low=0.0, high=0.0) for k in range(2)]
    moved = [cell(k, "text", 1.0 + k) for k in range(2)]
    total = [{**row, "effect": "TE", "value": 3.0} for row in (*same, *moved)]
    figure = plot_effects(frame(*same, *moved, *total))
    assert [note.text for note in figure.layout.annotations] == ["language tower, text tokens"]
    assert "the same in both twins: language tower, image tokens" in figure.layout.xaxis.title.text
    assert len(plot_effects(frame(*same)).data) == 1  # a frame of nothing else is drawn as it is
    # Where a span has an effect in one layer only, its panel stays whole.
    assert len(plot_effects(frame(same[0], cell(1, "image", 0.2), *moved)).data) == 2


def test_figures_say_of_how_many():
    assert "n = 10 pairs" in plot_effects(frame(cell(0, "last", 1.0))).layout.xaxis.title.text
    several = frame(cell(0, "last", 1.0, n=7), cell(1, "last", 1.0, n=10), cell(2, "last", np.nan, n=0))
    assert "n = 7 to 10 pairs" in plot_effects(several).layout.xaxis.title.text
    patches = pd.DataFrame([{"row": 0, "col": 0, "value": 1.0, "ci_low": 0.5, "ci_high": 2, "n": 4}])
    assert plot_patch_effects(patches).layout.xaxis.title.text == "n = 4 pairs"
    place = {"mediator": "blocks.0.hook_mlp_out", "position": "all", "score": 0.5, "ci_low": 0.4, "ci_high": 0.6}
    shares = {"sufficient": 0.5, "necessary": 0.5, "first": 1.0, "reason": "", "rank": 1, "n": 9}
    assert "n = 9 pairs" in plot_localisation(pd.DataFrame([{**place, **shares}])).layout.xaxis.title.text
    figures = {"asr": 0.1, "utility": 0.9, "over_refusal": 0.0}
    setting = {
        "candidate": "a",
        "role": "candidate",
        "on_frontier": True,
        "chosen": True,
        "ci_low": 0.0,
        "ci_high": 1.0,
    }
    rows = [{**setting, "metric": m, "value": v, "n": 8 if m == "asr" else 12} for m, v in figures.items()]
    layout = plot_frontier(pd.DataFrame(rows)).layout
    assert "n = 12" in layout.xaxis.title.text and "n = 8" in layout.yaxis.title.text


def test_from_the_ninth_curve_on_symbols_are_others():
    from care_lens.plots import theme

    looks = [(theme.marker(k)["color"], theme.marker(k)["symbol"]) for k in range(64)]
    assert len(set(looks)) == 64
    assert looks[:8] == list(zip(theme.COLOURS, theme.SYMBOLS, strict=True))


def test_kinds_of_units_without_an_effect_are_left_out_and_named():
    from care_lens.plots.attribution import plot_verified

    rows = [
        {"tower": tower, "component": component, "kind": kind, "effect": effect, "n": 8}
        | ({"value": np.nan, "ci_low": np.nan, "ci_high": np.nan} if nothing else {"value": 0.5, "ci_low": 0.1, "ci_high": 0.9})
        for tower, component, kind, nothing in (
            ("vision", "hook_attn_out", "site", True), ("projector", "hook_out", "site", True),
            ("language", "hook_attn_out", "site", False), ("language", "hook_resid_pre", "patch", True),
        )
        for effect in ("spearman", "miss rate")
    ]  # fmt: skip
    figure = plot_verified(pd.DataFrame(rows))
    assert {*figure.data[0].y} == {"language sites, attn_out"}
    title = figure.layout.xaxis.title.text
    assert "no effect to rank: vision tower; projector; language patches, resid_pre" in title and "n = 8 units" in title
    assert len(plot_verified(pd.DataFrame(rows[:2])).data[0].y) == 1  # a frame of nothing else is drawn as it is


def test_tokens_that_look_like_marks_of_a_page_are_written_as_they_are():
    from care_lens.plots import plot_positions, plot_writing
    from care_lens.plots.frames import token_label

    assert token_label("<s>") == "&lt;s&gt;"  # plotly would strike through what follows, and write nothing
    assert token_label("  ") == "'  '" and token_label(" a\n") == "a" and token_label("\x00b") == "\\x00b"
    assert token_label("m" * 40) == "m" * 15 + "\N{HORIZONTAL ELLIPSIS}"
    each = frame(*(cell(0, str(at), 1.0) for at in range(2)))
    labels = plot_positions(each, tokens=["</s>", "b"]).layout.xaxis.ticktext
    assert labels == ("&lt;/s&gt;", "b")
    written = {"kind": "token", "of": "direction 0", "sign": "+", "rank": 1, "unit": "<b>", "value": 1.0, "chance": 0.1}
    assert plot_writing(pd.DataFrame([written])).data[0].y[0] == "direction 0: &lt;b&gt;"


def test_frames_that_would_give_axes_alone_are_refused():
    columns = {"tower": "language", "layer": [0, 1], "component": "hook_mlp_out", "position": "last", "effect": "NIE",
               "ci_low": np.nan, "ci_high": np.nan, "n": 0}  # fmt: skip
    with pytest.raises(ValueError, match="2 rows whose values are all missing"):
        plot_effects(pd.DataFrame({**columns, "value": np.nan}))
    alone = {"tower": "language", "layer": [pd.NA], "component": "none", "mode": "mean", "metric": "complied", "effect": "share",
             "value": 0.5, "ci_low": 0.2, "ci_high": 0.8, "n": 9, "seed": 0}  # fmt: skip
    with pytest.raises(ValueError, match="ablated component, got the baseline alone"):
        plot_ablation(pd.DataFrame(alone))
