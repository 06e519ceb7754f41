"""Effect arithmetic and intervals."""

import numpy as np

from care_lens.mediation import EFFECTS, effects_of, summarise

RNG = np.random.default_rng(0)


def effects(n=40, cells=3, total=2.0):
    safe = RNG.normal(size=(n, cells))
    unsafe = safe + total + 0.1 * RNG.normal(size=(n, cells))
    return effects_of(safe, unsafe, safe + 0.5, unsafe - 0.25)


def test_signs_are_those_of_the_definitions():
    found = effects_of(*(np.full((1, 1), value) for value in (1.0, 11.0, 4.0, 5.0)))
    assert {name: float(part[0, 0]) for name, part in found.items()} == {
        "TE": 10.0,
        "NIE": 3.0,
        "NDE": 4.0,
        "TIE": 6.0,
        "interaction": 3.0,
    }


def test_summary_is_means_and_a_ratio_of_means():
    found = effects()
    summary = summarise(found, [str(i) for i in range(40)], n_boot=200)
    assert tuple(summary) == EFFECTS
    np.testing.assert_allclose(summary["TIE"].estimate, found["TIE"].mean(axis=0))
    expected = found["NIE"].mean(axis=0) / found["TE"].mean(axis=0)
    np.testing.assert_allclose(summary["proportion"].estimate, expected)
    assert np.all((summary["proportion"].low < expected) & (expected < summary["proportion"].high))


def test_the_ratio_is_bootstrapped_jointly():
    """Where NIE is exactly half of TE in every pair the ratio has no spread, though both means have."""
    te = 2 + RNG.normal(size=(30, 1))
    zero = np.zeros_like(te)
    summary = summarise(effects_of(zero, te, te / 2, te / 2), [str(i) for i in range(30)], n_boot=200)
    assert summary["NIE"].high[0] - summary["NIE"].low[0] > 0.1
    np.testing.assert_allclose([summary["proportion"].low[0], summary["proportion"].high[0]], 0.5)


def test_no_proportion_where_the_total_effect_may_be_zero():
    summary = summarise(effects(total=0.0), [str(i) for i in range(40)], n_boot=200)
    assert summary["TE"].low[0] <= 0 <= summary["TE"].high[0]
    assert all(np.isnan(part).all() for part in summary["proportion"])


def test_pairs_of_one_group_are_drawn_together():
    """Forty copies of one pair are one observation: a single group has no spread, forty groups have."""
    found = effects()
    together = summarise(found, ["same"] * 40, n_boot=100)
    apart = summarise(found, [str(i) for i in range(40)], n_boot=100)
    np.testing.assert_allclose(together["TE"].low, together["TE"].high)
    assert np.all(apart["TE"].high > apart["TE"].low)
