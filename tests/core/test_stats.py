"""Intervals against hand-written and other libraries' ones, and the coverage that they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from care_lens.core import cluster_bootstrap, clustered_rate, paired_difference, rate_ci, ratio_of_means
from care_lens.core.bounded_means import bounded_means
from care_lens.core.comparisons import sign_flip_test


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), rng.integers(1, 6, 12))
    return rng.normal(size=len(groups)) + groups / 5, groups


def linearised_error(residuals, groups):
    """The cluster-robust standard error of a mean, as survey textbooks have it."""
    sums = np.array([residuals[groups == g].sum() for g in np.unique(groups)])
    return np.sqrt(len(sums) / (len(sums) - 1) * (sums**2).sum()) / len(residuals)


def by_hand(values, groups, n_boot, seed):
    """The studentised interval by its definition: draw groups, put their rows together, take T."""
    groups = groups.astype(str)
    names, mean = np.unique(groups), values.mean()
    g, error = len(names), linearised_error(values - values.mean(), groups)
    ts = []
    for draw in np.random.default_rng(seed).integers(g, size=(n_boot, g)):
        rows = [values[groups == names[k]] for k in draw]
        drawn, own = np.concatenate(rows), np.repeat(np.arange(g), [len(part) for part in rows])
        ts.append((drawn.mean() - mean) / linearised_error(drawn - drawn.mean(), own))
    student = stats.t.ppf(0.975, g - 1)
    t = np.sort(np.clip(ts, -4 * student, 4 * student))
    wide, narrow = (int(0.025 * share * (n_boot + 1)) - 1 for share in (max(0.25, 1 - 5 / g), 1))
    skew = sum((values[groups == name] - mean).sum() ** 3 for name in names)
    low, high = t[wide if skew > 0 else narrow], t[n_boot - 1 - (wide if skew < 0 else narrow)]
    return mean - max(high, student) * error, mean - min(low, -student) * error


def test_the_mean_equals_the_definition(data):
    values, groups = data
    for sample in (values, np.exp(values), -np.exp(values)):
        estimate, low, high = cluster_bootstrap(sample, groups, n_boot=400, seed=4)
        assert estimate == pytest.approx(sample.mean())
        assert (low, high) == pytest.approx(by_hand(sample, groups, 400, 4))


def test_of_many_groups_it_is_scipys_studentised_and_t_interval():
    values = np.random.default_rng(5).normal(size=400)
    _, low, high = cluster_bootstrap(values, n_boot=4000)
    student = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(student, abs=0.12 * values.std() / 20)
    skewed = np.random.default_rng(6).exponential(size=200)
    ours = cluster_bootstrap(skewed, n_boot=4000)
    bca = stats.bootstrap((skewed,), np.mean, method="BCa", random_state=0).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((bca.low, bca.high), abs=0.4 * stats.sem(skewed))


def test_few_groups_have_students_interval_and_one_has_none():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    for n, tail in ((2, 0.0125), (3, 0.00625), (4, 0.00625)):
        _, low, high = cluster_bootstrap(values[:n])
        wide = stats.t.interval(1 - 2 * tail, n - 1, values[:n].mean(), stats.sem(values[:n]))
        assert (low, high) == pytest.approx(wide)
    alone = cluster_bootstrap(values, ["a"] * 4)
    assert alone.estimate == 4
    assert np.isnan([alone.low, alone.high]).all()


def test_other_statistics_hold_scipys_bca_interval():
    rng = np.random.default_rng(7)
    values = rng.exponential(size=60)
    for statistic in (np.median, np.std):
        bca = stats.bootstrap((values,), statistic, method="BCa", n_resamples=2000, random_state=0).confidence_interval
        _, low, high = cluster_bootstrap(values, statistic=statistic, n_boot=2000, seed=1)
        slack = 0.12 * (bca.high - bca.low)
        assert low < bca.low + slack and high > bca.high - slack
        assert high - low < 1.8 * (bca.high - bca.low)


def test_bounds_keep_perfect_scores_from_being_points():
    def perfect(values):
        return float((values > 0).mean())

    values = np.ones(12)
    assert tuple(cluster_bootstrap(values, statistic=perfect, n_boot=50)) == (1, 1, 1)
    _, low, high = cluster_bootstrap(values, statistic=perfect, bounds=(0, 1), n_boot=50)
    assert (low, high) == pytest.approx((rate_ci(12, 12).low, 1))
    with pytest.raises(ValueError, match="bounds must be"):
        cluster_bootstrap(values, statistic=perfect, bounds=(1, 0), n_boot=50)


def test_many_cells_at_once_equal_one_at_a_time(data):
    values, groups = data
    cells = np.stack([values, values**2, -values, 1e-9 * values]).T.reshape(-1, 4, 1)
    together = cluster_bootstrap(cells, groups, n_boot=200)
    assert together.estimate.shape == (4, 1)
    for i in range(4):
        alone = cluster_bootstrap(cells[:, i, 0], groups, n_boot=200)
        assert tuple(part[i, 0] for part in together) == pytest.approx(tuple(alone), rel=1e-9, abs=0)


def test_intervals_follow_shifts_scales_and_signs(data):
    values, groups = data
    sample = np.exp(values)
    one = cluster_bootstrap(sample, groups, n_boot=500)
    moved = cluster_bootstrap(3 + 2 * sample, groups, n_boot=500)
    assert tuple(moved) == pytest.approx(tuple(3 + 2 * np.array(one)))
    turned = cluster_bootstrap(-sample, groups, n_boot=500)
    assert tuple(turned) == pytest.approx((-one.estimate, -one.high, -one.low))


def test_equal_numbers_are_a_point_and_equal_trials_are_not():
    assert tuple(cluster_bootstrap([0.3] * 8)) == (0.3, 0.3, 0.3)
    assert tuple(cluster_bootstrap([0.0] * 8, kind="numbers")) == (0, 0, 0)
    for value in (0.0, 1.0):
        found = cluster_bootstrap([value] * 8)
        assert tuple(found) == pytest.approx(tuple(rate_ci(int(8 * value), 8)))
    nothing = cluster_bootstrap(np.zeros(8), kind="differences")
    assert (nothing.low, nothing.high) == pytest.approx((-rate_ci(0, 8).high, rate_ci(0, 8).high))
    with pytest.raises(ValueError, match=r"between 0 and 1 to be rates, got -0\.5 to 1\.0"):
        cluster_bootstrap([-0.5, 1.0], kind="rates")


def test_ratio_of_means_is_fiellers():
    rng = np.random.default_rng(2)
    bottom = rng.normal(3, 1, size=(30, 4))
    top = 0.5 * bottom + rng.normal(size=(30, 4))
    ratio, low, high = ratio_of_means(top, bottom, n_boot=1000)
    assert ratio == pytest.approx(top.mean(0) / bottom.mean(0))
    # The ends are the ratios at which the mean of top - R bottom is as many standard errors from 0 as allowed.
    for end in (low, high):
        t = (top - end * bottom).mean(0) / stats.sem(top - end * bottom)
        assert (np.abs(t) >= stats.t.ppf(0.975, 29) - 1e-9).all() and (np.abs(t) < 3).all()
    turned = ratio_of_means(top, -bottom, n_boot=1000)
    assert turned.low == pytest.approx(-high) and turned.high == pytest.approx(-low)
    assert tuple(ratio_of_means(3 * bottom[:, 0], bottom[:, 0])) == pytest.approx((3, 3, 3))
    unclear = ratio_of_means(rng.normal(size=20), rng.normal(size=20))
    assert np.isnan([unclear.low, unclear.high]).all()


def test_arrays_of_a_statistic_belong_together(data):
    values, groups = data
    ratio = cluster_bootstrap(
        {"a": 3 * values, "b": values}, groups, statistic=lambda v: v["a"].mean() / v["b"].mean(), n_boot=100
    )
    assert tuple(ratio) == pytest.approx((3, 3, 3))
    some = cluster_bootstrap(
        {"a": np.ones(4), "b": np.array([0.0, 0.0, 0.0, 1.0])},
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


def beta_binomial(rng, rate, groups, size, correlation, samples):
    """[groups x size, samples] trials whose groups have rates of their own."""
    own = np.full((groups, 1, samples), rate)
    if correlation:
        share = (1 - correlation) / correlation
        own = rng.beta(rate * share, (1 - rate) * share, size=own.shape)
    return (rng.random((groups, size, samples)) < own).astype(float).reshape(groups * size, samples)


@pytest.mark.parametrize("groups", [6, 12, 24])
def test_coverage_is_what_the_documentation_says(groups):
    """The hardest cells of benchmarks/bench_intervals.py, which has them all; a percentile interval has 48 to 90 % of these."""
    rng = np.random.default_rng(groups)
    cells = {
        "normal": (rng.normal(size=(groups, 1500)), 0.0),
        "exponential": (rng.exponential(size=(groups, 1500)), 1.0),
        "lognormal": (rng.lognormal(size=(groups, 1500)), np.exp(0.5)),
        "rate .05": (beta_binomial(rng, 0.05, groups, 1, 0, 1500), 0.05),
        "rate .05 x 3": (beta_binomial(rng, 0.05, groups, 3, 0.5, 1500), 0.05),
        "rate .5 x 3": (beta_binomial(rng, 0.5, groups, 3, 0.5, 1500), 0.5),
    }
    change = beta_binomial(rng, 0.1, groups, 3, 0.5, 1500) - beta_binomial(rng, 0.05, groups, 3, 0.5, 1500)
    cells["difference"] = (change, 0.05)
    for name, (values, true) in cells.items():
        _, low, high = cluster_bootstrap(values, np.repeat(np.arange(groups), len(values) // groups), n_boot=1000)
        covered = float(((low <= true) & (true <= high)).mean())
        assert covered >= 0.92, (name, covered)  # .93 less the noise of 1500 samples


def test_rates_have_the_clopper_pearson_interval():
    for successes, trials in [(0, 72), (3, 10), (10, 10), (1, 1)]:
        exact = stats.binomtest(successes, trials).proportion_ci(0.9, "exact")
        assert tuple(rate_ci(successes, trials, confidence=0.9)) == pytest.approx((successes / trials, *exact))
        hits = np.arange(trials) < successes
        assert tuple(clustered_rate(hits, confidence=0.9)) == pytest.approx((successes / trials, *exact))
    with pytest.raises(ValueError, match="got 3 of 2"):
        rate_ci(3, 2)


def test_clustered_rates_are_korn_and_graubards():
    hits = np.array([1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1.0])
    groups = np.repeat(np.arange(10), 2)
    n, p = len(hits), hits.mean()
    deff = linearised_error(hits - p, groups) ** 2 / (p * (1 - p) / (n - 1))
    positive = len({g for g, hit in zip(groups, hits, strict=True) if hit})
    df = min(9, positive + 3)
    effective = n / max(deff, 1) * (stats.t.ppf(0.975, n - 1) / stats.t.ppf(0.975, df)) ** 2
    x = p * effective
    expected = stats.beta.ppf(0.025, x, effective - x + 1), stats.beta.ppf(0.975, x + 1, effective - x)
    assert tuple(clustered_rate(hits, groups)) == pytest.approx((p, *expected))
    # Whole groups that agree are so many trials, or fewer where the groups are few.
    same = clustered_rate(np.repeat([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], 4), np.repeat(np.arange(6), 4))
    exact = rate_ci(4, 6)
    assert same.low <= exact.low and same.high >= exact.high


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40),
    st.sampled_from([0.8, 0.95, 0.99]),
)
@settings(max_examples=60, deadline=None)
def test_rates_are_never_points_and_turn_with_their_complement(trials, confidence):
    hits, groups = np.array([hit for hit, _ in trials], dtype=float), [group for _, group in trials]
    rate, low, high = clustered_rate(hits, groups, confidence=confidence)
    assert 0 <= low <= rate <= high <= 1 and high > low
    turned = clustered_rate(1 - hits, groups, confidence=confidence)
    assert tuple(turned) == pytest.approx((1 - rate, 1 - high, 1 - low))
    naive = rate_ci(int(hits.sum()), len(hits), confidence=confidence)
    assert high - low >= naive.high - naive.low - 1e-9


def test_paired_differences(data):
    values, groups = data
    noise = np.random.default_rng(3).normal(size=len(values)) * 0.01
    estimate, low, high = paired_difference(values + 1 + noise, values, list(groups))
    assert 0.98 < low < estimate < high < 1.02
    with pytest.raises(ValueError, match="same shape"):
        paired_difference(values, values[1:])


def test_paired_rates_are_newcombes_where_trials_are_independent():
    before, after = np.array([True] * 9 + [False] * 11), np.array([True] * 4 + [False] * 5 + [True] * 1 + [False] * 10)
    change, low, _ = paired_difference(before, after)
    lost, won = rate_ci(5, 20), rate_ci(1, 20)
    rho = -np.sqrt(0.25 * 0.05 / (0.75 * 0.95))
    a, b = lost.estimate - lost.low, won.high - won.estimate
    assert change == pytest.approx(0.2)
    assert low == pytest.approx(0.2 - np.sqrt(a**2 + b**2 - 2 * rho * a * b))
    unchanged = paired_difference(before, before)
    assert unchanged.low < 0 < unchanged.high


@pytest.mark.parametrize("blank", [None, float("nan")])
def test_rows_without_a_label_are_their_own_groups(blank):
    hits = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    assert clustered_rate(hits, ["a", "a", blank, blank, blank, blank]) == clustered_rate(hits, [*"aabcde"])
    assert clustered_rate(hits, [blank] * 6) == rate_ci(4, 6)
    assert sign_flip_test([1, 1, 1, 1], [blank] * 4).p == sign_flip_test([1, 1, 1, 1]).p


def test_scores_that_nothing_changed_differ_by_no_point():
    same = np.array([0.3, 0.6, 1.0, 0.0] * 2)
    change, low, high = paired_difference(same, same, scores=True)
    unseen = 1 - 0.025 ** (1 / 8)  # what 8 trials can miss
    assert (change, low, high) == pytest.approx((0, -unseen, unseen))
    grouped = paired_difference(np.repeat(same, 3), np.repeat(same, 3), np.repeat(np.arange(8), 3), scores=True)
    assert tuple(grouped) == pytest.approx((0, -unseen, unseen))
    assert paired_difference(same, same) == (0, 0, 0)  # numbers of the real line
    before, after = np.array([1.0] * 6 + [0.0] * 4), np.array([1.0] * 3 + [0.0] * 7)
    assert paired_difference(before, after, scores=True) == paired_difference(before, after)
    with pytest.raises(ValueError, match="second must be between 0 and 1 to be scores"):
        paired_difference(same, same * 7, scores=True)


@pytest.mark.parametrize(("hits", "n"), [(0, 8), (3, 20), (20, 20), (1, 1), (5, 200)])
def test_bounded_means_of_rates_are_exact(hits, n):
    values = np.array([[1.0] * hits + [0.0] * (n - hits)]).T
    exact = stats.binomtest(hits, n).proportion_ci(0.95)
    _, low, high = bounded_means(values, np.arange(n), (0.0, 1.0), 0.95)
    assert (low[0], high[0]) == pytest.approx((exact.low, exact.high), abs=1e-7)


def test_bounded_means_are_quantiles_of_randomly_weighted_groups():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [1, 1, 2, 3, 1, 4])
    values = rng.uniform(-1, 1, len(labels))
    _, low, high = bounded_means(values[:, None], labels, (-1.0, 1.0), 0.9)
    sizes, sums = np.bincount(labels), np.bincount(labels, weights=values)
    added, weights = (sizes**2).sum() / sizes.sum(), rng.exponential(size=(200_000, 7))
    for bound, found, tail in ((-1.0, low[0], 0.05), (1.0, high[0], 0.95)):
        means = weights @ np.append(sums, bound * added) / (weights @ np.append(sizes, added))
        assert found == pytest.approx(np.quantile(means, tail), abs=0.01)


def test_a_rare_loss_of_score_is_covered():
    """3 % of 60 trials lose up to .6: a studentised interval covers the change in 79 % of samples. And where all differ it is hardly wider."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(40):
        lost = (rng.random(60) < 0.03) * rng.uniform(0, 0.6, 60)
        found = paired_difference(np.ones(60) - lost, np.ones(60), scores=True)
        hits += found.low <= -0.03 * 0.3 <= found.high
    assert hits >= 38
    before, after = (np.clip(rng.normal(0.5, 0.15, 200), 0, 1) for _ in range(2))
    bounded, student = (paired_difference(before, after, scores=scores) for scores in (True, False))
    assert bounded.high - bounded.low < 1.35 * (student.high - student.low)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"values": []}, "one length above 0"),
        ({"values": [1.0, 2.0], "groups": ["a"]}, "one length above 0"),
        ({"values": [1.0], "confidence": 1.0}, "confidence must be"),
        ({"values": [1.0], "n_boot": 0}, "n_boot must be"),
        ({"values": [1.0], "kind": "share"}, "kind must be"),
    ],
)
def test_options_out_of_range_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(kwargs.pop("values"), kwargs.pop("groups", None), **kwargs)
