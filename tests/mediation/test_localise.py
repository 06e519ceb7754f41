"""Localisation: shares from hand-made outcomes, a place that carries all of an effect, and what is said when there is none."""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from care_lens.core import Example, PairedExamples, Site, UnsafeMargin
from care_lens.mediation import (
    MediationResult,
    Mediator,
    NothingToLocaliseError,
    localise,
    mediate,
    rank_places,
    refine,
)
from care_lens.mediation.localise import _reason, _resampled, _score
from care_lens.mediation.mediate import PAIR_COLUMNS
from care_lens.plots import plot_localisation


@pytest.fixture(scope="module")
def rising(model, pictured, margin):
    return _rising(model, margin, pictured)


def test_the_score_is_the_mean_of_two_shares():
    mean = np.array([[4.0, 4.0, 4.0], [4.0, 2.0, 0.0], [4.0, -1.0, 6.0], [4.0, 0.0, 0.0]])
    np.testing.assert_allclose(_score(mean), [1.0, 0.25, 0.5, 0.0])


def test_resamples_keep_groups_whole():
    shares = np.stack([np.full((4, 3), [2.0, 1.0, 1.0]), np.full((4, 3), [2.0, 0.0, 2.0])], axis=1)
    np.testing.assert_allclose(_resampled(shares, list("aabb"), n_boot=7, seed=0), 0.5)
    shares[:2, 0, 1:] = 2.0
    found = _resampled(shares, list("aabb"), n_boot=200, seed=0)[:, 0]
    assert set(np.round(found, 6)) == {0.5, 0.75, 1.0}


def test_shares_are_those_of_the_mediation_effects(model, rising, margin):
    found = localise(model, rising, outcome=margin, n_boot=50, progress=False)
    frame = found.frame
    assert frame["rank"].tolist() == list(range(1, len(frame) + 1)) and frame["score"].is_monotonic_decreasing
    assert {site.component for site in model.sites() if str(site) in set(frame["mediator"])} == {
        "hook_attn_out",
        "hook_mlp_out",
    }
    place = found.top()[0]
    effects = mediate(model, rising, outcome=margin, sites=[place], positions=("all",), n_boot=10, progress=False)
    by_name = effects.frame.set_index("effect")["value"]
    assert frame.iloc[0]["sufficient"] == pytest.approx(by_name["NIE"] / by_name["TE"], rel=1e-5)
    assert frame.iloc[0]["necessary"] == pytest.approx(by_name["TIE"] / by_name["TE"], rel=1e-5)
    assert frame["first"].sum() == pytest.approx(1.0)
    assert set(frame["position"]) == {"all"} and set(frame["acts_through"]) <= {"", "image", "text", "last"}
    assert (frame.loc[frame["tower"] == "vision", "acts_through"] == "").all()


def test_a_localisation_goes_on_from_its_checkpoint(model, rising, margin, tmp_path):
    def saved(path):
        options = {"sites": ["blocks.1.hook_mlp_out"], "n_spans": 1, "n_boot": 5, "progress": False}
        folder = tmp_path / "found"
        localise(model, rising, outcome=margin, checkpoint=path, **options).save(folder, "found")
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    path, expected = tmp_path / "a.jsonl", saved(None)
    assert saved(path) == expected
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:9])
    assert saved(path) == expected
    assert path.read_bytes() == whole


def test_what_everything_passes_through_is_sufficient_and_necessary_and_comes_first(model, rising, margin):
    everything = Mediator.of("blocks.0.hook_resid_pre")
    sites = [everything, "blocks.1.hook_mlp_out", "vision.blocks.1.hook_mlp_out"]
    found = localise(model, rising, outcome=margin, sites=sites, n_boot=20, n_spans=0, progress=False)
    first = found.frame.iloc[0]
    assert first["mediator"] == everything.name and first["score"] == pytest.approx(1.0, abs=1e-4)
    assert first["reason"].startswith("sufficient and necessary: brings 100% of the effect")


def test_heads_add_up_to_names(model, rising, margin):
    found = refine(model, rising, "blocks.1.hook_attn_out", outcome=margin, n_boot=10, progress=False)
    assert sorted(found.frame["head"].astype(int)) == [0, 1, 2, 3]
    neurons = refine(model, rising, "blocks.1.hook_mlp_out", outcome=margin, n_boot=10, progress=False)
    assert len(neurons.frame) == 48 and neurons.frame["neuron"].notna().all()
    with pytest.warns(FutureWarning, match="spans of refine is called n_spans now"):
        again = refine(model, rising, "blocks.1.hook_attn_out", outcome=margin, n_boot=10, progress=False, spans=0)
    assert again.frame.equals(found.frame)
    with pytest.raises(ValueError, match="attention or MLP output"):
        refine(model, rising, "blocks.1.hook_resid_pre", outcome=margin)


def test_twins_that_are_no_less_safe_are_refused_after_one_place(model, rising, margin, monkeypatch):
    module, asked = sys.modules["care_lens.mediation.localise"], []

    def counted(*args, **options):
        asked.append(len(options["sites"]))
        return mediate(*args, **options)

    monkeypatch.setattr(module, "mediate", counted)
    turned = UnsafeMargin(comply=margin.refuse, refuse=margin.comply)
    with pytest.raises(
        NothingToLocaliseError, match=r"total effect of -.*; .*twins or the outcome's sign are the other way"
    ):
        localise(model, rising, outcome=turned, n_boot=5, progress=False)
    assert asked == [1]


@pytest.mark.parametrize(
    ("shares", "words"),
    [((0.9, 0.1), "others stand in"), ((0.1, 0.9), "not enough alone"), ((0.1, 0.1), "neither")],
)
def test_reasons(shares, words):
    assert words in _reason(*shares, 0.5)


def test_figure_and_disk(model, rising, margin, tmp_path):
    found = localise(model, rising, outcome=margin, n_boot=5, progress=False)
    assert len(plot_localisation(found, shown=3).data[0].y) == 3 == len(found.plot().data)
    found.save(tmp_path, "places")
    pd.testing.assert_frame_equal(type(found).load(tmp_path, "places").frame, found.frame)


def _rising(model, margin, pairs):
    """The pairs turned so that every unsafe twin is the less safe one, each of them as eight items: of two nothing is clear."""
    turned = []
    for pair in pairs:
        with torch.no_grad():
            a, b = (float(margin(model(model.prepare(e)), model.prepare(e))) for e in pair)
        turned.append(pair if a < b else pair[::-1])
    return PairedExamples.from_pairs(
        [tuple(replace(e, id="", group=f"{i} {k}") for e in pair) for k in range(8) for i, pair in enumerate(turned)]
    )


def test_a_pair_without_a_picture_carries_nothing_through_the_vision_tower(model, pairs, rising, margin):
    mixed = _rising(model, margin, pairs)
    sites = ["blocks.0.hook_attn_out", "vision.blocks.1.hook_mlp_out"]
    found = localise(model, mixed, outcome=margin, sites=sites, n_boot=10, n_spans=0, progress=False)
    assert found.frame["n"].tolist() == [24, 24] and np.isfinite(found.frame["score"]).all()
    effects = mediate(model, mixed, outcome=margin, sites=sites, positions=("all",), n_boot=10, progress=False)
    by_hand = effects.details.query("tower == 'vision'")
    with_pictures = (by_hand["safe_patched"] - by_hand["safe"]).sum() / 24
    total = effects.details.query("tower == 'language'")
    expected = with_pictures / (total["unsafe"] - total["safe"]).mean()
    shown = found.frame.set_index("mediator").loc["vision.blocks.1.hook_mlp_out"]
    assert shown["sufficient"] == pytest.approx(expected, rel=1e-6)


def test_twins_of_different_lengths_are_ranked_where_both_have_a_meaning(model, picture, margin):
    twins = [(Example("what is red", image=picture(0)), Example("how to make no blue", image=picture(1))),
             (Example("yes", image=picture(2)), Example("make a red picture", image=picture(3)))]  # fmt: skip
    uneven = _rising(model, margin, PairedExamples.from_pairs(twins))
    sites = ["blocks.0.hook_mlp_out", "vision.blocks.0.hook_mlp_out"]
    found = localise(model, uneven, outcome=margin, sites=sites, n_boot=10, progress=False)
    cells = list(zip(found.frame["mediator"], found.frame["position"], strict=True))
    assert sorted(cells) == [
        ("blocks.0.hook_mlp_out", "image"), ("blocks.0.hook_mlp_out", "last"), ("vision.blocks.0.hook_mlp_out", "all"),
    ]  # fmt: skip
    assert sorted(found.top(3)) == sites and found.plot().data[0].y.tolist() == [
        name if name.startswith("vision") else f"{name}, {position}" for name, position in cells
    ]
    effects = mediate(model, uneven, outcome=margin, sites=sites[:1], positions=("last",), n_boot=10, progress=False)
    by_name = effects.frame.set_index("effect")["value"]
    shown = found.frame.query("position == 'last'").iloc[0]
    assert shown["sufficient"] == pytest.approx(by_name["NIE"] / by_name["TE"], rel=1e-4)


def test_effects_that_were_measured_already_rank_as_a_run_of_their_own(model, rising, margin):
    effects = mediate(model, rising, outcome=margin, n_boot=10, progress=False)
    ranked = rank_places(effects, n_boot=20)
    own = localise(model, rising, outcome=margin, n_boot=20, n_spans=99, progress=False)
    columns = ["rank", "mediator", "position", "acts_through", "first", "n", "seed"]
    pd.testing.assert_frame_equal(ranked.frame[columns], own.frame[columns])
    np.testing.assert_allclose(ranked.frame["score"], own.frame["score"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must hold such components"):
        rank_places(effects, components=("attn.hook_z",))
    streams = rank_places(effects, components=None, n_boot=20)
    assert streams.frame["component"].eq("hook_resid_pre").any()


def _found(cells, *, text_only=()):
    """A result from {(tower, component, position): {pair: (safe, unsafe, safe_patched, unsafe_patched)}}."""
    rows = [
        (tower, 0, component, None, None, f"{tower} {component}", position, pair, str(pair), *values)
        for (tower, component, position), pairs in cells.items()
        for pair, values in pairs.items()
    ]
    frame = pd.DataFrame({"effect": [], "position": [], "mediator": [], "value": []})
    details = pd.DataFrame(rows, columns=pd.Index(PAIR_COLUMNS))
    return MediationResult(frame, {"outcome": "margin", "text_only": list(text_only)}, details)


WHOLE, NOTHING = (0.0, 2.0, 2.0, 0.0), (0.0, 2.0, 0.0, 2.0)


def test_pairs_that_were_not_measured_everywhere_are_left_out_and_text_counts_as_nothing(caplog):
    mlp, seen = ("language", "hook_mlp_out", "all"), ("vision", "hook_mlp_out", "all")
    cells = {mlp: {0: NOTHING, 1: NOTHING, 2: NOTHING}, seen: {1: WHOLE, 2: WHOLE}}
    missing = rank_places(_found(cells), n_boot=10).frame.set_index("tower")
    assert (
        missing.loc["vision", "score"] == 1.0 and missing.loc["vision", "n"] == 2 and "[0] are left out" in caplog.text
    )
    text = rank_places(_found(cells, text_only=[0]), n_boot=10).frame.set_index("tower")
    assert text.loc["vision", "score"] == pytest.approx(2 / 3) and text.loc["vision", "n"] == 3


def test_a_group_over_both_towers_is_not_nothing_in_text():
    both, mlp = ("several", "hook_mlp_out", "all"), ("language", "hook_mlp_out", "all")
    cells = {mlp: {0: WHOLE, 1: WHOLE, 2: WHOLE}, both: {1: WHOLE, 2: WHOLE}}
    frame = rank_places(_found(cells, text_only=[0]), n_boot=10).frame
    assert frame["score"].tolist() == [1.0, 1.0] and frame["n"].tolist() == [2, 2]


def test_a_group_of_pictures_alone_is_nothing_in_text():
    pictures, mlp = ("several", "hook_mlp_out", "all"), ("language", "hook_mlp_out", "all")
    cells = {mlp: dict.fromkeys(range(4), WHOLE), pictures: {2: WHOLE, 3: WHOLE}}
    found = _found(cells, text_only=[0, 1])
    found.settings["of_pictures"] = ["several hook_mlp_out"]
    frame = rank_places(found, n_boot=10).frame.set_index("tower")
    assert frame["n"].tolist() == [4, 4] and frame.loc["several", "sufficient"] == 0.5


def test_places_that_lead_together_share_the_lead_in_any_order():
    cells = {("language", c, "all"): dict.fromkeys(range(4), WHOLE) for c in ("hook_attn_out", "hook_mlp_out")}
    for ordered in (cells, dict(reversed(cells.items()))):
        assert rank_places(_found(ordered), n_boot=20).frame["first"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("nie", "through"),
    [((0.0, 2.0, 1.9), "last"), ((0.0, 2.0, 1.0), "text"), ((2.0, 0.5, 0.1), "image"), ((0.0, 0.0, 0.0), "")],
)
def test_the_span_a_place_acts_through(nie, through):
    cells = {("language", "hook_mlp_out", "all"): dict.fromkeys(range(3), WHOLE)}
    for span, value in zip(("image", "text", "last"), nie, strict=True):
        cells["language", "hook_mlp_out", span] = dict.fromkeys(range(3), (0.0, 2.0, value, 0.0))
    frame = rank_places(_found(cells), n_boot=10).frame
    assert frame["acts_through"].tolist() == [through] and frame["position"].tolist() == ["all"]


def test_an_effect_that_few_items_do_not_tell_from_0_is_refused_with_what_to_do():
    """The mean is above 0 and its interval is not: more items are wanted, and nothing is the wrong way round."""
    unsure = _found({("language", "hook_mlp_out", "all"): {0: (0.0, 9.0, 9.0, 0.0), 1: (0.0, 1.0, 1.0, 0.0)}})
    with pytest.raises(
        NothingToLocaliseError, match=r"total effect of 5 \[-.* of 2 items; give pairs about more items"
    ):
        rank_places(unsure, n_boot=5)


def test_what_cannot_be_ranked_is_said(model, rising, margin):
    mlp = ("language", "hook_mlp_out", "all")
    with pytest.raises(NothingToLocaliseError, match="two items or more"):
        rank_places(_found({mlp: {0: WHOLE}}), n_boot=10)
    with pytest.raises(ValueError, match=r"got others for \['language hook_attn_out'\]"):
        rank_places(_found({mlp: {0: WHOLE}, ("language", "hook_attn_out", "text"): {0: WHOLE}}), n_boot=10)
    with pytest.raises(ValueError, match="two mediators of one name"):
        twice = [Mediator((Site("language", layer, "hook_mlp_out"),), name="x") for layer in (0, 1)]
        localise(model, rising, outcome=margin, sites=twice, progress=False)
