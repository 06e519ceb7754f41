"""Bounds of rates whose trials share groups, and of differences of paired rates.

- Independent trials: Clopper-Pearson, exact.
- Trials that share groups: Clopper-Pearson at an effective number of trials (Korn and Graubard). With n trials in G groups of
  sizes m_g and a design effect deff = var(rate by groups) / var(rate of n independent trials), at least 1, it is
  n / deff (t_{n-1} / t_df)^2, with df = min(G - 1, k + 3), where k groups have outcomes of the rarer kind: fewer than all tell
  anything about deff. If all trials came out alike nothing tells deff, and the largest is taken, sum m_g^2 / n
  (every group one trial).
- Differences of paired trials, in {-1, 0, 1}: the share of 1 less the share of -1, with both shares' bounds combined by
  squares (MOVER), their correlation that of a multinomial.

None of them is a point when all trials came out alike.

Source: Clopper and Pearson 1934; Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of
positive counts estimated from survey data"; Zou and Donner 2008 (MOVER); Newcombe 1998 for paired shares.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import betaincinv, stdtrit

from care_lens.core.studentised import group_sums

Bounds = tuple[Float[ndarray, " cells"], Float[ndarray, " cells"], Float[ndarray, " cells"]]


def clopper_pearson(
    share: Float[ndarray, " cells"], trials: float | Float[ndarray, " cells"], confidence: float
) -> Bounds:
    """Shares and their exact bounds; the number of trials may be a fraction.

    Args:
        share: [cells] in [0, 1].
        trials: Number of independent trials, above 0.
        confidence: Coverage.
    """
    tail = (1 - confidence) / 2
    share, trials = np.broadcast_arrays(np.asarray(share, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    hits = share * trials
    rest = np.maximum(trials - hits, 0.0)
    none, all_ = share <= 0, share >= 1
    low = betaincinv(np.where(none, 1.0, hits), rest + 1, tail)
    high = betaincinv(hits + 1, np.where(all_, 1.0, rest), 1 - tail)
    return share, np.where(none, 0.0, low), np.where(all_, 1.0, high)


def clustered_shares(values: Float[ndarray, "n cells"], labels: Int[ndarray, " n"], confidence: float) -> Bounds:
    """Means of values in [0, 1] and their bounds, by Korn and Graubard.

    Args:
        values: [n, cells]; 0 or 1, or shares between.
        labels: [n] the group of each trial, 0 to n_groups - 1.
        confidence: Coverage.
    """
    return clopper_pearson(values.mean(axis=0), effective_trials(values, labels, confidence), confidence)


def effective_trials(
    values: Float[ndarray, "n cells"], labels: Int[ndarray, " n"], confidence: float
) -> Float[ndarray, " cells"]:
    """How many independent trials these are worth: n where no trials share a group, else fewer, as the head of this file says.

    Args:
        values: [n, cells]; 0 or 1, or shares between.
        labels: [n] the group of each trial, 0 to n_groups - 1.
        confidence: Coverage of the interval that is made with the number.
    """
    n, sizes, cells = len(values), np.bincount(labels), values.shape[1]
    n_groups = len(sizes)
    share = values.mean(axis=0)
    if n_groups == n and np.isin(values, (0.0, 1.0)).all():
        return np.full(cells, float(n))
    worst = float((sizes**2).sum() / n)
    alike = (values == values[0]).all(axis=0) | (share <= 0) | (share >= 1)
    if n_groups == 1:
        return np.ones(cells)
    sums = group_sums(values, labels)
    spread = n_groups / (n_groups - 1) * ((sums - share * sizes[:, None]) ** 2).sum(axis=0) / n**2
    with np.errstate(divide="ignore", invalid="ignore"):
        deff = spread * (n - 1) / (share * (1 - share))
    deff = np.where(alike, worst, np.maximum(deff, 1.0))
    rarer = np.where(share <= 0.5, sums > 0, sums < sizes[:, None]).sum(axis=0)
    df = np.minimum(n_groups - 1, rarer + 3)
    tail = (1 - confidence) / 2
    shrink = np.where(alike | (n_groups == n), 1.0, (stdtrit(n - 1, tail) / stdtrit(df, tail)) ** 2)
    return n / deff * shrink


def paired_shares(values: Float[ndarray, "n cells"], labels: Int[ndarray, " n"], confidence: float) -> Bounds:
    """Means of differences of paired trials, between -1 and 1, and their bounds, by MOVER.

    Args:
        values: [n, cells] in [-1, 1].
        labels: [n] the group of each trial, 0 to n_groups - 1.
        confidence: Coverage.
    """
    up, up_low, up_high = clustered_shares(np.maximum(values, 0.0), labels, confidence)
    down, down_low, down_high = clustered_shares(np.maximum(-values, 0.0), labels, confidence)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlation = -np.sqrt(up * down / ((1 - up) * (1 - down)))
    correlation = np.clip(np.nan_to_num(correlation), -1.0, 0.0)

    def distance(first: ndarray, second: ndarray) -> ndarray:
        return np.sqrt(np.maximum(first**2 + second**2 - 2 * correlation * first * second, 0.0))

    change = values.mean(axis=0)
    low = change - distance(up - up_low, down_high - down)
    high = change + distance(up_high - up, down - down_low)
    return change, np.maximum(low, -1.0), np.minimum(high, 1.0)
