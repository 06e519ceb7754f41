"""Separability of benign and malicious activations, site by site.

- "probe_auc": area under the ROC curve of a logistic probe on standardised features, scored on items that it
  was not trained on (cross-validation by group); interval over whole items, by jackknife and
  bootstrap of the held-out scores, that of a rate where all are in order.
- "silhouette": mean silhouette coefficient of the two classes, Euclidean, in [-1, 1].
- "fisher": trace of the between-class scatter over trace of the within-class scatter.
- "mahalanobis": sqrt(delta^T S^-1 delta) between the class means, S the pooled within-class covariance with
  Ledoit-Wolf shrinkage.

The last three are in-sample and grow with the width of the site relative to the number of rows. Every measure therefore has a
chance line: what it is on average, and what it is exceeded by in 5 % of the cases, where the classes' labels are dealt to the
items at random. Intervals of the in-sample measures are by the jackknife over items; they say how far a measure depends on the
items at hand and nothing of its bias, which the chance line shows. A high figure says that a site tells the classes apart, not
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
from care_lens.core.details import site_columns, tidy
from care_lens.core.options import require_options
from care_lens.core.studentised import counted, draw_groups, studentised_mean
from care_lens.core.threads import one_blas_thread

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = (
    "tower", "layer", "component", "position", "metric", "value", "ci_low", "ci_high", "n", "seed", "chance", "chance_high",
)  # fmt: skip
METRICS: tuple[str, ...] = ("probe_auc", "silhouette", "fisher", "mahalanobis")
_CHANCE, _STRENGTH = 0.95, 0.1


@dataclass(frozen=True)
class SeparabilityResult(FrameResult):
    """How well two classes of activations come apart, by site and selection.

    Attributes:
        frame: One row a site, selection and metric: tower, layer, component, position (the selection),
            metric, value, ci_low, ci_high, n (rows of both classes), seed, chance (mean of the measure with labels dealt at
            random) and chance_high (exceeded in 5 % of those deals).
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
    held_out, items = _held_out(features, labels, groups, n_folds=n_folds, strength=strength, n_boot=n_boot, seed=seed)
    return cluster_bootstrap(held_out, items, statistic=_auc, bounds=(0, 1), n_boot=n_boot, seed=seed)


def _held_out(
    features: Tensor, labels: Tensor, groups: Sequence[str], *, n_folds: int, strength: float, n_boot: int, seed: int
) -> tuple[dict[str, ndarray], list[str]]:
    """Scores of the probe on items that it was not trained on, with the labels; and the items."""
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
    rows = features.cpu().double().numpy()
    with one_blas_thread():
        scores = np.asarray(cross_val_predict(probe, rows, y, groups=items, cv=folds, method="decision_function"))
    return {"score": scores, "label": y.astype(np.float64)}, items.tolist()


def separability(
    benign: Activations,
    malicious: Activations,
    *,
    sites: Sequence[SiteLike] | None = None,
    n_folds: int = 5,
    n_boot: int = 500,
    n_permutations: int = 200,
    seed: int = 0,
) -> SeparabilityResult:
    """Separability of two classes at every site and selection that both hold.

    Args:
        benign: Activations of the benign class.
        malicious: Activations of the malicious class.
        sites: Which sites; None: all that both hold.
        n_folds: Folds of the probe's cross-validation.
        n_boot: Bootstrap resamples of the intervals.
        n_permutations: Deals of the labels behind the chance line.
        seed: Seed of folds, bootstrap and deals.

    Returns:
        The figures, each with its interval and its chance line.

    Raises:
        ValueError: If there is no site and selection in both, or an example has no positions of a selection.
    """
    require_options(
        n_folds=n_folds,
        n_boot=n_boot,
        n_permutations=n_permutations,
        seed=seed,
        least={"n_folds": 2, "n_permutations": 20},
    )
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
    dealt = _dealt(labels.numpy(), groups, n_permutations, seed)
    rows = []
    for site, select in keys:
        features = torch.cat([benign.rows(site, select), malicious.rows(site, select)])
        scores, _ = _held_out(features, labels, groups, n_folds=n_folds, strength=_STRENGTH, n_boot=n_boot, seed=seed)
        probe = cluster_bootstrap(scores, groups, statistic=_auc, bounds=(0, 1), n_boot=n_boot, seed=seed)
        by_chance = [_auc({**scores, "label": one.astype(np.float64)}) for one in dealt]
        shared = {**site_columns(site), "position": select, "n": len(labels), "seed": seed}
        found = {"probe_auc": (*probe, 0.5, np.nanquantile(by_chance, _CHANCE))}
        found |= _in_sample(features, labels.numpy(), groups, dealt, n_boot=n_boot, seed=seed)
        for metric, (value, low, high, chance, chance_high) in found.items():
            rows.append(
                {**shared, "metric": metric, "value": value, "ci_low": low, "ci_high": high}
                | {"chance": chance, "chance_high": chance_high}
            )
    settings = {
        "n_benign": len(benign),
        "n_malicious": len(malicious),
        "n_folds": n_folds,
        "n_boot": n_boot,
        "n_permutations": n_permutations,
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
    classes = [rows.cpu().double().numpy() for rows in (benign, malicious)]
    if min(len(rows) for rows in classes) < 2:
        raise ValueError(f"each class must have at least 2 rows, got {[len(rows) for rows in classes]}")
    gram, width = _gram(np.concatenate(classes))
    return dict(zip(METRICS[1:], _of_gram(gram, np.repeat([False, True], [*map(len, classes)]), width), strict=True))


def _gram(rows: Float[ndarray, "n d"]) -> tuple[Float[ndarray, "n n"], int]:
    """Inner products of centred rows, and their width. A common mean far from 0 costs distances their digits, and changes no figure."""
    centred = rows - rows.mean(axis=0)
    return centred @ centred.T, rows.shape[1]


def _of_gram(gram: Float[ndarray, "n n"], malicious: Bool[ndarray, " n"], width: int) -> tuple[float, float, float]:
    """Silhouette, Fisher ratio and Mahalanobis distance, which depend on the rows through their inner products alone.

    With the within-class residuals R [n, d] and K = R R^T, the shrunk covariance is S = (1 - s) R^T R / n + s m I, and by Woodbury's
    identity delta^T S^-1 delta = (|delta|^2 - c^T (K + n s m / (1 - s) I)^-1 c) / (s m) with c = R delta.
    """
    n, sides = len(malicious), np.stack([~malicious, malicious], axis=1).astype(np.float64)
    sizes = sides.sum(axis=0)
    weights = sides / sizes  # [n, class] a class mean is weights^T rows
    square = np.diag(gram)
    distances = np.sqrt(np.maximum(square[:, None] + square - 2 * gram, 0.0))
    np.fill_diagonal(distances, 0.0)
    sums, own = distances @ sides, malicious.astype(int)
    within = sums[np.arange(n), own] / np.maximum(sizes[own] - 1, 1)
    between = sums[np.arange(n), 1 - own] / sizes[1 - own]
    most = np.maximum(within, between)
    silhouette = np.where((sizes[own] > 1) & (most > 0), (between - within) / np.where(most > 0, most, 1.0), 0.0).mean()

    centring = np.eye(n) - sides @ weights.T
    inner = centring @ gram @ centring.T
    scatter = np.trace(inner)
    spread = weights - 1 / n
    fisher = float(sum(sizes[c] * spread[:, c] @ gram @ spread[:, c] for c in (0, 1)) / scatter)

    difference = weights[:, 1] - weights[:, 0]
    length = float(difference @ gram @ difference)
    read = centring @ gram @ difference
    mean = scatter / n / width
    # Ledoit and Wolf's intensity, from the same inner products (scikit-learn's formula, rows taken as centred).
    off = (inner**2).sum() / n**2
    beta = ((np.diag(inner) ** 2).sum() / n - off) / n / width
    delta = (off - 2 * mean * scatter / n + width * mean**2) / width
    share = 0.0 if beta == 0 else min(beta, delta) / delta
    if share >= 1:
        squared = length / mean
    elif share * mean > 0:
        solved = np.linalg.solve(inner + n * share * mean / (1 - share) * np.eye(n), read)
        squared = (length - float(read @ solved)) / (share * mean)
    else:
        squared = np.nan
    return float(silhouette), fisher, float(np.sqrt(max(squared, 0.0))) if np.isfinite(squared) else float("nan")


def _dealt(labels: Bool[ndarray, " n"], groups: Sequence[str], deals: int, seed: int) -> list[ndarray]:
    """Labels dealt at random to the classes of the items, which keep theirs together; each deal has both classes."""
    blocks = np.unique(
        np.array([f"{int(label)} {group}" for label, group in zip(labels, groups, strict=True)]), return_inverse=True
    )[1]
    own = np.zeros(int(blocks.max()) + 1, dtype=bool)
    own[blocks] = labels
    generator = np.random.default_rng(seed)
    found = [generator.permutation(own)[blocks] for _ in range(deals)]
    return [one for one in found if 2 <= one.sum() <= len(one) - 2] or [labels]


def _in_sample(
    features: Tensor,
    labels: Bool[ndarray, " n"],
    groups: Sequence[str],
    dealt: Sequence[ndarray],
    *,
    n_boot: int,
    seed: int,
) -> dict[str, tuple[float, float, float, float, float]]:
    """Each in-sample figure with its ends, its mean by chance and what chance exceeds in one case of twenty."""
    gram, width = _gram(features.cpu().double().numpy())
    whole = np.array(_of_gram(gram, labels, width))
    chance = np.array([_of_gram(gram, one, width) for one in dealt])
    items = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    without = []
    for item in range(int(items.max()) + 1):
        kept = np.flatnonzero(items != item)
        if min(int(labels[kept].sum()), int((~labels[kept]).sum())) < 2:
            without = []
            break
        without.append(_of_gram(_recentred(gram[np.ix_(kept, kept)]), labels[kept], width))
    low = high = np.full(3, np.nan)
    if len(without) > 1:
        n = len(without)
        pseudo = n * whole - (n - 1) * np.array(without)
        centre, low, high = studentised_mean(pseudo, np.arange(n), counted(draw_groups(n, n_boot, seed)), 0.95)
        low, high = whole + low - centre, whole + high - centre
        low, high = np.maximum(low, (-1.0, 0.0, 0.0)), np.minimum(high, (1.0, np.inf, np.inf))
    return {
        name: (
            float(whole[i]), float(low[i]), float(high[i]), float(np.nanmean(chance[:, i])),
            float(np.nanquantile(chance[:, i], _CHANCE)),
        )
        for i, name in enumerate(METRICS[1:])
    }  # fmt: skip


def _recentred(gram: Float[ndarray, "n n"]) -> Float[ndarray, "n n"]:
    mean = gram.mean(axis=0)
    return gram - mean - mean[:, None] + mean.mean()


def _auc(values: dict[str, ndarray]) -> float:
    """Mann-Whitney: the share of pairs of the two classes that the score orders, ties counting half."""
    positive = values["label"] > 0.5
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    ranks = rankdata(values["score"])[positive].sum()
    return float((ranks - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))
