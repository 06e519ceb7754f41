import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from care_lens.core import cluster_bootstrap, clustered_rate
from care_lens.evaluation import (
    TooManyMissingError,
    compare,
    interval,
    paired_difference,
    rank,
    summarise,
    verdict_trials,
)

NAN = float("nan")


def trials(values, *, groups=None, defence="none", channel="plain", metric="asr", judge="j", seed=0) -> pd.DataFrame:
    n = len(values)
    return pd.DataFrame(
        {
            "defence": defence,
            "channel": channel,
            "metric": metric,
            "judge": judge,
            "seed": seed,
            "id": [f"i{i}" for i in range(n)],
            "group": groups if groups is not None else [f"g{i}" for i in range(n)],
            "value": np.array(values, dtype=float),
        }
    )


@pytest.mark.parametrize(("successes", "n"), [(0, 72), (3, 44), (44, 44), (1, 1)])
def test_one_trial_a_group_gives_the_exact_interval(successes, n):
    row = summarise(trials([1.0] * successes + [0.0] * (n - successes))).iloc[0]
    exact = binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx(
        (successes / n, exact.low, exact.high), abs=1e-9
    )
    assert (row["interval"], row["n"], row["groups"], row["missing"]) == ("clopper-pearson", n, n, 0)


def test_shared_groups_have_fewer_effective_trials():
    generator = np.random.default_rng(0)
    groups = [f"g{i}" for i in range(20) for _ in range(5)]
    values = np.repeat(generator.integers(0, 2, 20), 5).astype(float)
    row = summarise(trials(values, groups=groups), n_boot=500, seed=3).iloc[0]
    assert (row["value"], row["ci_low"], row["ci_high"]) == clustered_rate(values, groups)
    assert (row["interval"], row["groups"], row["n"]) == ("korn-graubard", 20, 100)
    independent = binomtest(int(values.sum()), 100).proportion_ci(0.95)
    assert row["ci_high"] - row["ci_low"] > 1.5 * (independent.high - independent.low)


def test_shared_groups_that_all_agree_count_as_one_trial_each():
    row = summarise(trials([0.0] * 60, groups=[f"g{i % 20}" for i in range(60)])).iloc[0]
    assert row["interval"] == "korn-graubard"
    assert row["ci_high"] == pytest.approx(binomtest(0, 20).proportion_ci(0.95).high)
    assert row["ci_high"] > binomtest(0, 60).proportion_ci(0.95).high


def test_trials_without_a_group_are_their_own():
    assert summarise(trials([0.0, 1.0, 1.0], groups=[""] * 3)).iloc[0]["interval"] == "clopper-pearson"


@pytest.mark.parametrize("blank", [NAN, None, pd.NA])
def test_a_group_that_is_missing_is_none(blank):
    """As a frame that was written to a CSV file and read again has it."""
    values, groups = [0.0, 1.0] * 20, ["g"] * 2 + [blank] * 38
    both = pd.concat([trials(values, groups=groups), trials([1.0] * 40, groups=groups, defence="d")])
    told = both.assign(group=both["group"].astype(object).where(both["group"].notna(), ""))
    pd.testing.assert_frame_equal(summarise(both), summarise(told))
    assert summarise(both).iloc[0]["groups"] == 39
    assert summarise(trials(values, groups=[blank] * 40)).iloc[0]["interval"] == "clopper-pearson"
    for compared in (
        lambda frame: paired_difference(frame, "none", "d", metric="asr"),
        lambda frame: compare(frame, against="d"),
    ):
        pd.testing.assert_frame_equal(compared(both), compared(told))


def test_a_frame_survives_a_csv_file(tmp_path):
    both = pd.concat(
        [
            trials([0.0, 1.0] * 9, groups=[""] * 18, judge=""),
            trials([1.0] * 18, groups=[""] * 18, judge="", defence="d"),
        ]
    )
    both.to_csv(tmp_path / "t.csv", index=False)
    again = pd.read_csv(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(summarise(again), summarise(both))
    pd.testing.assert_frame_equal(rank(again), rank(both))


def test_groups_may_be_numbers():
    assert (
        summarise(trials([0.0, 1.0, 1.0], groups=[0, 0, 1])).iloc[0]["groups"] == 2
    )  # 0 is a group, not the lack of one


def test_a_rate_of_few_clustered_trials_is_covered():
    """24 items of 3 trials at a rate of .05, intraclass correlation .5: resampled groups cover 76 to 87 % of it."""
    rng, hits = np.random.default_rng(0), 0
    groups = [f"g{i // 3}" for i in range(72)]
    for _ in range(300):
        rates = np.repeat(rng.beta(0.05, 0.95, 24), 3)
        found = interval((rng.random(72) < rates).astype(float), groups, rate=True)
        hits += found["ci_low"] <= 0.05 <= found["ci_high"]
    assert hits / 300 >= 0.93


def test_numbers_are_studentised():
    values = np.random.default_rng(1).exponential(size=40)
    row = summarise(trials(values, metric="kl")).iloc[0]
    assert row["interval"] == "studentised"
    assert row["ci_low"] < values.mean() < row["ci_high"]
    assert interval(np.zeros(3), ["a", "b", "c"], rate=False)["value"] == 0


def test_missing_trials_are_counted_and_left_out():
    row = summarise(trials([1.0] * 50 + [0.0] * 49 + [NAN])).iloc[0]
    assert (row["n"], row["missing"]) == (99, 1)
    assert row["value"] == pytest.approx(50 / 99)
    exact = binomtest(50, 99).proportion_ci(0.95)
    assert row["ci_high"] == pytest.approx(exact.high)


def test_too_many_missing_trials_in_a_cell_are_an_error():
    fine, bad = trials([0.0] * 98 + [NAN] * 2), trials([0.0] * 97 + [NAN] * 3, channel="shown")
    assert summarise(fine).iloc[0]["missing"] == 2
    with pytest.raises(TooManyMissingError, match="3 of 100 for defence 'none', channel 'shown'"):
        summarise(pd.concat([fine, bad]))
    assert list(summarise(pd.concat([fine, bad]), max_missing=0.05)["missing"]) == [2, 3]
    with pytest.raises(TooManyMissingError):
        summarise(trials([NAN]), max_missing=1)
    with pytest.raises(ValueError, match="at least one"):
        summarise(fine[:0])


def test_as_many_missing_trials_as_are_allowed_are_allowed():
    assert 0.29 * 100 < 29
    assert summarise(trials([0.0] * 71 + [NAN] * 29), max_missing=0.29).iloc[0]["missing"] == 29
    with pytest.raises(TooManyMissingError, match="30 of 100"):
        summarise(trials([0.0] * 70 + [NAN] * 30), max_missing=0.29)


def test_what_is_missing_of_a_grader_may_be_its_truth():
    with pytest.raises(TooManyMissingError, match="have no truth or reference"):
        summarise(trials([NAN] * 3 + [1.0], metric="score"))
    with pytest.raises(TooManyMissingError) as found:
        summarise(trials([NAN] * 3 + [1.0]))
    assert "truth" not in str(found.value) and "a rerun with the same store" in str(found.value)


def test_each_cell_has_its_own_row():
    frame = summarise(
        pd.concat(
            [
                trials([1.0, 0.0]),
                trials([1.0, 1.0], judge="k"),
                trials([0.0], seed=1),
                trials([0.0], defence="d"),
            ]
        )
    )
    assert list(zip(frame["defence"], frame["judge"], frame["seed"], frame["value"], strict=True)) == [
        ("none", "j", 0, 0.5),
        ("none", "k", 0, 1.0),
        ("none", "j", 1, 0.0),
        ("d", "j", 0, 0.0),
    ]


def test_verdicts_become_trials():
    verdicts = pd.DataFrame(
        {
            "defence": "none",
            "channel": ["plain"] * 4 + ["benign"] * 2,
            "id": list("abcdef"),
            "group": "",
            "seed": 0,
            "harmful": [True] * 4 + [False] * 2,
            "judge": "j",
            "verdict": ["complied", "refused", "other", "missing", "complied", "refused"],
        }
    )
    found = verdict_trials(verdicts)
    by_metric = {
        (channel, metric): found[(found["channel"] == channel) & (found["metric"] == metric)]["value"].tolist()
        for channel, metric in {(row.channel, row.metric) for row in found.itertuples()}
    }
    assert set(by_metric) == {
        ("plain", "asr"),
        ("plain", "refusal"),
        ("benign", "accuracy"),
        ("benign", "refusal"),
    }
    np.testing.assert_equal(by_metric["plain", "asr"], [1.0, 0.0, 0.0, NAN])
    np.testing.assert_equal(by_metric["plain", "refusal"], [0.0, 1.0, 0.0, NAN])
    assert by_metric["benign", "accuracy"] == [1.0, 0.0]
    assert by_metric["benign", "refusal"] == [0.0, 1.0]


def test_difference_is_paired_by_example_and_clustered_by_group():
    generator = np.random.default_rng(0)
    groups = [f"g{i // 4}" for i in range(200)]
    before = generator.integers(0, 2, 200).astype(float)
    after = before * (generator.random(200) > 0.2)
    both = pd.concat(
        [
            trials(before, groups=groups),
            trials(after, groups=groups, defence="d").sample(frac=1, random_state=0),
        ]
    )
    row = paired_difference(both, "none", "d", metric="asr").iloc[0]
    estimate, low, high = cluster_bootstrap(before - after, groups, kind="differences")
    assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx((estimate, low, high))
    assert row["value"] == pytest.approx(before.mean() - after.mean())
    assert (row["n"], row["missing"], row["interval"]) == (200, 0, "paired-rates")
    unpaired = np.sqrt(before.var() / 200 + after.var() / 200) * 3.92
    assert high - low < unpaired
    same = paired_difference(pd.concat([both[:200], both[:200].assign(defence="e")]), "none", "e", metric="asr").iloc[0]
    assert same["ci_low"] < 0 == same["value"] < same["ci_high"]


def test_no_difference_of_scores_is_a_point():
    same = pd.concat([trials([0.3, 1.0, 0.6, 0.0] * 2, metric="score", defence=name) for name in ("none", "d")])
    row = paired_difference(same, "none", "d", metric="score").iloc[0]
    assert (row["ci_low"], row["value"], row["ci_high"]) == pytest.approx(
        (-1 + 0.025 ** (1 / 8), 0, 1 - 0.025 ** (1 / 8))
    )
    other = same.assign(value=same["value"].where(same["defence"] == "none", 0.5))
    assert paired_difference(other, "none", "d", metric="score").iloc[0]["interval"] == "bounded-mean"
    kl = paired_difference(same.assign(metric="kl"), "none", "d", metric="kl").iloc[0]
    assert (kl["ci_low"], kl["ci_high"], kl["interval"]) == (0, 0, "studentised")


def test_difference_leaves_out_what_either_misses():
    first, second = trials([1.0] * 99 + [NAN]), trials([NAN] + [0.0] * 99, defence="d")
    row = paired_difference(pd.concat([first, second]), "none", "d", metric="asr").iloc[0]
    assert (row["n"], row["missing"], row["value"]) == (98, 2, 1.0)
    with pytest.raises(TooManyMissingError):
        paired_difference(pd.concat([first, second]), "none", "d", metric="asr", max_missing=0.01)


def test_difference_needs_the_same_examples():
    both = pd.concat([trials([1.0, 0.0]), trials([1.0], defence="d")])
    with pytest.raises(ValueError, match="same examples"):
        paired_difference(both, "none", "d", metric="asr")
    with pytest.raises(ValueError, match="'e' of"):
        paired_difference(both, "none", "e", metric="asr")


def test_no_interval_of_a_divergence_reaches_below_0():
    few = [0.0] * 9 + [0.4]
    row = summarise(trials(few, metric="kl")).iloc[0]
    assert (
        interval(np.array(few), [str(i) for i in range(10)], rate=False)["ci_low"]
        < 0
        == row.ci_low
        < row.value
        < row.ci_high
    )
