"""Separability against scikit-learn and cases with known answers."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score, silhouette_score

from care_lens.capture import Activations
from care_lens.core import Site
from care_lens.lens import class_figures, probe_auc, separability
from care_lens.lens.separability import _auc

SITE = Site("language", 0, "hook_resid_post")


def rows(n, d=6, shift=0.0, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def held(values, groups):
    n = len(values)
    return Activations(
        {(SITE, "last"): values}, {(SITE, "last"): torch.ones(n, dtype=torch.bool)}, ("",) * n, tuple(groups)
    )


def test_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(2, size=60).astype(float), rng.integers(10, size=60).astype(float)
    assert _auc({"label": labels, "score": scores}) == pytest.approx(roc_auc_score(labels, scores))


def test_a_perfect_probe_has_the_interval_of_a_rate_that_all_items_agree_on():
    labels = torch.arange(24) % 2 == 0
    features = torch.where(labels, 4.0, -4.0)[:, None] + 0.1 * rows(24, 3, seed=2)
    found = probe_auc(features, labels, [str(i) for i in range(24)], n_boot=50)
    assert found.estimate == 1 and found.high == 1
    assert found.low == pytest.approx(float(scipy.stats.beta.ppf(0.025, 24, 1)))
    # No end lies beyond what an area can be, where the figure is short of 1 too.
    near = probe_auc(features + 12 * rows(24, 3, seed=3), labels, [str(i) for i in range(24)], n_boot=50)
    assert 0.5 < near.estimate < 1 and 0 <= near.low <= near.estimate <= near.high <= 1


def test_a_probe_that_learns_items_is_found_out():
    """Each item has its own direction and its class is a coin toss: only held-out items tell."""
    n_items, copies = 16, 6
    items = np.repeat(np.arange(n_items), copies)
    labels = torch.tensor(items % 2 == 0)
    features = torch.eye(n_items)[items] * 5 + rows(len(items), n_items, seed=1)
    by_item = probe_auc(features, labels, [str(i) for i in items], n_boot=50)
    by_row = probe_auc(features, labels, [str(i) for i in range(len(items))], n_boot=50)
    assert by_row.estimate > 0.85
    assert by_item.estimate < 0.7


def test_a_probe_finds_a_shift():
    features = torch.cat([rows(40), rows(40, shift=1.5, seed=1)])
    labels = torch.arange(80) >= 40
    found = probe_auc(features, labels, [str(i // 2) for i in range(80)], n_boot=100)
    assert found.estimate > 0.95
    assert found.low <= found.estimate <= found.high
    with pytest.raises(ValueError, match="at least 2 groups"):
        probe_auc(features, labels, ["a"] * 80)


def test_class_figures_are_their_definitions():
    benign, malicious = rows(400, 3), rows(300, 3, seed=1) + torch.tensor([3.0, 0.0, 0.0])
    found = class_figures(benign, malicious)
    x = torch.cat([benign, malicious]).double().numpy()
    y = np.repeat([0, 1], [400, 300])
    scatter = [((x[y == c] - x[y == c].mean(0)) ** 2).sum() for c in (0, 1)]
    total = ((x - x.mean(0)) ** 2).sum()
    assert found["fisher"] == pytest.approx((total - sum(scatter)) / sum(scatter))
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.0, store_covariance=True).fit(x, y)
    delta = lda.means_[1] - lda.means_[0]
    assert found["mahalanobis"] == pytest.approx(np.sqrt(delta @ np.linalg.solve(lda.covariance_, delta)), rel=0.05)
    assert 0.3 < found["silhouette"] < 0.7


def test_frame(tmp_path):
    benign, malicious = (
        held(rows(20), [f"b{i}" for i in range(20)]),
        held(rows(20, shift=2.0, seed=1), [f"m{i}" for i in range(20)]),
    )
    found = separability(benign, malicious, n_boot=50)
    assert found.frame.metric.tolist() == ["probe_auc", "silhouette", "fisher", "mahalanobis"]
    assert set(found.frame.position) == {"last"}
    assert found.frame["value"].iloc[0] > 0.95
    found.save(tmp_path, "separability")
    assert type(found).load(tmp_path, "separability").frame.equals(found.frame)
    with pytest.raises(ValueError, match="must share"):
        separability(benign, malicious, sites=["blocks.4.hook_mlp_out"])


@pytest.mark.parametrize(("n", "d"), [(40, 3), (12, 60), (30, 30)])
def test_figures_from_inner_products_are_scikit_learns(n, d):
    benign, malicious = rows(n, d) + 5, rows(n // 2, d, shift=0.4, seed=1) + 5
    x, y = torch.cat([benign, malicious]).double().numpy(), np.repeat([0, 1], [n, n // 2])
    residuals = np.concatenate([part - part.mean(0) for part in (x[y == 0], x[y == 1])])
    covariance = LedoitWolf(assume_centered=True).fit(residuals).covariance_
    delta = x[y == 1].mean(0) - x[y == 0].mean(0)
    found = class_figures(benign, malicious)
    assert found["silhouette"] == pytest.approx(silhouette_score(x, y), abs=1e-7)
    assert found["mahalanobis"] == pytest.approx(np.sqrt(delta @ np.linalg.solve(covariance, delta)), rel=1e-7)
    within = (residuals**2).sum()
    assert found["fisher"] == pytest.approx((((x - x.mean(0)) ** 2).sum() - within) / within, rel=1e-7)


def test_every_measure_has_an_interval_and_a_chance_line():
    """What is in-sample is far from 0 by chance where there are more dimensions than rows; the chance line says so."""
    names = [f"i{i}" for i in range(16)]
    nothing = separability(
        held(rows(16, 80), names), held(rows(16, 80, seed=5), [f"{n}m" for n in names]), n_boot=50
    ).frame
    shifted = separability(
        held(rows(16, 80), names), held(rows(16, 80, shift=1.0, seed=5), [f"{n}m" for n in names]), n_boot=50
    ).frame
    assert (nothing["ci_low"] <= nothing["value"]).all() and (nothing["value"] <= nothing["ci_high"]).all()
    assert (nothing["ci_low"] < nothing["ci_high"]).all()
    by_metric = nothing.set_index("metric")
    assert by_metric.loc["probe_auc", "chance"] == 0.5
    # Without a difference each figure is about what chance gives, which is not 0.
    assert by_metric.loc["mahalanobis", "chance"] > 1
    assert by_metric.loc["mahalanobis", "value"] == pytest.approx(by_metric.loc["mahalanobis", "chance"], rel=0.3)
    assert (shifted["value"] > shifted["chance_high"]).all()


def test_the_old_path_has_the_same_names():
    import importlib

    from care_lens import mediation

    old = importlib.import_module("care_lens.mediation.separability")
    assert mediation.separability is separability and mediation.probe_auc is probe_auc
    with pytest.warns(FutureWarning, match="is care_lens.lens.separability.probe_auc now"):
        assert old.probe_auc is probe_auc
