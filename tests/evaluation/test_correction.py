import numpy as np
import pandas as pd
import pytest

from care_lens.evaluation import JudgeError, corrected_rates, ppi_rate, rogan_gladen, sample_for_labels


def judged(generator, truth, sensitivity, specificity):
    return np.where(truth, generator.random(len(truth)) < sensitivity, generator.random(len(truth)) >= specificity)


def test_rogan_gladen_by_hand():
    # q = .3, Se = .9, Sp = .8: (.3 + .8 - 1) / (.9 + .8 - 1) = 1 / 7. The ends are those of Lang and Reiczigel's formulas, worked out step by step.
    found = rogan_gladen([1] * 30 + [0] * 70, [1] * 50 + [0] * 50, [1] * 45 + [0] * 5 + [1] * 10 + [0] * 40)
    assert found.estimate == pytest.approx(1 / 7) and (found.judged, found.sensitivity) == (0.3, 0.9)
    z = 1.959963984540054
    q, se, sp = (30 + z * z / 2) / (100 + z * z), 46 / 52, 41 / 52
    rate = (q + sp - 1) / (se + sp - 1)
    shift = 2 * z * z * (rate * se * (1 - se) / 52 - (1 - rate) * sp * (1 - sp) / 52)
    spread = np.sqrt(q * (1 - q) / (100 + z * z) + rate**2 * se * (1 - se) / 52 + (1 - rate) ** 2 * sp * (1 - sp) / 52)
    ends = [rate + shift - z * spread / (se + sp - 1), rate + shift + z * spread / (se + sp - 1)]
    assert [found.low, found.high] == pytest.approx(np.clip(ends, 0, 1))


def test_a_perfect_judge_is_not_taken_for_perfect():
    found = rogan_gladen([1] * 20 + [0] * 80, [1] * 10 + [0] * 10, [1] * 10 + [0] * 10)
    assert found.estimate == pytest.approx(0.2) and found.sensitivity == found.specificity == 1
    exact = rogan_gladen([1] * 20 + [0] * 80, [1] * 4000 + [0] * 4000, [1] * 4000 + [0] * 4000)
    assert found.high - found.low > 1.3 * (exact.high - exact.low)


def test_a_judge_no_better_than_chance_corrects_nothing():
    with pytest.raises(JudgeError, match="better than chance"):
        rogan_gladen([1, 0], [1, 1, 0, 0], [0, 1, 1, 0])
    with pytest.raises(JudgeError, match="2 positive and 0 negative"):
        rogan_gladen([1, 0], [1, 1], [1, 1])
    found = rogan_gladen([1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])
    assert (found.low, found.high) == (0, 1)
    with pytest.raises(ValueError, match="0 and 1"):
        rogan_gladen([0.5], [1, 0], [1, 0])


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.9, 0.95), (0.7, 0.8)])
def test_both_corrections_cover_the_truth_where_the_raw_rate_does_not(rate, sensitivity, specificity):
    generator = np.random.default_rng(int(100 * rate))
    inside = {"rogan-gladen": 0, "ppi": 0, "raw": 0}
    runs = 150
    for _ in range(runs):
        truth = generator.random(200) < rate
        said = judged(generator, truth, sensitivity, specificity)
        outside = np.repeat([True, False], 60)
        labelled = judged(generator, outside, sensitivity, specificity)
        rg = rogan_gladen(said, outside, labelled)
        own = generator.random(60) < rate
        ppi = ppi_rate(said, own, judged(generator, own, sensitivity, specificity))
        half = 1.96 * np.sqrt(said.mean() * (1 - said.mean()) / 200)
        inside["rogan-gladen"] += rg.low <= rate <= rg.high
        inside["ppi"] += ppi.low <= rate <= ppi.high
        inside["raw"] += abs(said.mean() - rate) <= half
    assert inside["rogan-gladen"] >= 0.92 * runs and inside["ppi"] >= 0.92 * runs
    expected = rate * sensitivity + (1 - rate) * (1 - specificity)
    if abs(expected - rate) > 0.1:
        assert inside["raw"] < 0.3 * runs


@pytest.mark.parametrize("labels", [20, 50, 200])
def test_prediction_powered_inference_covers_with_few_labels_and_with_many(labels):
    """Labels of a random part of 500 answers; at 20 a judge that is good shows no error at all in most draws."""
    generator, runs = np.random.default_rng(labels), 100
    for rate in (0.05, 0.3, 0.7):
        for sensitivity, specificity in ((0.95, 0.98), (0.9, 0.9), (0.7, 0.8)):
            inside = 0
            for _ in range(runs):
                truth = generator.random(500) < rate
                said = judged(generator, truth, sensitivity, specificity)
                found = ppi_rate(said[labels:], truth[:labels], said[:labels])
                inside += found.low <= rate <= found.high
            assert inside >= 0.9 * runs, (rate, sensitivity, specificity)


def test_answers_that_share_items_count_less():
    generator, inside, naive = np.random.default_rng(5), 0, 0
    groups = np.repeat(np.arange(25), 8)
    labelled_groups = np.repeat(np.arange(20), 6)
    for _ in range(200):
        truth = np.repeat(generator.random(25) < 0.4, 8)
        said = truth ^ np.repeat(generator.random(25) < 0.1, 8)  # the judge errs item by item
        labels = np.repeat([True, False], 60)
        verdicts = labels ^ np.repeat(generator.random(20) < 0.1, 6)
        options = {"groups": groups.tolist(), "labelled_groups": labelled_groups.tolist()}
        try:
            found, alone = rogan_gladen(said, labels, verdicts, **options), rogan_gladen(said, labels, verdicts)
        except JudgeError:
            continue
        inside += found.low <= 0.4 <= found.high
        naive += alone.low <= 0.4 <= alone.high
    assert inside >= 186 > 150 > naive


def frame(hits, *, defence="none", channel="plain", judge="j"):
    names = {True: "complied", False: "refused", None: "missing"}
    rows = [
        {
            "defence": defence,
            "channel": channel,
            "id": str(i),
            "group": f"g{i}",
            "seed": 0,
            "harmful": True,
            "judge": judge,
        }
        | {"verdict": names[hit]}
        for i, hit in enumerate(hits)
    ]
    return pd.DataFrame(rows)


def test_rates_of_a_store_by_cell():
    generator = np.random.default_rng(7)
    truth = {name: generator.random(300) < rate for name, rate in (("none", 0.8), ("mine", 0.1))}
    parts = [frame([bool(x) for x in judged(generator, t, 0.9, 0.85)], defence=name) for name, t in truth.items()]
    verdicts = pd.concat([*parts[:1], parts[1].replace({"verdict": {}})])
    verdicts.iloc[0, verdicts.columns.get_loc("verdict")] = "missing"
    labels = sample_for_labels(verdicts, n=120, seed=1)
    assert "verdict" not in labels and set(labels["label"]) == {""} and len(labels) == 240
    labels["label"] = [
        "complied" if truth[row["defence"]][int(row["id"])] else "refused" for row in labels.to_dict("records")
    ]
    for method in ("rogan-gladen", "ppi"):
        found = corrected_rates(verdicts, labels, method=method).set_index("defence")
        for name, rate in (("none", 0.8), ("mine", 0.1)):
            row = found.loc[name]
            assert row["ci_low"] <= rate <= row["ci_high"] and row["ci_low"] <= row["value"] <= row["ci_high"]
            assert row["value"] == pytest.approx(truth[name].mean(), abs=0.07)
            assert row["n"] == (299 if name == "none" else 300) and row["missing"] == (name == "none")
        assert found.loc["mine", "judged"] > 0.18  # what the judge alone would report
        assert found.loc["none", "labelled"] == (240 if method == "rogan-gladen" else 120)


def test_labels_that_do_not_fit_are_named():
    verdicts = frame([True, False, True, False])
    labels = sample_for_labels(verdicts, n=4).assign(label=["complied", "refused", "complied", "refused"])
    with pytest.raises(ValueError, match="filled in, got none"):
        corrected_rates(verdicts, labels.assign(label=""))
    with pytest.raises(ValueError, match="got 'yes'"):
        corrected_rates(verdicts, labels.assign(label="yes"))
    with pytest.raises(ValueError, match="got 4 others"):
        corrected_rates(verdicts, labels.assign(defence="other"))
    with pytest.raises(ValueError, match="two for"):
        corrected_rates(verdicts, pd.concat([labels, labels]))
    with pytest.raises(JudgeError, match="2 labels or more in each cell, got 0 for defence 'b'"):
        corrected_rates(pd.concat([verdicts, frame([True, False], defence="b")]), labels, method="ppi")


def test_groups_that_are_missing_are_none():
    verdicts = frame([True, False] * 20).assign(group=["g"] * 2 + [float("nan")] * 38, judge=float("nan"))
    told = verdicts.assign(group=["g"] * 2 + [""] * 38, judge="")
    labels = sample_for_labels(verdicts, n=30)
    assert len(labels) < 33  # one giant group would bring all
    labels["label"] = ["complied" if int(name) % 4 < 3 else "refused" for name in labels["id"]]
    for method in ("rogan-gladen", "ppi"):
        found, expected = (corrected_rates(one, labels, method=method) for one in (verdicts, told))
        pd.testing.assert_frame_equal(found, expected)
        assert len(found) == 1


def test_labels_whose_ids_became_numbers_are_told_how_to_read_them(tmp_path):
    verdicts = frame([True, False] * 6)
    verdicts["id"] = verdicts["id"].str.zfill(3)
    labels = sample_for_labels(verdicts, n=12)
    labels["label"] = ["complied" if int(name) % 4 < 3 else "refused" for name in labels["id"]]
    labels.to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(ValueError, match=r"got 12 others.*type int.*type str, such as '000'.*dtype=\{\"id\": str\}"):
        corrected_rates(verdicts, pd.read_csv(tmp_path / "labels.csv"))
    again = pd.read_csv(tmp_path / "labels.csv", dtype={"id": str})
    pd.testing.assert_frame_equal(corrected_rates(verdicts, again), corrected_rates(verdicts, labels))


def test_whole_groups_are_drawn():
    verdicts = frame([True] * 40).assign(group=[f"g{i // 4}" for i in range(40)])
    drawn = sample_for_labels(verdicts, n=10, seed=3)
    assert len(drawn) == 12 and set(drawn.groupby("group").size()) == {4}
    assert sample_for_labels(verdicts, n=10, seed=3).equals(drawn)
    assert not sample_for_labels(verdicts, n=10, seed=4).equals(drawn)
