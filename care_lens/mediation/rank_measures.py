"""How well estimates of effects rank units, measured on the units that rank highest and on others drawn at random.

- "spearman": rank correlation of attribution and exact effect over all units that were patched.
- "spearman of random": the same over those drawn at random, which the choice of the top ones does not flatter.
- "miss rate": of the units whose exact effect is large, the share that attribution did not rank among the top ones. Large
  is at least the median size among the top ones. With L large ones among the top, and a share p of the N - top others
  estimated from those drawn, it is (N - top) p / ((N - top) p + L). Its interval is that of p (Clopper-Pearson) put through the
  same formula; it knows nothing of the sampling of pairs.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from care_lens.core import Interval, cluster_bootstrap, rate_ci


def rank_measures(part: pd.DataFrame, size: int, n_boot: int, seed: int) -> list[tuple[str, Interval, int]]:
    """Each measure of one kind of unit, with its interval and the number of units behind it.

    Args:
        part: A row a unit that was patched: ``top`` (1 of those that rank highest, 0 drawn at random), ``estimate``, ``value`` (exact).
        size: Number of units of the kind, patched or not.
        n_boot: Bootstrap resamples of the units.
        seed: Their seed.
    """
    estimate, exact = part["estimate"].to_numpy(dtype=float), part["value"].to_numpy(dtype=float)
    is_top = part["top"].to_numpy(dtype=float) == 1.0
    return [
        ("spearman", _spearman(estimate, exact, n_boot, seed), len(part)),
        ("spearman of random", _spearman(estimate[~is_top], exact[~is_top], n_boot, seed), int((~is_top).sum())),
        ("miss rate", miss_rate(exact[is_top], exact[~is_top], size=size), len(part)),
    ]


def miss_rate(top: np.ndarray, others: np.ndarray, *, size: int) -> Interval:
    """Share of the large effects that are not among the top ones.

    Args:
        top: [k] exact effects of the units that attribution ranks highest.
        others: [m] exact effects of units drawn at random from the rest.
        size: Number of units in all.

    Returns:
        The share in [0, 1] and its interval; missing where no effect is other than 0, or none of the rest was drawn. With nothing left out
        of the top ones it is 0.
    """
    threshold = float(np.median(np.abs(top)))
    if threshold == 0:
        return Interval(np.nan, np.nan, np.nan)
    found = int((np.abs(top) >= threshold).sum())
    if size <= len(top):
        return Interval(0.0, 0.0, 0.0)
    large = int((np.abs(others) >= threshold).sum())
    rest = size - len(top)
    if len(others) == 0:
        return Interval(np.nan, np.nan, np.nan)
    if len(others) == rest:
        exact = large / (large + found)
        return Interval(exact, exact, exact)
    return Interval(*(rest * share / (rest * share + found) for share in rate_ci(large, len(others))))


def _spearman(estimate: np.ndarray, exact: np.ndarray, n_boot: int, seed: int) -> Interval:
    if len(exact) < 3 or np.ptp(exact) == 0 or np.ptp(estimate) == 0:
        return Interval(np.nan, np.nan, np.nan)
    both = {"x": estimate, "y": exact}
    return cluster_bootstrap(both, statistic=_rank_correlation, bounds=(-1, 1), n_boot=n_boot, seed=seed)


def _rank_correlation(values: Mapping[str, np.ndarray]) -> float:
    """Spearman's; not a number where all are equal. As scipy's, without its warnings in constant resamples."""
    x, y = (rankdata(values[name]) for name in ("x", "y"))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")
