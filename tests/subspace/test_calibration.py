"""Scores and their conformal p-values."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from scipy.stats import beta, kstest
from subspace_rows import planted, unchecked

from care_lens.subspace import ConformalScores, NonFiniteError, SafetySubspace, SubspaceError, TooFewRowsError


def test_mahalanobis_is_scipys_within_the_subspace():
    benign, malicious, _ = planted(100, 80, 8)
    subspace = SafetySubspace.fit(benign, malicious, rank=8, shrinkage=None)
    inverse = torch.linalg.inv(torch.cov(benign.T, correction=0)).numpy()
    expected = [mahalanobis(row, benign.mean(0).numpy(), inverse) for row in malicious.numpy()]
    np.testing.assert_allclose(subspace.mahalanobis(malicious).numpy(), expected, rtol=1e-4)
    # Of lower rank: of all points with the same coordinates, the nearest; and it is the root of the energy.
    cut = subspace.truncate(3)
    torch.testing.assert_close(cut.mahalanobis(malicious).square(), cut.energy(malicious))
    on_it = malicious - (malicious - cut.mean_benign) @ cut.removal().matrix().double().T
    nearest = [mahalanobis(row, benign.mean(0).numpy(), inverse) for row in on_it.numpy()]
    np.testing.assert_allclose(cut.mahalanobis(malicious).numpy(), nearest, rtol=1e-3)
    assert (cut.mahalanobis(malicious).numpy() <= np.array(expected) * 1.0001).all()


def test_the_identity_metric_has_no_mahalanobis_distance():
    benign, malicious, _ = planted(40, 40, 6)
    subspace = SafetySubspace.fit(benign, malicious, rank=1, metric="identity")
    with pytest.raises(SubspaceError, match="identity"):
        subspace.mahalanobis(malicious)
    assert subspace.calibrate(benign, score="energy").count == 40
    with unchecked(), pytest.raises(SubspaceError, match="'guess'"):
        subspace.score(malicious, "guess")


def test_p_values_by_counting():
    calibrated = ConformalScores.from_scores(torch.tensor([3.0, 1.0, 2.0, 2.0]))
    found = calibrated.p_values(torch.tensor([[0.0, 1.0, 2.0], [2.5, 9.0, float("nan")]]))
    torch.testing.assert_close(
        found, torch.tensor([[1.0, 1.0, 0.8], [0.4, 0.2, float("nan")]], dtype=torch.float64), equal_nan=True
    )


def test_items_count_once_with_their_largest_score():
    calibrated = ConformalScores.from_scores(torch.tensor([3.0, 1.0, 2.0, 5.0]), groups=["a", "a", "b", "b"])
    assert calibrated.scores.tolist() == [3.0, 5.0]


def test_p_values_of_new_benign_rows_are_uniform_and_those_of_the_fit_are_not():
    """n = 20 rows of width 30: the fit makes its own rows look usual, so that new ones look unusual against them."""
    held_out, reused = [], []
    for seed in range(150):
        rows = torch.randn(80, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        subspace = SafetySubspace.fit(rows[:20], 3 * rows[20:40], rank=3, shrinkage=0.05)
        new = subspace.score(rows[40:41])
        held_out.append(float(subspace.calibrate(rows[41:80]).p_values(new)))
        reused.append(float(subspace.calibrate(rows[:20]).p_values(new)))
    ties_broken = np.array(held_out) - np.random.default_rng(0).uniform(0, 1 / 40, 150)
    assert kstest(ties_broken, "uniform").pvalue > 0.01
    assert np.mean(np.array(reused) <= 0.1) > 0.2


def test_the_threshold_is_the_p_values():
    scores = torch.randn(99, generator=torch.Generator().manual_seed(0))
    calibrated = ConformalScores.from_scores(scores)
    for epsilon in (0.01, 0.05, 0.2):
        at = calibrated.threshold(epsilon)
        above, below = torch.tensor(at + 1e-9, dtype=torch.float64), torch.tensor(at - 1e-9, dtype=torch.float64)
        assert float(calibrated.p_values(above)) <= epsilon + 1e-12 < float(calibrated.p_values(below))
    # The share of benign scores above it is Beta(n + 1 - k, k) over calibration sets, of mean epsilon.
    assert beta.mean(100 - 95, 95) == pytest.approx(0.05)
    with pytest.raises(TooFewRowsError, match="needs 199 calibration items or more, got 99"):
        calibrated.threshold(0.005)
    with pytest.raises(SubspaceError, match="epsilon must be"):
        calibrated.threshold(1.0)


def test_what_cannot_calibrate_is_named():
    with pytest.raises(TooFewRowsError, match="got none"):
        ConformalScores.from_scores(torch.zeros(0))
    with pytest.raises(NonFiniteError, match="finite"):
        ConformalScores.from_scores(torch.tensor([1.0, float("nan")]))
    with pytest.raises(SubspaceError, match="as long as"):
        ConformalScores.from_scores(torch.zeros(2), groups=["a"])
