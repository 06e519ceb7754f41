"""Intervals, stability and held-out energy of fits whose truth is known."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2
from subspace_rows import planted

from care_lens.subspace import (
    SafetySubspace,
    SubspaceError,
    SubspaceMismatchError,
    SubspaceUncertainty,
    TooFewRowsError,
)


@pytest.fixture(scope="module")
def rows():
    return planted(120, 100, 10, planted=2, spread=4.0)


@pytest.fixture(scope="module")
def measured(rows):
    fitted = SafetySubspace.fit(rows[0], rows[1], rank=2, site="blocks.3.hook_mlp_out", modality="visual")
    return fitted, fitted.uncertainty(rows[0], rows[1], n_boot=60, n_halves=12)


def test_the_frame_is_tidy_and_covers_every_direction(measured):
    fitted, result = measured
    frame = result.to_dataframe()
    counts = frame.groupby("metric").size().to_dict()
    assert counts == {"eigenvalue": 2, "angle_bootstrap": 2, "angle_halves": 2, "heldout_ratio": 3}
    assert (frame["ci_low"] <= frame["ci_high"]).all()
    assert set(frame["site"]) == {"blocks.3.hook_mlp_out"} and set(frame["layer"]) == {3}
    assert result.of("eigenvalue")["value"].tolist() == pytest.approx(fitted.eigenvalues.tolist())
    assert result.settings["items"] == [120, 100] and set(frame["seed"]) == {0}
    with pytest.raises(KeyError, match="metric must be one of"):
        result.of("luck")


def test_intervals_of_eigenvalues_cover_the_truth():
    """One planted direction of variance ratio 16, n far above d: a nominal 90 % interval, 60 studies.

    The bound is the binomial's: at a true coverage of 90 % fewer studies are covered once in 100,000 such tests, at one of 50 % as many once
    in 700. How wide the interval must be is what the next test says.
    """
    studies, least = 60, int(binom.ppf(1e-5, 60, 0.9))
    assert least == 42 and binom.sf(least - 1, studies, 0.5) < 1 / 700
    covered = 0
    for seed in range(studies):
        benign, malicious, _ = planted(120, 120, 3, planted=1, spread=4.0, seed=seed)
        fitted = SafetySubspace.fit(benign, malicious, rank=1, contrast="covariance", shrinkage=0.0)
        result = fitted.uncertainty(benign, malicious, n_boot=40, n_halves=1, confidence=0.9, seed=seed)
        first = result.of("eigenvalue").iloc[0]
        covered += first["ci_low"] <= 16 <= first["ci_high"]
    assert covered >= least


def test_the_eigenvalue_interval_is_about_the_theory_of_a_variance_ratio():
    """With d = 1 the eigenvalue is a ratio of variances, whose logarithm has standard error sqrt(2/n + 2/m)."""
    generator = torch.Generator().manual_seed(0)
    benign, malicious = (torch.randn(400, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    fitted = SafetySubspace.fit(benign, 3 * malicious, rank=1, contrast="covariance", shrinkage=None)
    first = fitted.uncertainty(benign, 3 * malicious, n_boot=300, n_halves=1).of("eigenvalue").iloc[0]
    width = np.log(first["ci_high"] / first["ci_low"])
    assert width == pytest.approx(2 * 1.96 * np.sqrt(2 / 400 + 2 / 400), rel=0.2)
    assert chi2.ppf(0.5, 400) / 400 == pytest.approx(1, abs=0.01)  # such ratios are centred on the truth
    assert abs(first["bias"]) < 0.2 * (first["ci_high"] - first["ci_low"])


def test_few_rows_inflate_eigenvalues_which_the_held_out_ratio_shows():
    benign, malicious, _ = planted(30, 30, 80, spread=1.0)
    fitted = SafetySubspace.fit(benign, malicious, rank=2, contrast="covariance", shrinkage=0.02)
    result = fitted.uncertainty(benign, malicious, n_boot=20, n_halves=5)
    assert float(fitted.eigenvalues[0]) > 5
    total = result.of("heldout_ratio").iloc[0]
    assert total["direction"] == 0
    assert total["ci_low"] < 1.5
    assert result.of("angle_halves").iloc[-1]["value"] > 1.2


def test_more_rows_are_more_stable():
    largest = []
    for count in (40, 400):
        benign, malicious, _ = planted(count, count, 12, planted=2, spread=6.0)
        fitted = SafetySubspace.fit(benign, malicious, rank=2)
        result = fitted.uncertainty(benign, malicious, n_boot=15, n_halves=15)
        largest.append([result.of(name).iloc[-1]["value"] for name in ("angle_bootstrap", "angle_halves")])
    assert largest[1][0] < 0.8 * largest[0][0]
    assert largest[1][1] < 0.75 * largest[0][1]


def test_groups_widen_intervals_of_copied_rows(rows):
    benign, malicious = (part.repeat_interleave(4, 0) for part in rows[:2])
    items = ([f"b{i // 4}" for i in range(len(benign))], [f"m{i // 4}" for i in range(len(malicious))])
    fitted = SafetySubspace.fit(benign, malicious, rank=1)
    widths = []
    for groups in (None, items):
        first = fitted.uncertainty(benign, malicious, groups=groups, n_boot=80, n_halves=1).of("eigenvalue").iloc[0]
        widths.append(first["ci_high"] - first["ci_low"])
    assert 1.4 < widths[1] / widths[0] < 2.9  # about sqrt(4)


def test_it_is_reproducible_saved_and_plotted(measured, rows, tmp_path):
    fitted, result = measured
    again = fitted.uncertainty(rows[0], rows[1], n_boot=60, n_halves=12)
    assert again.frame.equals(result.frame)
    assert not fitted.uncertainty(rows[0], rows[1], n_boot=60, n_halves=12, seed=1).frame.equals(result.frame)
    result.save(tmp_path, "sure")
    assert SubspaceUncertainty.load(tmp_path, "sure").frame.equals(result.frame)
    figure = result.plot()
    assert [trace.name for trace in figure.data] == ["fit", "held out", "1: as much as benign rows"]
    assert list(figure.data[0].y) == pytest.approx(fitted.eigenvalues.tolist())


def test_what_was_measured_goes_into_the_object(measured):
    fitted, result = measured
    told = fitted.with_uncertainty(result)
    assert "uncertainty" not in fitted.diagnostics
    assert told.diagnostics["uncertainty"]["heldout_ratio"][0] == result.of("heldout_ratio").iloc[0]["value"]
    assert "held out" in repr(told) and "radians" in told._repr_html_()


def test_what_cannot_be_measured_is_named(measured, rows):
    fitted, _ = measured
    benign, malicious, _ = rows
    with pytest.raises(SubspaceError, match="those of the fit, 120 benign and 100 malicious, got 119 and 100"):
        fitted.uncertainty(benign[1:], malicious)
    with pytest.raises(SubspaceMismatchError, match="got 9"):
        fitted.uncertainty(benign[:, :9], malicious[:, :9])
    with pytest.raises(SubspaceError, match="n_boot"):
        fitted.uncertainty(benign, malicious, n_boot=0)
    with pytest.raises(TooFewRowsError, match="8 items"):
        fitted.uncertainty(benign, malicious, groups=(["a"] * 120, ["b"] * 100))
