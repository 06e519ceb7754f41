"""What is no effect: rounding, and positions that no row has."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from care_lens.core import PairedExamples
from care_lens.mediation import knockout, mediate, path_effects
from care_lens.mediation.attribution import completeness_gap
from care_lens.mediation.resolution import mean_effect, resolved, spacing


def test_differences_below_the_spacing_of_the_outcome_are_zero(model):
    assert spacing(model) == 16 * torch.finfo(torch.float32).eps
    outcomes = np.array([[0.1], [5.0], [1000.0]])
    effects = np.array([[1e-6, 1e-3], [1e-5, -1e-5], [1e-3, 0.01]])
    # 16 eps is 1.9e-6: of outcomes of 5 and 1000 that is 9.5e-6 and 1.9e-3.
    expected = [[0.0, 1e-3], [1e-5, -1e-5], [0.0, 0.01]]
    np.testing.assert_array_equal(resolved(effects, outcomes, spacing=spacing(model)), expected)
    assert np.isnan(resolved(np.array([np.nan]), spacing=1.0)).all()


def test_mean_effects_know_judged_outcomes_and_empty_cells():
    zeros, groups = np.zeros(12), [str(i) for i in range(12)]
    assert tuple(mean_effect(zeros, groups, n_boot=10, seed=0)) == (0, 0, 0)
    judged = mean_effect(zeros, groups, np.ones(12), np.ones(12), n_boot=10, seed=0)
    assert judged.low == -judged.high < -0.2
    empty = mean_effect(np.zeros((0, 3)), [], n_boot=10, seed=0)
    assert np.isnan(empty.estimate).all() and np.shape(empty.low) == (3,)


@pytest.fixture(scope="module")
def alike(pictured):
    """Twins with equal texts and pictures, so that every effect is nothing but rounding."""
    return PairedExamples.from_pairs(
        [(safe, replace(safe, image=safe.image.copy())) for safe, _ in pictured for _ in range(3)]
    )


def test_twins_that_are_the_same_have_no_effect_anywhere(model, alike, margin):
    paths = path_effects(model, alike, outcome=margin, senders=["blocks.0.hook_attn_out"], n_boot=20, progress=False)
    swept = mediate(model, alike, outcome=margin, sites=["blocks.1.hook_mlp_out"], n_boot=20, progress=False)
    for frame in (paths.frame, swept.frame[swept.frame.effect != "proportion"]):
        assert (frame[["value", "ci_low", "ci_high"]].dropna() == 0).all(axis=None) and (frame["value"] == 0).all()
    assert (swept.frame.loc[swept.frame.effect == "TE", "p_value"] == 1).all()


@pytest.mark.parametrize("noise", [1e-8, 1e-7])
def test_rounding_in_a_path_is_not_an_effect(model, pictured, margin, noise, monkeypatch):
    """Runs whose outcomes differ in the last digits: 0 with no interval about it, and the raw outcomes in the details."""
    from care_lens.mediation.path_runs import PathRuns

    whole = PathRuns.sent
    monkeypatch.setattr(
        PathRuns,
        "sent",
        lambda self, sender, position, receivers: (
            np.array(whole(self, sender, position, receivers)) * 0 + np.array(self.untouched())[:, None] + noise
        ),
    )
    found = path_effects(model, pictured, outcome=margin, senders=["blocks.0.hook_attn_out"], n_boot=20, progress=False)
    assert (found.frame["value"] == 0).all()
    assert ((found.details["safe_patched"] - found.details["safe"]) > 0).all()


def test_a_position_that_no_row_has_is_missing(model, pairs, margin, caplog):
    with caplog.at_level(logging.WARNING):
        found = mediate(
            model, pairs, outcome=margin, sites=["blocks.1.hook_mlp_out"], positions=("last", "response"),
            n_boot=20, progress=False,
        )  # fmt: skip
    assert "at positions ['response']" in caplog.text
    there, absent = (found.frame[found.frame.position == name] for name in ("last", "response"))
    assert (there["n"] == 3).all() and there.loc[there.effect == "TE", "value"].notna().all()
    assert len(absent) == 6 and (absent["n"] == 0).all()
    assert absent[["value", "ci_low", "ci_high", "p_value"]].isna().all(axis=None)
    paths = path_effects(
        model, pairs, outcome=margin, senders=["blocks.0.hook_mlp_out"], receivers=["end"],
        positions=("last", "response"), n_boot=20, progress=False,
    ).frame.set_index("position")  # fmt: skip
    assert paths.loc["response", "n"] == 0 and np.isnan(paths.loc["response", "value"])
    assert paths.loc["last", "n"] == 3 and np.isfinite(paths.loc["last", "value"])
    with pytest.raises(ValueError, match="got none with response->last"):
        knockout(model, pairs, source="response", target="last", outcome=margin, progress=False)


def test_completeness_is_over_pairs():
    assert completeness_gap(np.array([1.0, 3.0]), np.array([2.0, 2.0])) == 0.5
    assert completeness_gap(np.zeros(2), np.zeros(2)) == 0
    assert completeness_gap(np.ones(2), np.zeros(2)) == float("inf")
