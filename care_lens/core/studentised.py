"""Studentised cluster bootstrap of means and of ratios of means, for few and skewed groups.

Let m_g be the rows of group g, s_g their sum, n = sum m_g. The mean is sum s_g / n, its residuals r_g = s_g - m_g mean, and its
standard error sqrt(G / (G - 1) sum r_g^2) / n (linearised, as in surveys). A resample of whole groups has T = (its mean - mean) /
(its standard error); the interval is [mean - T_high se, mean - T_low se]. In small samples that is not wide enough, so:

- neither end is nearer than Student's t with G - 1 degrees of freedom puts it;
- the sample's own skewness is an underestimate, so the tail of T on the side of the longer tail is taken at alpha/2 times
  max(1/4, 1 - 5/G) instead of alpha/2;
- no end is further than four times Student's t: a resample without spread has no T;
- with fewer than 5 groups there are too few resamples: Student's t at alpha/8 (of two groups alpha/4) is taken in place of
  alpha/2. With one group there is no interval.

The factor 1 - 5/G is calibrated by simulation (``benchmarks/bench_intervals.py``), not derived.

Source: Efron and Tibshirani 1993, chapter 12; Davison and Hinkley 1997, sections 3.8 and 5.2; Fieller 1954 for ratios.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import stdtrit

FEWEST = 5
"""Groups that resamples are drawn of; with fewer Student's t is taken."""
_FURTHEST = 4.0
_CELLS = 512
"""Cells whose resamples are held at once."""


def draw_groups(n_groups: int, n_boot: int, seed: int) -> Int[ndarray, "n_boot n_groups"]:
    """The groups of every resample, with replacement; the same seed gives the same ones."""
    return np.random.default_rng(seed).integers(n_groups, size=(n_boot, n_groups))


def group_codes(groups: Sequence[Any] | ndarray) -> Int[ndarray, " n"]:
    """The group of each row as a number from 0; a row whose label is missing (None, NaN) is a group by itself, not one with all others that lack theirs."""
    labels = np.asarray(groups, dtype=object)
    codes = np.unique(labels.astype(str), return_inverse=True)[1]
    alone = pd.isna(labels)
    if not alone.any():
        return codes
    return np.unique(np.where(alone, len(labels) + np.arange(len(labels)), codes), return_inverse=True)[1]


def counted(draws: Int[ndarray, "n_boot n_groups"]) -> Float[ndarray, "n_boot n_groups"]:
    """How many times each resample has each group."""
    n_boot, n_groups = draws.shape
    offsets = np.arange(n_boot)[:, None] * n_groups
    times = np.bincount((draws + offsets).ravel(), minlength=n_boot * n_groups)
    return times.reshape(n_boot, n_groups).astype(np.float64)


def group_sums(values: Float[ndarray, "n cells"], labels: Int[ndarray, " n"]) -> Float[ndarray, "n_groups cells"]:
    """Sums over the rows of each group; labels are 0 to n_groups - 1."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(int(labels.max()) + 1))
    return np.add.reduceat(values[order], starts, axis=0)


def standard_error(
    residuals: Float[ndarray, "n_groups cells"], n: float | Float[ndarray, " cells"]
) -> Float[ndarray, " cells"]:
    """Of a mean over n rows, from its groups' residual sums; not a number with one group."""
    n_groups = len(residuals)
    if n_groups < 2:
        return np.full(residuals.shape[1], np.nan)
    return np.sqrt(n_groups / (n_groups - 1) * (residuals**2).sum(axis=0)) / n


def critical_values(
    residuals: Float[ndarray, "n_groups cells"],
    sizes: Float[ndarray, " n_groups"],
    times: Float[ndarray, "n_boot n_groups"],
    confidence: float,
) -> tuple[Float[ndarray, " cells"], Float[ndarray, " cells"]]:
    """How many standard errors the ends of an interval are below and above the mean.

    Args:
        residuals: [n_groups, cells] s_g - m_g mean.
        sizes: [n_groups] m_g.
        times: [n_boot, n_groups] how many times each resample has each group.
        confidence: Coverage aimed at.

    Returns:
        Two arrays [cells], both positive.
    """
    n_groups, cells = residuals.shape
    tail = (1 - confidence) / 2
    if n_groups < FEWEST:
        level = 1 - tail / (2 if n_groups == 2 else 4)
        both = np.full(cells, _student(level, n_groups) if n_groups > 1 else np.nan)
        return both, both
    least = _student(1 - tail, n_groups)
    below, above = np.empty(cells), np.empty(cells)
    for start in range(0, cells, _CELLS):
        part = slice(start, start + _CELLS)
        below[part], above[part] = _tails(residuals[:, part], sizes, times, tail, least)
    return below, above


def _student(level: float, n_groups: int) -> float:
    return float(stdtrit(n_groups - 1, level))


def _tails(residuals: ndarray, sizes: ndarray, times: ndarray, tail: float, least: float) -> tuple[ndarray, ndarray]:
    """[cells] upper and lower quantiles of T, in size."""
    n_boot, n_groups = times.shape
    # T does not depend on the scale; without it squares of small effects vanish.
    scale = np.abs(residuals).max(axis=0)
    r = residuals / np.where(scale > 0, scale, 1.0)
    rows = times @ sizes
    shift = times @ r / rows[:, None]
    # sum t (r - m shift)^2 = sum t r^2 - 2 shift sum t r m + shift^2 sum t m^2
    spread = times @ r**2 - 2 * shift * (times @ (r * sizes[:, None])) + shift**2 * (times @ sizes**2)[:, None]
    error = np.sqrt(np.maximum(spread, 0) * n_groups / (n_groups - 1)) / rows[:, None]
    furthest = _FURTHEST * least
    t = np.clip(shift / np.maximum(error, 1e-12), -furthest, furthest).T.copy()
    narrow = max(int(tail * (n_boot + 1)) - 1, 0)
    wide = max(int(tail * max(0.25, 1 - 5 / n_groups) * (n_boot + 1)) - 1, 0)
    t.partition(sorted({wide, narrow, n_boot - 1 - narrow, n_boot - 1 - wide}), axis=1)
    skew = (r**3).sum(axis=0)
    low = np.where(skew > 0, t[:, wide], t[:, narrow])
    high = np.where(skew < 0, t[:, n_boot - 1 - wide], t[:, n_boot - 1 - narrow])
    return np.maximum(high, least), np.maximum(-low, least)


def studentised_mean(
    values: Float[ndarray, "n cells"],
    labels: Int[ndarray, " n"],
    times: Float[ndarray, "n_boot n_groups"],
    confidence: float,
) -> tuple[Float[ndarray, " cells"], Float[ndarray, " cells"], Float[ndarray, " cells"]]:
    """Means and their intervals; see the head of this file.

    Args:
        values: [n, cells] rows.
        labels: [n] the group of each row, 0 to n_groups - 1.
        times: [n_boot, n_groups] how many times each resample has each group.
        confidence: Coverage aimed at.

    Returns:
        [cells] means, lower and upper ends. The ends are the mean where all values are equal to the bit, and not a number
        where there is one group.
    """
    sizes = np.bincount(labels).astype(np.float64)
    estimate = values.mean(axis=0)
    residuals = group_sums(values - estimate, labels)
    equal = (values == values[0]).all(axis=0)
    estimate = np.where(equal, values[0], estimate)
    residuals[:, equal] = 0.0
    error = standard_error(residuals, float(len(values)))
    below, above = critical_values(residuals, sizes, times, confidence)
    return estimate, estimate - below * error, estimate + above * error


def fieller(
    numerator: Float[ndarray, "n cells"],
    denominator: Float[ndarray, "n cells"],
    labels: Int[ndarray, " n"],
    times: Float[ndarray, "n_boot n_groups"],
    confidence: float,
) -> tuple[Float[ndarray, " cells"], Float[ndarray, " cells"], Float[ndarray, " cells"]]:
    """Ratios of means, mean(numerator) / mean(denominator), and their intervals.

    The interval is the set of ratios R for which mean(numerator - R denominator) is within the critical values of 0
    (Fieller), with those of the bootstrap of the residuals at the estimate.

    Args:
        numerator: [n, cells].
        denominator: [n, cells].
        labels: [n] the group of each row.
        times: [n_boot, n_groups] how many times each resample has each group.
        confidence: Coverage aimed at.

    Returns:
        [cells] ratios, lower and upper ends; the ends are not a number where that set is not bounded because the denominator's
        mean is not clear of 0.
    """
    sizes = np.bincount(labels).astype(np.float64)
    n, n_groups = float(len(labels)), len(sizes)
    top, bottom = numerator.mean(axis=0), denominator.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = top / bottom
    if n_groups < 2:
        return ratio, np.full_like(ratio, np.nan), np.full_like(ratio, np.nan)
    sign = np.where(bottom < 0, -1.0, 1.0)
    r_top, r_bottom = (group_sums(part - part.mean(axis=0), labels) * sign for part in (numerator, denominator))
    safe = np.where(np.isfinite(ratio), ratio, 0.0)
    residuals = r_top - safe * r_bottom
    # A numerator that is a multiple of the denominator leaves rounding, which is no spread.
    size = np.abs(r_top).max(axis=0) + np.abs(safe * r_bottom).max(axis=0)
    residuals[:, np.abs(residuals).max(axis=0) <= 1e-12 * size] = 0.0
    below, above = critical_values(residuals, sizes, times, confidence)
    low = safe + _ends(residuals, r_bottom, sign * bottom, below, n, -1.0)
    high = safe + _ends(residuals, r_bottom, sign * bottom, above, n, 1.0)
    known = np.isfinite(ratio) & np.isfinite(low) & np.isfinite(high)
    return ratio, np.where(known, low, np.nan), np.where(known, high, np.nan)


def _ends(residuals: ndarray, r_bottom: ndarray, bottom: ndarray, q: ndarray, n: float, side: float) -> ndarray:
    """[cells] distance from the ratio to the root of (d bottom)^2 = q^2 var(residual - d denominator) on one side."""
    n_groups = len(residuals)
    c = n_groups / (n_groups - 1) / n**2
    v11, v12, v22 = (
        c * (a * b).sum(axis=0) for a, b in ((residuals, residuals), (residuals, r_bottom), (r_bottom, r_bottom))
    )
    a, b = bottom**2 - q**2 * v22, q**2 * v12
    with np.errstate(divide="ignore", invalid="ignore"):
        root = (-b + side * np.sqrt(np.maximum(b**2 + a * q**2 * v11, 0))) / a
    return np.where(a > 0, root, np.nan)
