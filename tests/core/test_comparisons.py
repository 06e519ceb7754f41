import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, permutation_test

from care_lens.core.comparisons import holm, sign_flip_test


@pytest.mark.parametrize(("up", "down", "same"), [(6, 1, 3), (0, 0, 5), (10, 10, 0), (0, 12, 40), (1, 0, 0)])
def test_trials_of_their_own_give_mcnemars_exact_test(up, down, same):
    found = sign_flip_test([1] * up + [-1] * down + [0] * same)
    expected = binomtest(up, up + down, 0.5).pvalue if up + down else 1.0
    assert found == (pytest.approx(expected), "mcnemar-exact", up, down)


def test_groups_are_flipped_whole_and_all_patterns_are_counted():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(9), [1, 2, 3, 4, 5, 1, 2, 3, 4])
    values = generator.integers(-1, 2, len(groups)).astype(float)
    sums = np.bincount(groups, weights=values)
    patterns = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
    expected = (np.abs(patterns @ sums) >= abs(sums.sum())).mean()
    found = sign_flip_test(values, groups)
    assert found.p == pytest.approx(expected) and found.test == "sign-flip-exact"
    scipys = permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(scipys.pvalue, abs=1e-9)
    # One item that is asked twelve times is one observation, not twelve.
    assert sign_flip_test([1] * 12, ["a"] * 12).p == 1.0
    assert sign_flip_test([1] * 12).p == pytest.approx(2 / 2**12)


def test_a_group_whose_differences_cancel_but_for_rounding_is_none():
    found = sign_flip_test([0.1, 0.2, -0.3, 1, 0], ["a", "a", "a", "b", "b"])
    assert found == sign_flip_test([1.0, 0], ["b", "b"]) == (1.0, "sign-flip-exact", 1, 0)
    assert sign_flip_test([1e-12, 2e-12, -1e-12]).up == 2  # small, but differences


def test_numbers_are_counted_for_few_groups_and_sampled_for_many():
    generator = np.random.default_rng(1)
    few = generator.normal(0.4, 1, 8)
    scipys = permutation_test((few,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(few).p == pytest.approx(scipys.pvalue, abs=1e-9)
    assert sign_flip_test(few).test == "sign-flip-exact"
    many = generator.normal(0.2, 1, 60)
    found = sign_flip_test(many, seed=3)
    reference = permutation_test((many,), np.sum, permutation_type="samples", n_resamples=20000, rng=0)
    assert found.test == "sign-flip-sampled" and found.p == pytest.approx(reference.pvalue, abs=0.02)
    assert sign_flip_test(many, seed=3) == found


def test_the_test_has_its_size_where_groups_are_not_independent():
    """Under no difference 5 % of p values are at most 5 %; a test that takes trials for independent has many times that."""
    generator = np.random.default_rng(2)
    groups = np.repeat(np.arange(20), 6)
    rejected = naive = 0
    for _ in range(400):
        first, second = (np.repeat(generator.integers(0, 2, 20), 6) for _ in range(2))
        rejected += sign_flip_test(first - second, groups).p <= 0.05
        naive += sign_flip_test(first - second).p <= 0.05
    assert rejected / 400 < 0.08 and naive / 400 > 0.3


@pytest.mark.parametrize(
    ("values", "groups", "message"),
    [([], None, "one or more"), ([float("nan")], None, "finite"), ([1, 0], ["a"], "for each of 2 trials, got 1")],
)
def test_what_cannot_be_compared_is_named(values, groups, message):
    with pytest.raises(ValueError, match=message):
        sign_flip_test(values, groups)


def test_holm_by_hand():
    # Holm 1979: the smallest times 4, the next times 3, never below the one before.
    assert holm([0.01, 0.02, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    held = holm([0.01, float("nan"), 0.04])
    assert held[0] == 0.02 and np.isnan(held[1]) and held[2] == 0.04
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        holm([1.2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_no_correction_and_bonferroni(p_values):
    raw, adjusted = np.array(p_values), holm(p_values)
    assert (adjusted >= raw).all() and (adjusted <= np.minimum(raw * len(raw), 1) + 1e-12).all()
    order = np.argsort(raw, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    assert adjusted[order[0]] == pytest.approx(min(raw.min() * len(raw), 1))
