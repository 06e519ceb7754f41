"""Effect arithmetic and intervals."""

import numpy as np
from scipy.stats import permutation_test

from care_lens.mediation import EFFECTS, effects_of, p_values, summarise

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
    """Forty copies of one pair are one observation, of which there is no interval; forty groups have one."""
    found = effects()
    together = summarise(found, ["same"] * 40, n_boot=100)
    apart = summarise(found, [str(i) for i in range(40)], n_boot=100)
    assert np.isnan([together["TE"].low, together["TE"].high]).all()
    assert np.all(apart["TE"].high > apart["TE"].low)


def test_p_values_are_those_of_scipy():
    values = RNG.normal(0.4, 1, size=(9, 3))
    found = p_values({"NIE": values}, [str(i) for i in range(9)])["NIE"]
    expected = permutation_test(
        (values, np.zeros_like(values)),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
        axis=0,
    ).pvalue
    np.testing.assert_allclose(found, expected)


def test_groups_change_sign_together():
    """Eight copies of one pair are one observation, whose sign says nothing; uneven groups keep the mean over pairs."""
    one = np.ones((8, 1))
    assert p_values({"TE": one}, ["same"] * 8)["TE"] == [1.0]
    np.testing.assert_allclose(p_values({"TE": one}, [str(i) for i in range(8)])["TE"], [2 / 2**8])
    uneven = np.array([[3.0], [3.0], [-4.0]])  # by group sums 6 and -4: |6 - 4| is the smallest of the flips
    assert p_values({"TE": uneven}, ["a", "a", "b"])["TE"] == [1.0]


def test_many_groups_are_sampled_by_the_seed():
    values = {"TE": RNG.normal(0.3, 1, size=(40, 70))}
    labels = [str(i) for i in range(40)]
    first, again, other = (p_values(values, labels, n_permutations=200, seed=seed)["TE"] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and (first > 0).all()
