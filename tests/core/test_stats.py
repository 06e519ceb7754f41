"""Intervals against hand-written and other libraries' ones."""

import numpy as np
import pytest
from scipy import stats

from care_lens.core import cluster_bootstrap, paired_difference, rate_ci


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    return rng.normal(size=len(groups)) + groups / 5, groups


def by_hand(values, groups, n_boot, seed, statistic):
    """The definition: draw groups, put their rows together, take the statistic."""
    groups = groups.astype(str)
    names = np.unique(groups)
    draws = np.random.default_rng(seed).integers(len(names), size=(n_boot, len(names)))
    out = [statistic(np.concatenate([values[groups == names[g]] for g in draw])) for draw in draws]
    return np.percentile(out, [2.5, 97.5])


def test_the_mean_equals_the_definition(data):
    values, groups = data
    estimate, low, high = cluster_bootstrap(values, groups, n_boot=300, seed=4)
    assert estimate == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(by_hand(values, groups, 300, 4, np.mean)))


def test_other_statistics_equal_the_definition(data):
    values, groups = data
    interval = cluster_bootstrap(values, groups, statistic=np.median, n_boot=100, seed=1)
    assert (interval.low, interval.high) == pytest.approx(tuple(by_hand(values, groups, 100, 1, np.median)))


def test_many_cells_at_once_equal_one_at_a_time(data):
    values, groups = data
    cells = np.stack([values, values**2, -values]).T.reshape(-1, 3, 1)
    together = cluster_bootstrap(cells, groups, n_boot=200)
    assert together.estimate.shape == (3, 1)
    for i in range(3):
        alone = cluster_bootstrap(cells[:, i, 0], groups, n_boot=200)
        assert tuple(part[i, 0] for part in together) == pytest.approx(tuple(alone))


def test_arrays_are_resampled_jointly(data):
    values, groups = data
    ratio = cluster_bootstrap(
        {"a": 3 * values, "b": values}, groups, statistic=lambda v: v["a"].mean() / v["b"].mean(), n_boot=200
    )
    assert tuple(ratio) == pytest.approx((3, 3, 3))
    some = cluster_bootstrap(
        {"a": np.ones(2), "b": np.array([0.0, 1.0])},
        statistic=lambda v: v["a"].sum() / v["b"].sum(),
        n_boot=100,
    )
    assert np.isfinite([some.low, some.high]).all()


def test_labels_can_be_strings_and_clusters_widen_the_interval(data):
    values, _ = data
    repeated, names = np.repeat(values, 5), np.repeat([f"noun {i}" for i in range(len(values))], 5)
    clustered = cluster_bootstrap(repeated, list(names))
    assert tuple(clustered) == pytest.approx(tuple(cluster_bootstrap(values, list(names[::5]))))
    naive = cluster_bootstrap(repeated)
    assert clustered.high - clustered.low > 1.5 * (naive.high - naive.low)


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        means = rng.normal(size=40)
        interval = cluster_bootstrap(np.repeat(means, 2), list(np.repeat(np.arange(40), 2)), n_boot=300, seed=trial)
        hits += interval.low <= 0 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_rates_have_the_clopper_pearson_interval():
    for successes, trials in [(0, 72), (3, 10), (10, 10)]:
        exact = stats.binomtest(successes, trials).proportion_ci(0.9, "exact")
        assert tuple(rate_ci(successes, trials, confidence=0.9)) == pytest.approx((successes / trials, *exact))
    with pytest.raises(ValueError, match="got 3 of 2"):
        rate_ci(3, 2)


def test_paired_differences(data):
    values, groups = data
    noise = np.random.default_rng(3).normal(size=len(values)) * 0.01
    estimate, low, high = paired_difference(values + 1 + noise, values, list(groups))
    assert 0.98 < low < estimate < high < 1.02
    with pytest.raises(ValueError, match="same shape"):
        paired_difference(values, values[1:])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"values": []}, "one length above 0"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "one length above 0"),
        ({"values": [1.0], "confidence": 1.0}, "confidence must be"),
        ({"values": [1.0], "n_boot": 0}, "n_boot must be"),
    ],
)
def test_options_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(kwargs.pop("values"), kwargs.pop("groups", None), **kwargs)
