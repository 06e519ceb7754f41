"""Intervals: cluster bootstrap for means and other statistics, Clopper-Pearson for independent trials.

Rows that share an item (a noun, a behaviour) are not independent, so the bootstrap draws whole groups with
replacement (Davison and Hinkley 1997, section 3.8); with one row a group it is the ordinary bootstrap.
Intervals are percentile intervals. They collapse to a point on a constant sample: for rates near 0 or 1 of
independent trials use :func:`rate_ci`, which is exact. Memory: ``n_boot x n_groups`` float64 for means, one
resample at a time otherwise.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """An estimate and its confidence interval; arrays where the statistic is an array."""

    estimate: Any
    low: Any
    high: Any


def mean(values: NDArray[Any]) -> NDArray[Any]:
    """Mean over the first axis: the default statistic of :func:`cluster_bootstrap`."""
    return np.mean(values, axis=0)


def cluster_bootstrap(
    values: Any,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    *,
    statistic: Callable[[Any], Any] = mean,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic, from resamples of whole groups.

    Args:
        values: [n, ...] array, or a dict of such arrays that are resampled jointly (their rows belong
            together). With the default statistic, trailing axes are so many cells and are resampled together:
            one call gives the intervals of all of them.
        groups: n labels; rows of one label are drawn together. None: every row is its own group.
        statistic: Function of an array (or of the dict of arrays) of resampled rows, to a number or an array.
            The default mean is computed for all resamples at once.
        n_boot: Number of resamples.
        seed: Seed of the generator; the same seed gives the same interval.
        confidence: Coverage aimed at, between 0 and 1.

    Returns:
        ``(estimate, low, high)``: floats for a scalar statistic, else arrays. Resamples in which the
        statistic is not a number (a ratio by zero) are left out of the quantiles.

    Raises:
        ValueError: If there are no rows, lengths differ, or an option is out of range.

    Example:
        >>> estimate, low, high = cluster_bootstrap([0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"])
        >>> float(estimate), float(low), float(high)
        (0.5, 0.0, 1.0)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if n_boot < 1:
        raise ValueError(f"n_boot must be 1 or more, got {n_boot}")
    named = isinstance(values, Mapping)
    arrays: dict[str, NDArray[Any]] = {
        key: np.asarray(array, dtype=np.float64) for key, array in (values if named else {"": values}).items()
    }
    lengths = {len(array) for array in arrays.values()} | ({len(groups)} if groups is not None else set())
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"values and groups must be of one length above 0, got lengths {sorted(lengths)}")
    n = lengths.pop()
    labels = np.arange(n) if groups is None else np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    n_groups = int(labels.max()) + 1
    draws = np.random.default_rng(seed).integers(n_groups, size=(n_boot, n_groups))
    if statistic is mean and not named:
        estimate, resampled = arrays[""].mean(axis=0), _resampled_means(arrays[""], labels, draws)
    else:
        apply = statistic if named else lambda rows: statistic(rows[""])
        estimate = np.asarray(apply(arrays), dtype=np.float64)
        members = [np.flatnonzero(labels == group) for group in range(n_groups)]
        picks = (np.concatenate([members[group] for group in draw]) for draw in draws)
        with np.errstate(divide="ignore", invalid="ignore"):
            resampled = np.stack([apply({key: array[rows] for key, array in arrays.items()}) for rows in picks])
    tail = 50 * (1 - confidence)
    finite = np.where(np.isfinite(resampled), resampled, np.nan)
    low, high = np.nanpercentile(finite, [tail, 100 - tail], axis=0)
    if np.ndim(estimate) == 0:
        return Interval(float(estimate), float(low), float(high))
    return Interval(estimate, low, high)


def _resampled_means(values: NDArray[Any], labels: NDArray[Any], draws: NDArray[Any]) -> NDArray[Any]:
    """Means of all resamples [n_boot, ...] from the groups' sums and sizes."""
    n_boot, n_groups = draws.shape
    flat = values.reshape(len(values), -1)
    sums = np.zeros((n_groups, flat.shape[1]))
    np.add.at(sums, labels, flat)
    sizes = np.bincount(labels, minlength=n_groups).astype(np.float64)
    offsets = np.arange(n_boot)[:, None] * n_groups
    times = np.bincount((draws + offsets).ravel(), minlength=n_boot * n_groups).reshape(n_boot, n_groups)
    return (times @ sums / (times @ sizes)[:, None]).reshape(n_boot, *values.shape[1:])


def rate_ci(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Exact (Clopper-Pearson) interval of a rate of independent trials.

    Args:
        successes: How many of them succeeded.
        trials: How many there were.
        confidence: Coverage, between 0 and 1.

    Returns:
        ``(rate, low, high)``.

    Raises:
        ValueError: If ``trials`` is below 1 or ``successes`` is not in [0, trials].

    Example:
        >>> [round(x, 3) for x in rate_ci(0, 72)]
        [0.0, 0.0, 0.05]
    """
    from transformer_lens.utilities.statistics import success_rate_ci

    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, trials] and trials above 0, got {successes} of {trials}")
    exact = success_rate_ci([i < successes for i in range(trials)], confidence=confidence)
    return Interval(exact.point_estimate, exact.ci_low, exact.ci_high)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of mean(first) - mean(second), where row i of both is the same trial under two conditions.

    Args:
        first: [n] numbers or successes under the first condition.
        second: [n] the same trials under the second.
        groups: n labels to cluster by; None: every row is its own group.
        n_boot: Number of resamples.
        seed: Seed of the generator.
        confidence: Coverage aimed at.

    Returns:
        ``(difference, low, high)``.

    Raises:
        ValueError: If the two differ in shape.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"first and second must be of the same shape, got {a.shape} and {b.shape}")
    return cluster_bootstrap(a - b, groups, n_boot=n_boot, seed=seed, confidence=confidence)
