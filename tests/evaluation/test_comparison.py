import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from care_lens.evaluation import DefenceTable, compare, rank


def trials(hits, *, defence, channel="plain", metric="asr", groups=None):
    return pd.DataFrame(
        {
            "defence": defence,
            "channel": channel,
            "metric": metric,
            "judge": "j",
            "seed": 0,
            "id": [str(i) for i in range(len(hits))],
            "group": groups if groups is not None else [f"g{i}" for i in range(len(hits))],
            "value": np.array(hits, dtype=float),
        }
    )


@pytest.fixture
def table():
    hits = {"none": [1] * 36 + [0] * 4, "weak": [1] * 33 + [0] * 7, "strong": [1] * 3 + [0] * 37}
    parts = [trials(values, defence=name) for name, values in hits.items()]
    parts += [trials(values[::-1], defence=name, channel="shown") for name, values in hits.items()]
    return DefenceTable.from_trials(pd.concat(parts), settings={}, n_boot=100)


def test_defences_are_compared_with_one_on_the_same_trials(table):
    found = compare(table, against="none")
    assert list(found["first"]) == ["weak", "weak", "strong", "strong"] and set(found["second"]) == {"none"}
    weak, strong = found.iloc[0], found.iloc[2]
    assert (weak["up"], weak["down"], weak["test"]) == (0, 3, "mcnemar-exact")
    assert weak["p"] == pytest.approx(binomtest(0, 3).pvalue) and weak["value"] == pytest.approx(-3 / 40)
    assert strong["p"] == pytest.approx(binomtest(0, 33).pvalue)
    # Holm over the four rows: the two smallest times 4 and 3, the others at most 1.
    ordered = np.sort(found["p"])
    assert sorted(found["p_holm"]) == pytest.approx(
        np.minimum(np.maximum.accumulate(ordered * [4, 3, 2, 1]), 1.0).tolist()
    )
    alone = compare(table, against="none", channels=["plain"], defences=["strong"])
    assert len(alone) == 1 and alone.iloc[0]["p_holm"] == alone.iloc[0]["p"]
    assert list(found.columns)[-3:] == ["p_holm", "judge", "seed"]


def test_trials_of_one_item_are_one_observation():
    groups = [f"g{i // 10}" for i in range(40)]
    parts = [trials([1] * 40, defence="none", groups=groups), trials([0] * 40, defence="mine", groups=groups)]
    found = compare(pd.concat(parts), against="none").iloc[0]
    assert found["test"] == "sign-flip-exact" and found["p"] == pytest.approx(2 / 2**4)
    assert (found["up"], found["down"]) == (0, 4)


def test_missing_trials_are_left_out_of_pairs():
    one, other = trials([1, 1, 0, np.nan], defence="none"), trials([0, np.nan, 0, 1], defence="mine")
    found = compare(pd.concat([one, other]), against="none", max_missing=0.5).iloc[0]
    assert (found["n"], found["missing"], found["down"]) == (2, 2, 1)


def test_ranks_that_cannot_be_told_apart_are_shared(table):
    found = rank(table).groupby("channel").get_group("plain").set_index("defence")
    assert list(found.index) == ["strong", "weak", "none"]
    assert found.loc["strong", ["rank_best", "rank_worst"]].tolist() == [1, 1]
    assert found.loc["weak", ["rank_best", "rank_worst"]].tolist() == [2, 3]
    assert found.loc["none", ["rank_best", "rank_worst"]].tolist() == [2, 3]
    other = rank(table.trials.assign(metric="accuracy"), metric="accuracy").groupby("channel").get_group("plain")
    assert list(other["defence"]) == ["none", "weak", "strong"] and other.iloc[-1]["rank_best"] == 3


def test_ranks_hold_together():
    """Five defences that are alike: some pair is told apart in at most about 5 % of tables."""
    generator, wrong = np.random.default_rng(0), 0
    for _ in range(16):
        parts = [trials(generator.integers(0, 2, 40), defence=f"d{i}") for i in range(5)]
        found = rank(pd.concat(parts))
        wrong += not ((found["rank_best"] == 1) & (found["rank_worst"] == 5)).all()
    assert wrong <= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: compare(t, against="nobody"), r"against must be .* got 'nobody'"),
        (lambda t: compare(t, against="none", metric="kl"), "metric must be one of"),
        (lambda t: compare(t, against="none", channels=["x"]), r"got \['x'\]"),
        (lambda t: compare(t, against="none", channels="plain"), "got the text"),
        (lambda t: compare(t, against="none", defences=["none"]), "beside 'none'"),
        (lambda t: rank(t.trials.assign(metric="refusal"), metric="refusal"), "must be said for 'refusal'"),
        (lambda t: rank(t, significance=0.0), "significance"),
        (lambda t: compare(pd.concat([t.trials, t.trials]), against="none"), "several of one example"),
    ],
)
def test_what_cannot_be_compared_is_named(table, call, message):
    with pytest.raises(ValueError, match=message):
        call(table)
