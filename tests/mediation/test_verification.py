"""Verification of attributions: exact effects are mediate's, and the measures are what they say."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, spearmanr
from zoo.straight import straight

from care_lens.core import LogitDifference
from care_lens.mediation import heads, mediate, patch_map
from care_lens.mediation.attribution import attribute
from care_lens.mediation.rank_measures import _rank_correlation, miss_rate
from care_lens.mediation.verification import VerifiedResult, verify

QUICK = {"n_boot": 20, "progress": False}


@pytest.fixture(scope="module")
def guess(model, pairs, margin):
    return attribute(model, pairs, outcome=margin, positions=("all", "image"), **QUICK)


@pytest.fixture(scope="module")
def verified(model, pairs, margin, guess):
    return verify(model, pairs, guess, outcome=margin, top=4, random=5, **QUICK)


def test_exact_effects_are_those_of_mediate(verified, model, pairs, margin):
    swept = mediate(
        model, pairs, outcome=margin, sites=[*heads(model), *heads(model, tower="vision")], positions=("all",), **QUICK
    ).frame
    nie = swept[swept.effect == "NIE"].set_index("mediator")
    mine = verified.details[(verified.details.component == "attn.hook_z") & (verified.details.position == "all")]
    assert len(mine) == 2 * 9
    for unit in mine.to_dict("records"):
        assert unit["value"] == pytest.approx(nie.loc[unit["mediator"], "value"], abs=1e-6)
        assert unit["n"] == nie.loc[unit["mediator"], "n"]


def test_patches_are_those_of_the_patch_map(verified, model, pictured, margin):
    for site in ("blocks.0.hook_resid_pre", "vision.hook_embed"):
        want = patch_map(model, pictured, outcome=margin, site=site, **QUICK).frame["value"]
        mine = verified.details[(verified.details.mediator == site) & verified.details.position.str.startswith("patch")]
        assert len(mine) == 4
        for unit in mine.to_dict("records"):
            assert unit["value"] == pytest.approx(want[int(unit["position"].split()[1])], abs=1e-6)


def test_on_a_linear_model_the_ranks_are_right(llava_maker, pictured):
    lvlm = straight(llava_maker)
    toward, away = lvlm.tokenizer.convert_tokens_to_ids(["sure", "sorry"])
    outcome = LogitDifference((toward,), (away,))
    sites = ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    guess = attribute(lvlm, pictured, outcome=outcome, sites=sites, patches=(), method="gradient", **QUICK)
    found = verify(lvlm, pictured, guess, outcome=outcome, top=4, random=4, **QUICK).frame.set_index("effect")
    assert found.loc["spearman", "value"] == pytest.approx(1)
    assert found.loc["miss rate", "value"] == 0
    backwards = replace(guess, frame=guess.frame.assign(value=1 / guess.frame["value"]))
    worse = verify(lvlm, pictured, backwards, outcome=outcome, top=4, random=4, **QUICK).frame.set_index("effect")
    assert worse.loc["miss rate", "value"] > 0.5


def test_measures_are_of_the_units_patched(verified, guess):
    for row in verified.frame.to_dict("records"):
        details = verified.details
        here = details[(details.tower == row["tower"]) & (details.component == row["component"])]
        patch = here.position.str.startswith("patch")
        here = here[patch if row["kind"] == "patch" else ~patch & (here.position == row["position"])]
        if row["effect"] == "spearman" and len(here) >= 3:
            assert row["value"] == pytest.approx(spearmanr(here["estimate"], here["value"]).statistic)
            assert row["n"] == len(here)
    top = verified.details[(verified.details.top == 1) & (verified.details.component == "mlp.hook_post")]
    neurons = guess.frame[(guess.frame.kind == "neuron") & (guess.frame.position == "all")]
    best = neurons[neurons.tower == "language"]["value"].abs().nlargest(4)
    mine = top[(top.tower == "language") & (top.position == "all")]["estimate"].abs()
    assert mine.tolist() == pytest.approx(best.tolist())


def test_miss_rate_by_hand():
    top, others = np.array([4.0, -3.0, 1.0]), np.array([5.0, 0.0, 0.0, -0.5])
    # Large is 3 or more: two of the top ones, and a quarter of the 97 others, 24.25.
    value, low, high = miss_rate(top, others, size=100)
    assert value == pytest.approx(24.25 / 26.25)
    p_low, p_high = beta.ppf(0.025, 1, 4), beta.ppf(0.975, 2, 3)
    assert (low, high) == (pytest.approx(97 * p_low / (97 * p_low + 2)), pytest.approx(97 * p_high / (97 * p_high + 2)))
    assert miss_rate(top, others, size=7) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    # Nothing of the rest was drawn, as of a kind of edges that is rare: it ended a verification after its last run.
    assert np.isnan(miss_rate(top, others[:0], size=100)).all() and miss_rate(top, others[:0], size=len(top)) == (
        0,
        0,
        0,
    )
    assert miss_rate(top, others[:0], size=3) == (0, 0, 0)
    assert np.isnan(miss_rate(np.zeros(3), others, size=7)).all()


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20))
def test_rank_correlation_is_scipys(points):
    x, y = np.array(points, dtype=float).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert np.isnan(_rank_correlation({"x": x, "y": y}))
    else:
        assert _rank_correlation({"x": x, "y": y}) == pytest.approx(spearmanr(x, y).statistic)


def test_refusals(model, pairs, margin, guess):
    with pytest.raises(ValueError, match="top must be 1 or more"):
        verify(model, pairs, guess, outcome=margin, top=0, **QUICK)
    with pytest.raises(ValueError, match="outcome must be"):
        verify(model, pairs, guess, outcome=LogitDifference((1,), (2,)), **QUICK)


def test_save_and_load_and_draw(verified, tmp_path):
    verified.save(tmp_path, "verified")
    back = VerifiedResult.load(tmp_path, "verified")
    pd.testing.assert_frame_equal(back.frame, verified.frame)
    pd.testing.assert_frame_equal(back.details, verified.details, check_exact=True)
    assert back.settings == json.loads(json.dumps(verified.settings))
    assert len(verified.plot().data) == 3
