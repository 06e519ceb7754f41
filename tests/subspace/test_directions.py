"""Subspaces along given directions, against scikit-learn and formulas by hand."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from care_lens.subspace import (
    Moments,
    RankError,
    SafetySubspace,
    SubspaceError,
    WidthError,
    classifier_direction,
    shrink,
    subspace_along,
)


def classes(*, n=120, d=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    scale = torch.logspace(-1, 1, d)
    benign = torch.randn(n, d, generator=generator) @ mix * scale
    malicious = torch.randn(n // 2, d, generator=generator) @ mix * scale + 2 * torch.randn(d, generator=generator)
    return benign, malicious


def test_the_direction_orders_rows_as_scikit_learn_does():
    benign, malicious = classes()
    rows = torch.cat([benign, malicious])
    labels = np.repeat([0, 1], [len(benign), len(malicious)])
    oracle = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000)).fit(
        rows.double().numpy(), labels
    )
    scores = oracle.decision_function(rows.double().numpy())
    ours = (rows.double() @ classifier_direction(benign, malicious).double()).numpy()
    # The same up to the intercept, which a gate's threshold takes the place of.
    np.testing.assert_allclose(ours - ours.mean(), scores - scores.mean(), rtol=1e-4, atol=1e-4)
    assert ours[labels == 1].mean() > ours[labels == 0].mean()


def test_the_direction_does_not_depend_on_units_of_the_coordinates():
    benign, malicious = classes()
    units = torch.logspace(-2, 2, 12)
    one, other = classifier_direction(benign, malicious), classifier_direction(benign * units, malicious * units)
    torch.testing.assert_close(other * units, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("projection", ["oblique", "orthogonal"])
def test_one_direction_is_read_and_its_pattern_written(projection):
    benign, malicious = classes()
    direction = classifier_direction(benign, malicious)
    subspace = subspace_along(direction, benign, malicious, projection=projection, site="blocks.3.hook_resid_post")
    covariance = shrink(Moments.from_rows(benign), "ledoit-wolf").times(torch.eye(12, dtype=torch.float64)).numpy()
    w = direction.double().numpy()
    np.testing.assert_allclose(subspace.read[:, 0].numpy(), w / np.sqrt(w @ covariance @ w), rtol=1e-4)
    if projection == "oblique":  # Haufe et al. 2014, equation 6, at unit benign variance of the score
        projector = np.outer(covariance @ w, w) / (w @ covariance @ w)
    else:
        projector = np.outer(w, w) / (w @ w)
    np.testing.assert_allclose(subspace.projector().numpy(), projector, rtol=1e-3, atol=1e-4 * abs(projector).max())
    second = shrink(Moments.from_rows(malicious), "ledoit-wolf").times(torch.eye(12, dtype=torch.float64)).numpy()
    delta = (malicious.double().mean(0) - benign.double().mean(0)).numpy()
    energy = (w @ second @ w + (delta @ w) ** 2) / (w @ covariance @ w)
    assert float(subspace.eigenvalues[0]) == pytest.approx(energy, rel=1e-4)
    assert float(subspace.coordinates(malicious).mean()) > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 12))
def test_within_their_span_the_pencil_is_solved(seed, k):
    benign, malicious = classes(seed=seed)
    columns = torch.randn(12, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    subspace = subspace_along(columns, benign, malicious, shrinkage=0.1)
    identity = torch.eye(12, dtype=torch.float64)
    benign_moments, malicious_moments = Moments.from_rows(benign), Moments.from_rows(malicious)
    metric = shrink(benign_moments, 0.1, floor=True).times(identity)
    delta = malicious_moments.mean - benign_moments.mean
    numerator = shrink(malicious_moments, 0.1).times(identity) + torch.outer(delta, delta)
    values = scipy.linalg.eigh(
        (columns.T @ numerator @ columns).numpy(), (columns.T @ metric @ columns).numpy(), eigvals_only=True
    )
    np.testing.assert_allclose(subspace.eigenvalues.double().numpy(), values[::-1], rtol=1e-3)
    read = subspace.read.double()
    torch.testing.assert_close(read.T @ metric @ read, torch.eye(k, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert (
        torch.linalg.matrix_rank(torch.cat([read / read.norm(dim=0), columns / columns.norm(dim=0)], 1), rtol=1e-4) == k
    )
    projector = subspace.projector().double()
    torch.testing.assert_close(projector @ projector, projector, rtol=1e-3, atol=1e-3)


def test_all_directions_are_the_fit_of_full_rank():
    benign, malicious = classes()
    whole = subspace_along(torch.eye(12), benign, malicious)
    fit = SafetySubspace.fit(benign, malicious, rank=12)
    torch.testing.assert_close(whole.eigenvalues, fit.eigenvalues, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(whole.read.abs(), fit.read.abs(), rtol=1e-2, atol=1e-3)


def test_it_is_saved_compared_and_applied_like_any_other_and_not_fitted_again(tmp_path):
    benign, malicious = classes()
    subspace = subspace_along(
        classifier_direction(benign, malicious), benign, malicious, site="blocks.1.hook_resid_post"
    )
    again = SafetySubspace.load(subspace.save(tmp_path / "s"))
    assert again.equals(subspace) and again.diagnostics == subspace.diagnostics
    assert float(subspace.energy(subspace.apply(malicious)).max()) < 1e-4 * float(subspace.energy(malicious).max())
    assert torch.equal(subspace.apply(malicious, alpha=0.0), malicious)
    with pytest.raises(SubspaceError, match="must be a fit to be fitted again"):
        subspace.uncertainty(benign, malicious)
    assert "given directions" in repr(subspace)


@pytest.mark.parametrize(
    ("directions", "error", "words"),
    [
        (torch.ones(11), WidthError, "rows' d = 12"),
        (torch.ones(2, 12, 3), WidthError, "rows' d = 12"),
        (torch.ones(12, 0), WidthError, "rows' d = 12"),
        (torch.zeros(12), RankError, "depend on each other"),
        (torch.ones(12, 2), RankError, "depend on each other"),
        (torch.randn(12, 13), RankError, "depend on each other"),
        (torch.full((12,), torch.nan), SubspaceError, "finite"),
    ],
)
def test_directions_that_are_none_are_refused(directions, error, words):
    with pytest.raises(error, match=words):
        subspace_along(directions, *classes())


def test_a_classifier_needs_two_classes_and_a_strength():
    benign, malicious = classes()
    with pytest.raises(SubspaceError, match="strength must be"):
        classifier_direction(benign, malicious, strength=0.0)
    with pytest.raises(SubspaceError):
        classifier_direction(benign, malicious * torch.nan)
