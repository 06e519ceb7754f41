"""Do two conditions differ on the same trials, and does that hold after many such questions?

Paired trials of two conditions are compared by flipping signs: if the conditions do not differ, each group's difference is as likely with
the other sign (whole groups are flipped, since trials of one group belong together). The p value is the share of all sign patterns whose sum is at least as
far from 0 as the one that was found. For rates whose trials share no group this is McNemar's exact test. Sums of rates are whole
numbers, so that all patterns are counted; sums of other numbers are counted exactly for up to 12 groups and sampled beyond.

    sign_flip_test([1, 0, 0, -1, 1, 1])  # differences of paired trials
    holm([0.01, 0.04, 0.03])  # p values of one family

Source: McNemar 1947; Fisher 1935 (randomisation); Holm 1979.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from care_lens.core.studentised import group_codes

_ENUMERATED = 12
_ROUNDING = 1e-9  # of the size of what is summed


class SignFlip(NamedTuple):
    """A test of paired trials.

    Attributes:
        p: Two-sided p value.
        test: "mcnemar-exact", "sign-flip-exact" or "sign-flip-sampled".
        up: Groups whose difference is above 0.
        down: Groups whose difference is below 0.
    """

    p: float
    test: str
    up: int
    down: int


def sign_flip_test(
    differences: ArrayLike,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    *,
    n_draws: int = 9999,
    seed: int = 0,
) -> SignFlip:
    """Test whether paired differences are 0, by flipping the signs of whole groups.

    Args:
        differences: [n] first minus second, one for each trial.
        groups: n labels; trials of one label are flipped together. None: every trial is its own group.
        n_draws: Sign patterns drawn where not all are counted.
        seed: Seed of the draws.

    Returns:
        The p value, and how it was made. Without any difference it is 1.

    Raises:
        ValueError: If there are no trials, one is not finite, or lengths differ.

    Example:
        >>> found = sign_flip_test([1, 1, 1, 1, 1, 1, 0, -1])
        >>> round(found.p, 4), found.test, found.up, found.down
        (0.125, 'mcnemar-exact', 6, 1)
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(
            f"differences must be one or more finite numbers, got {differences!r:.60}; leave missing ones out"
        )
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"groups must be one for each of {len(values)} trials, got {len(groups)}")
    if n_draws < 1:
        raise ValueError(f"n_draws must be 1 or more, got {n_draws}")
    labels = np.arange(len(values)) if groups is None else group_codes(groups)
    sums = np.bincount(labels, weights=values)
    # 0.1 + 0.2 - 0.3 is no difference, though it is not 0 to the bit.
    sums = sums[np.abs(sums) > _ROUNDING * np.bincount(labels, weights=np.abs(values))]
    up, down = int((sums > 0).sum()), int((sums < 0).sum())
    alone = len(np.unique(labels)) == len(values)
    if alone and np.isin(values, (-1.0, 0.0, 1.0)).all():
        p = binomtest(up, up + down).pvalue if up + down else 1.0
        return SignFlip(float(p), "mcnemar-exact", up, down)
    if (sums == np.round(sums)).all():
        return SignFlip(_counted(np.abs(sums).astype(np.int64), abs(int(sums.sum()))), "sign-flip-exact", up, down)
    seen, size = abs(float(sums.sum())), float(np.abs(sums).sum())
    least = seen - _ROUNDING * size  # sums that are equal but for rounding count
    if len(sums) <= _ENUMERATED:
        patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=len(sums))))
        return SignFlip(float((np.abs(patterns @ sums) >= least).mean()), "sign-flip-exact", up, down)
    generator, hits = np.random.default_rng(seed), 0
    for start in range(0, n_draws, 1000):
        signs = generator.choice((-1.0, 1.0), size=(min(1000, n_draws - start), len(sums)))
        hits += int((np.abs(signs @ sums) >= least).sum())
    return SignFlip((1 + hits) / (1 + n_draws), "sign-flip-sampled", up, down)


def _counted(sizes: ndarray, seen: int) -> float:
    """Share of the sign patterns of whole numbers whose sum is at least ``seen`` from 0; the distribution of the sum by convolution."""
    total = int(sizes.sum())
    shares = np.zeros(2 * total + 1)
    shares[total] = 1.0
    for size in sizes.tolist():
        flipped = np.zeros_like(shares)
        flipped[size:] += shares[: len(shares) - size] / 2
        flipped[: len(shares) - size] += shares[size:] / 2
        shares = flipped
    off = np.abs(np.arange(len(shares)) - total)
    return float(min(shares[off >= seen].sum(), 1.0))


def holm(p_values: ArrayLike) -> Float[ndarray, " tests"]:
    """p values adjusted for their number by Holm's step-down method: below 0.05 they hold together at 5 %.

    Args:
        p_values: [tests] of one family. NaN (no test) stays NaN and does not count.

    Returns:
        [tests] adjusted p values, in the same order, at most 1.

    Raises:
        ValueError: If one is outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    there = np.isfinite(values)
    if values.ndim != 1 or not ((values[there] >= 0) & (values[there] <= 1)).all():
        raise ValueError(f"p_values must be a list of numbers in [0, 1], got {p_values!r:.60}")
    adjusted = np.full(len(values), np.nan)
    order = np.flatnonzero(there)[np.argsort(values[there], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return adjusted
