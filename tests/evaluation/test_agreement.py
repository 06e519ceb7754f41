import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score

from care_lens.core import Verdict
from care_lens.evaluation import GenerationStore, StoredAnswer, cohen_kappa, fleiss_kappa, judge_agreement, judge_store

FAST = {"n_boot": 200}


def test_cohens_kappa_is_scikit_learns():
    generator = np.random.default_rng(0)
    first = generator.integers(0, 3, 90)
    second = np.where(generator.random(90) < 0.7, first, generator.integers(0, 3, 90))
    found = cohen_kappa(first.tolist(), second.tolist(), **FAST)
    assert found.estimate == pytest.approx(cohen_kappa_score(first, second))
    assert found.low < found.estimate < found.high


def test_fleiss_kappa_is_that_of_his_table():
    # Fleiss 1971's worked example: 10 subjects, 14 raters, 5 categories, kappa .210.
    counts = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    ratings = [[category for category, n in enumerate(row) for _ in range(n)] for row in counts]
    assert fleiss_kappa(ratings, **FAST).estimate == pytest.approx(0.210, abs=5e-4)


def test_perfect_agreement_of_few_answers_is_not_sure_and_agreement_by_habit_is_no_number():
    found = cohen_kappa(["a", "b"] * 5, ["a", "b"] * 5, **FAST)
    assert found.estimate == found.high == 1 and 0 < found.low < 0.7
    assert np.isnan(cohen_kappa(["a"] * 9, ["a"] * 9, **FAST)).all()
    assert cohen_kappa(["a", "b"] * 20, ["b", "a"] * 20, **FAST).estimate == -1


def test_answers_of_one_item_make_the_interval_wider():
    generator = np.random.default_rng(1)
    first = np.repeat(generator.integers(0, 2, 15), 6)
    second = np.where(np.repeat(generator.random(15) < 0.75, 6), first, 1 - first)
    groups = np.repeat(np.arange(15), 6)
    apart, together = (cohen_kappa(first.tolist(), second.tolist(), by, **FAST) for by in (None, groups.tolist()))
    assert apart.estimate == together.estimate
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_kappa_is_covered():
    """A population of which kappa is known: two judges with error rates .1 and .2 of answers of which .4 comply."""
    generator, inside = np.random.default_rng(2), 0
    p1, p2 = 0.4 * 0.9 + 0.6 * 0.1, 0.4 * 0.8 + 0.6 * 0.2
    same = 0.9 * 0.8 + 0.1 * 0.2
    chance = p1 * p2 + (1 - p1) * (1 - p2)
    true = (same - chance) / (1 - chance)
    for run in range(40):
        truth = generator.random(60) < 0.4
        first, second = (truth ^ (generator.random(60) < error) for error in (0.1, 0.2))
        found = cohen_kappa(first.tolist(), second.tolist(), n_boot=100, seed=run)
        inside += found.low <= true <= found.high
    assert inside >= 36


@pytest.fixture
def store():
    made = GenerationStore()
    texts = ["sure, red"] * 12 + ["sorry"] * 10 + ["sure, but sorry"] * 6 + [None, ""]
    made.add(
        [
            StoredAnswer("none", "ab"[i % 2], str(i), f"g{i // 2}", 0, "p", text, "" if text is not None else "OSError", 2, "s", "e", True)
            for i, text in enumerate(texts)
        ]
    )  # fmt: skip
    return made


def start(examples, texts):
    return [Verdict.REFUSED if text.startswith("sorry") else Verdict.COMPLIED for text in texts]


def anywhere(examples, texts):
    return [Verdict.REFUSED if "sorry" in text else Verdict.COMPLIED for text in texts]


def unsure(examples, texts):
    return [Verdict.MISSING if not text else Verdict.REFUSED if "sorry" in text else Verdict.COMPLIED for text in texts]


def test_several_judges_of_one_store(store):
    verdicts = pd.concat([judge_store(store, judge) for judge in (start, anywhere, unsure)])
    found = judge_agreement(verdicts, **FAST)
    pairs = found.set_index(["first", "second", "metric"])
    both = verdicts.pivot(index="id", columns="judge", values="verdict")
    kept = both[~(both == "missing").any(axis=1)]
    assert (pairs.loc[("start", "anywhere", "cohen-kappa"), ["n", "missing"]] == [29, 1]).all()
    assert (pairs.loc[("anywhere", "unsure", "agreement"), ["value", "n", "missing"]] == [1, 28, 2]).all()
    assert pairs.loc[("start", "unsure", "cohen-kappa"), "value"] == pytest.approx(
        cohen_kappa_score(kept["start"], kept["unsure"])
    )
    assert pairs.loc[("start", "anywhere", "agreement"), "value"] == pytest.approx(23 / 29)
    assert (pairs.loc[("all", "", "fleiss-kappa"), ["n", "missing"]] == [28, 2]).all()
    assert pairs.loc[("all", "", "fleiss-kappa"), "groups"] == 14
    mixed = judge_agreement(verdicts.sample(frac=1, random_state=0), **FAST).set_index(["first", "second", "metric"])
    swapped = [index if index in mixed.index else (index[1], index[0], index[2]) for index in pairs.index]
    assert mixed.loc[swapped, "value"].tolist() == pytest.approx(pairs["value"].tolist())
    by_channel = judge_agreement(verdicts, by_channel=True, **FAST)
    assert set(by_channel["channel"]) == {"a", "b"} and len(by_channel) == 2 * len(found)


def test_answers_whose_group_is_missing_are_their_own(store):
    verdicts = pd.concat([judge_store(store, judge) for judge in (start, anywhere)])
    told, blank = (judge_agreement(verdicts.assign(group=group), **FAST) for group in ("", float("nan")))
    pd.testing.assert_frame_equal(blank, told)
    assert set(blank["groups"]) == {29}


def test_judges_of_other_answers_cannot_agree(store):
    frames = [judge_store(store, start), judge_store(store, anywhere)]
    with pytest.raises(ValueError, match="two judges or more"):
        judge_agreement(frames[0])
    with pytest.raises(ValueError, match="same answers, got 1 that some did not"):
        judge_agreement(pd.concat([frames[0], frames[1].iloc[1:]]))
    with pytest.raises(ValueError, match="two of 'start'"):
        judge_agreement(pd.concat([*frames, frames[0].iloc[:1]]))
    with pytest.raises(ValueError, match="2 or more"):
        fleiss_kappa([["a"], ["b"]])
