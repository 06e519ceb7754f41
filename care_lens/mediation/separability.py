"""Separability of benign and malicious activations, site by site.

- "probe_auc": area under the ROC curve of a logistic probe on standardised features, scored on items that it
  was not trained on (cross-validation by group); interval over whole items, by jackknife and
  bootstrap of the held-out scores, that of a rate where all are in order.
- "silhouette": mean silhouette coefficient of the two classes, Euclidean, in [-1, 1].
- "fisher": trace of the between-class scatter over trace of the within-class scatter.
- "mahalanobis": sqrt(delta^T S^-1 delta) between the class means, S the pooled within-class covariance with
  Ledoit-Wolf shrinkage.

The last three are in-sample and grow with the width of the site relative to the number of rows; intervals
resample groups, but not the probe's training. A high figure says that a site tells the classes apart, not
that the model uses it.

Source: silhouette, scatter ratio and Mahalanobis as in Fu et al. 2026 (arXiv:2603.27240).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.stats import rankdata
from torch import Tensor

from care_lens.capture import Activations
from care_lens.core import FrameResult, Interval, Site, SiteLike, cluster_bootstrap, package_versions
from care_lens.mediation.frames import site_columns, tidy
from care_lens.mediation.sweep import require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = ("tower", "layer", "component", "position", "metric", "value", "ci_low", "ci_high", "n", "seed")
METRICS: tuple[str, ...] = ("probe_auc", "silhouette", "fisher", "mahalanobis")


@dataclass(frozen=True)
class SeparabilityResult(FrameResult):
    """How well two classes of activations come apart, by site and selection.

    Attributes:
        frame: One row a site, selection and metric: tower, layer, component, position (the selection),
            metric, value, ci_low, ci_high (missing for the in-sample metrics), n (rows of both classes),
            seed.
        settings: Folds, numbers of rows, n_boot, seed, versions.
    """

    def plot(self) -> "go.Figure":
        """Each metric by layer."""
        from care_lens.plots import plot_separability

        return plot_separability(self)


def probe_auc(
    features: Float[Tensor, "n d"],
    labels: Bool[Tensor, " n"],
    groups: Sequence[str],
    *,
    n_folds: int = 5,
    strength: float = 0.1,
    n_boot: int = 500,
    seed: int = 0,
) -> Interval:
    """AUC of a linear probe on items that it was not trained on.

    Args:
        features: [n, d] activations.
        labels: [n] True for the malicious class.
        groups: n items; no item is in the training and the test part of a fold at once.
        n_folds: Number of folds, 2 or more; at most the number of items of the rarer class.
        strength: Inverse regularisation of the logistic regression (scikit-learn's C).
        n_boot: Bootstrap resamples of the items.
        seed: Seed of folds and bootstrap.

    Returns:
        The AUC of the held-out scores of all folds together, and its interval.

    Raises:
        ValueError: If a class is empty, or there are fewer than two items of either.
    """
    require_options(n_folds=n_folds, n_boot=n_boot, seed=seed, least={"n_folds": 2})
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = labels.cpu().numpy()
    items = np.asarray(groups, dtype=str)
    if len(items) != len(y) or len(features) != len(y):
        raise ValueError(
            f"features, labels and groups must be of one length, got {len(features)}, {len(y)}, {len(items)}"
        )
    fewest = min(len(set(items[y].tolist())), len(set(items[~y].tolist())))
    if fewest < 2:
        raise ValueError(f"each class must have at least 2 groups to hold one out, got {fewest}; give more items")
    folds = StratifiedGroupKFold(min(n_folds, fewest), shuffle=True, random_state=seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
    scores = cross_val_predict(
        probe, features.cpu().double().numpy(), y, groups=items, cv=folds, method="decision_function"
    )
    held_out = {"score": scores, "label": y.astype(np.float64)}
    return cluster_bootstrap(held_out, items.tolist(), statistic=_auc, bounds=(0, 1), n_boot=n_boot, seed=seed)


def separability(
    benign: Activations,
    malicious: Activations,
    *,
    sites: Sequence[SiteLike] | None = None,
    n_folds: int = 5,
    n_boot: int = 500,
    seed: int = 0,
) -> SeparabilityResult:
    """Separability of two classes at every site and selection that both hold.

    Args:
        benign: Activations of the benign class.
        malicious: Activations of the malicious class.
        sites: Which sites; None: all that both hold.
        n_folds: Folds of the probe's cross-validation.
        n_boot: Bootstrap resamples of the probe's interval.
        seed: Seed of folds and bootstrap.

    Returns:
        The figures.

    Raises:
        ValueError: If there is no site and selection in both, or an example has no positions of a selection.
    """
    require_options(n_folds=n_folds, n_boot=n_boot, seed=seed, least={"n_folds": 2})
    wanted = None if sites is None else {Site.parse(site) for site in sites}
    keys = sorted(
        (site, select)
        for site, select in benign.values
        if (site, select) in malicious.values and (wanted is None or site in wanted)
    )
    if not keys:
        raise ValueError("benign and malicious must share a site and selection; capture them with the same arguments")
    labels = torch.tensor([False] * len(benign) + [True] * len(malicious))
    groups = [*benign.groups, *malicious.groups]
    rows = []
    for site, select in keys:
        b, m = benign.rows(site, select), malicious.rows(site, select)
        probe = probe_auc(torch.cat([b, m]), labels, groups, n_folds=n_folds, n_boot=n_boot, seed=seed)
        figures = {"probe_auc": probe}
        figures |= {name: Interval(value, np.nan, np.nan) for name, value in class_figures(b, m).items()}
        shared = {**site_columns(site), "position": select, "n": len(labels), "seed": seed}
        for metric, (value, low, high) in figures.items():
            rows.append({**shared, "metric": metric, "value": value, "ci_low": low, "ci_high": high})
    settings = {
        "n_benign": len(benign),
        "n_malicious": len(malicious),
        "n_folds": n_folds,
        "n_boot": n_boot,
        "seed": seed,
        "confidence": 0.95,
        "versions": package_versions(),
    }
    return SeparabilityResult(tidy(rows, COLUMNS), settings)


def class_figures(benign: Float[Tensor, "n_benign d"], malicious: Float[Tensor, "n_malicious d"]) -> dict[str, float]:
    """Silhouette, Fisher ratio and Mahalanobis distance of two classes.

    Args:
        benign: [n_benign, d] rows.
        malicious: [n_malicious, d] rows.

    Returns:
        Each figure by name.

    Raises:
        ValueError: If a class has fewer than two rows.
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.metrics import silhouette_score

    classes = [rows.cpu().double().numpy() for rows in (benign, malicious)]
    if min(len(rows) for rows in classes) < 2:
        raise ValueError(f"each class must have at least 2 rows, got {[len(rows) for rows in classes]}")
    everything = np.concatenate(classes)
    # A common mean far from 0 costs the distances below their digits, and changes none of the figures.
    centre = everything.mean(axis=0)
    classes, everything = [rows - centre for rows in classes], everything - centre
    labels = np.repeat([0, 1], [len(rows) for rows in classes])
    means = [rows.mean(axis=0) for rows in classes]
    residuals = np.concatenate([rows - mean for rows, mean in zip(classes, means, strict=True)])
    between = sum(
        len(rows) * np.sum((mean - everything.mean(axis=0)) ** 2) for rows, mean in zip(classes, means, strict=True)
    )
    delta = means[1] - means[0]
    covariance = LedoitWolf(assume_centered=True).fit(residuals).covariance_
    return {
        "silhouette": float(silhouette_score(everything, labels)),
        "fisher": float(between / np.sum(residuals**2)),
        "mahalanobis": float(np.sqrt(delta @ np.linalg.solve(covariance, delta))),
    }


def _auc(values: dict[str, ndarray]) -> float:
    """Mann-Whitney: the share of pairs of the two classes that the score orders, ties counting half."""
    positive = values["label"] > 0.5
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    ranks = rankdata(values["score"])[positive].sum()
    return float((ranks - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
