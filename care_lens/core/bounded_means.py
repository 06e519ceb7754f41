"""Intervals of means of bounded values, which are no points where all values came out alike.

A studentised interval of values of which nearly all are 0 sees the spread of the few others, or none. What has not been seen matters then: with n
trials, an outcome of a share below about 3/n may just not have come up. So an end is a quantile of the mean under random weights, uniform over all
that sum to 1 (Dirichlet), with one trial more than there was, whose value is the bound on that side (Gaffke). Of values that are all at the two bounds
it is Clopper and Pearson's exact interval; of many values that differ it goes towards Student's.

Groups are weighted as wholes: with sums s_g, sizes m_g and independent exponential weights E_g the mean is sum E_g s_g / sum E_g m_g, and the group that is added has the mean
size of the group of a trial, sum m_g^2 / n. P(mean <= t) = P(sum E_g (s_g - t m_g) <= 0), a combination of exponential variables whose distribution is had from its
characteristic function by one integral (Gil-Pelaez; Imhof), so that nothing is drawn.

Source: Gaffke 2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative variable" (Mathematical Methods of
Statistics 14); Learned-Miller and Thomas 2020 (arXiv:1905.06208). That it covers at any n is conjectured, not proven; ``tests/core/test_stats.py`` simulates rare losses. Imhof 1961 for the integral.
"""

from typing import cast

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import brentq

from care_lens.core.rates import Bounds
from care_lens.core.studentised import group_sums

# Nodes of [0, infinity), by u = x / (1 - x), for an integrand that falls as 1 / u^2 or faster.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_U = (1 + _NODES) / (1 - _NODES)
_DU = 2 * _WEIGHTS / (1 - _NODES) ** 2


def bounded_means(
    values: Float[ndarray, "n cells"],
    labels: Int[ndarray, " n"],
    bounds: tuple[float, float],
    confidence: float,
) -> Bounds:
    """Means of bounded values and their intervals; see the head of this file.

    Args:
        values: [n, cells] within the bounds.
        labels: [n] the group of each row, 0 to n_groups - 1.
        bounds: The least and the largest value that there can be.
        confidence: Coverage.
    """
    sizes = np.bincount(labels).astype(np.float64)
    sums, means = group_sums(values, labels), values.mean(axis=0)
    tail = (1 - confidence) / 2
    low, high = np.empty_like(means), np.empty_like(means)
    for cell in range(len(means)):
        low[cell] = -_upper(-sums[:, cell], sizes, -bounds[0], tail)
        high[cell] = _upper(sums[:, cell], sizes, bounds[1], tail)
    return means, np.minimum(low, means), np.maximum(high, means)


def _upper(sums: Float[ndarray, " n_groups"], sizes: Float[ndarray, " n_groups"], bound: float, tail: float) -> float:
    """The upper end: where the mean under random weights lies above with probability ``tail``."""
    added = float((sizes**2).sum() / sizes.sum())
    pairs, counts = np.unique([*zip(sums, sizes, strict=True), (bound * added, added)], axis=0, return_counts=True)
    least = float((pairs[:, 0] / pairs[:, 1]).min())
    if least >= bound:
        return bound
    root = brentq(lambda t: _below(pairs[:, 0] - t * pairs[:, 1], counts) - (1 - tail), least, bound, xtol=1e-7)
    return float(cast(float, root))


def _below(scales: Float[ndarray, " terms"], counts: Int[ndarray, " terms"]) -> float:
    """P(sum of scale x gamma variable <= 0), where the shapes of the gamma variables are the counts."""
    if (scales >= 0).all():
        return 0.0
    if (scales <= 0).all():
        return 1.0
    scales = scales / np.sqrt((counts * scales**2).sum())
    along = scales[:, None] * _U
    angle = counts @ np.arctan(along)
    size = np.exp(-0.5 * (counts @ np.log1p(along**2)))
    return float(0.5 - (np.sin(angle) * size / _U * _DU).sum() / np.pi)
