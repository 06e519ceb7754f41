"""Intervals: one implementation for the package, of means, rates, differences, ratios and any other statistic.

Rows that share an item (a noun, a behaviour) are not independent, so whole groups are what is sampled; with one row a group it
is the ordinary case. What interval it is depends on what the values are (``kind``):

- "numbers": studentised cluster bootstrap, widened for few and skewed groups (``care_lens.core.studentised``). Numbers that are
  all equal to the bit give a point: measurements of the real line agree so only where a cause makes them (an activation that
  is the same in both twins); no sampling does. With one group there is no interval: both ends are NaN.
- "rates" (0 or 1): Clopper-Pearson at the effective number of trials (``care_lens.core.rates``), exact where no trials share a
  group. All failures, or all successes, do not give a point.
- "differences" of paired rates (-1, 0 or 1): from the bounds of both shares. All zeros do not give a point.
- "score differences", of paired scores between 0 and 1 of which some are partly right: Gaffke's interval of bounded means
  (``care_lens.core.bounded_means``). All zeros do not give a point.
- other statistics: the same studentised interval of the jackknife's pseudo-values, joined with the bootstrap's BCa interval.
- :func:`ratio_of_means`: Fieller's, with the studentised bootstrap's critical values.

Coverage was simulated: ``benchmarks/bench_intervals.py``, with the table in ``docs/results/intervals.md``. Memory:
``n_boot x n_groups`` float64, and ``n_boot x 512`` for means.

Source: Davison and Hinkley 1997; Efron 1987 (BCa); Korn and Graubard 1998.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit

from care_lens.core.bounded_means import bounded_means
from care_lens.core.rates import clopper_pearson, clustered_shares, paired_shares
from care_lens.core.studentised import counted, draw_groups, fieller, group_codes, studentised_mean

Kind = Literal["auto", "numbers", "rates", "differences", "score differences"]


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
    kind: Kind | str = "auto",
    bounds: tuple[float | int, float | int] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of a mean, of a rate or of another statistic, over rows of which those of one group belong together.

    Args:
        values: [n, ...] array, or a dict of such arrays whose rows belong together. With the default statistic, trailing
            axes are so many cells: one call gives the intervals of all of them.
        groups: n labels; rows of one label are drawn together. None: every row is its own group, as is one whose label is None or NaN.
        statistic: Function of an array (or of the dict of arrays) of rows, to a number or an array.
        kind: What the values of a mean are: "numbers", "rates" (or shares, in [0, 1]), "differences" of paired rates
            (in [-1, 1]) or "score differences", of paired scores in [0, 1]. "auto": rates if
            every value of the array is 0 or 1, differences if every one is -1, 0 or 1, else numbers; an array of zeros
            alone counts as rates, whose interval is the wider one. Say "numbers" where they are measurements.
        bounds: The least and the largest value that another statistic can have (0 and 1 of an AUC): no end lies beyond,
            and an estimate that is at one of them has the interval of a rate of so many groups there, not a point.
        n_boot: Number of resamples. Rates and differences need none.
        seed: Seed of the generator; the same seed gives the same interval.
        confidence: Coverage aimed at, between 0 and 1.

    Returns:
        ``(estimate, low, high)``: floats for a scalar statistic, else arrays. The ends are NaN where there is no interval:
        numbers of one group. Resamples in which another statistic is not a number (a ratio by zero) are left out.

    Raises:
        ValueError: If there are no rows, lengths differ, an option is out of range, or values are not of their kind.

    Example:
        >>> estimate, low, high = cluster_bootstrap([0.0, 1.0, 1.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b", "c", "c"])
        >>> round(float(estimate), 2), round(float(low), 2), round(float(high), 2)
        (0.67, 0.05, 1.0)
    """
    _check(confidence, n_boot, kind)
    named = isinstance(values, Mapping)
    try:
        arrays: dict[str, NDArray[Any]] = {
            key: np.asarray(array, dtype=np.float64) for key, array in (values if named else {"": values}).items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"values must be numbers, got {values!r:.60} ({error})") from None
    if any(array.ndim == 0 for array in arrays.values()):
        raise ValueError(f"values must be an array of rows, got {values!r:.60}")
    labels = _labels([len(array) for array in arrays.values()], groups)
    if statistic is mean and not named:
        shape = arrays[""].shape[1:]
        flat = arrays[""].reshape(len(labels), -1)
        found = _of_means(flat, labels, _kind_of(flat, kind), n_boot, seed, confidence)
    else:
        apply = statistic if named else lambda rows: statistic(rows[""])
        found, shape = _of_statistic(arrays, labels, apply, bounds, n_boot, seed, confidence)
    return _interval(found, shape)


def _check(confidence: float, n_boot: int, kind: str = "auto") -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if n_boot < 1:
        raise ValueError(f"n_boot must be 1 or more, got {n_boot}")
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")


def _labels(lengths: Sequence[int], groups: Sequence[Any] | NDArray[Any] | None) -> Int[ndarray, " n"]:
    """The rows' groups as numbers from 0."""
    known = {*lengths} | ({len(groups)} if groups is not None else set())
    if len(known) != 1 or 0 in known:
        raise ValueError(f"values and groups must be of one length above 0, got lengths {sorted(known)}")
    if groups is None:
        return np.arange(known.pop())
    return group_codes(groups)


def _interval(found: Sequence[ndarray], shape: tuple[int, ...]) -> Interval:
    if shape == ():
        return Interval(*(float(part.reshape(())) for part in found))
    return Interval(*(part.reshape(shape) for part in found))


def _kind_of(values: ndarray, kind: str) -> str:
    """What the values are; refuses those that are not what was said."""
    if kind == "auto":
        if not np.isin(values, (-1.0, 0.0, 1.0)).all():
            return "numbers"
        return "differences" if (values < 0).any() else "rates"
    least = {"rates": 0.0, "differences": -1.0, "score differences": -1.0}.get(kind)
    if least is not None and not ((values >= least) & (values <= 1)).all():
        raise ValueError(
            f"values must be between {least:g} and 1 to be {kind}, got {np.nanmin(values)} to {np.nanmax(values)}; use "
            "kind='numbers', or leave out missing ones"
        )
    return kind


def _of_means(
    values: Float[ndarray, "n cells"], labels: Int[ndarray, " n"], kind: str, n_boot: int, seed: int, confidence: float
) -> tuple[ndarray, ndarray, ndarray]:
    if kind == "rates":
        return clustered_shares(values, labels, confidence)
    if kind == "differences":
        return paired_shares(values, labels, confidence)
    if kind == "score differences":
        return bounded_means(values, labels, (-1.0, 1.0), confidence)
    return studentised_mean(values, labels, _times(labels, n_boot, seed), confidence)


def _times(labels: Int[ndarray, " n"], n_boot: int, seed: int) -> Float[ndarray, "n_boot n_groups"]:
    return counted(draw_groups(int(labels.max()) + 1, n_boot, seed))


def _of_statistic(
    arrays: Mapping[str, ndarray],
    labels: Int[ndarray, " n"],
    apply: Callable[[Any], Any],
    bounds: tuple[float | int, float | int] | None,
    n_boot: int,
    seed: int,
    confidence: float,
) -> tuple[tuple[ndarray, ndarray, ndarray], tuple[int, ...]]:
    """Estimate and ends [cells] of any statistic, and its shape."""
    n_groups = int(labels.max()) + 1
    members = [np.flatnonzero(labels == group) for group in range(n_groups)]

    def of(picked: Sequence[int] | ndarray) -> ndarray:
        rows = np.concatenate([members[group] for group in picked])
        return np.asarray(apply({key: array[rows] for key, array in arrays.items()}), dtype=np.float64)

    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.asarray(apply(dict(arrays)), dtype=np.float64)
        estimate = whole.ravel()
        if n_groups < 2:
            low = high = np.full_like(estimate, np.nan)
        else:
            without = np.stack([of(np.delete(np.arange(n_groups), g)).ravel() for g in range(n_groups)])
            resampled = np.stack([of(draw).ravel() for draw in draw_groups(n_groups, n_boot, seed)])
            low, high = _joined(estimate, without, resampled, confidence, _times(np.arange(n_groups), n_boot, seed))
    if bounds is not None:
        low, high = _bounded(estimate, low, high, n_groups, bounds, confidence)
    return (estimate, low, high), whole.shape


def _joined(
    estimate: Float[ndarray, " cells"],
    without: Float[ndarray, "n_groups cells"],
    resampled: Float[ndarray, "n_boot cells"],
    confidence: float,
    times: Float[ndarray, "n_boot n_groups"],
) -> tuple[ndarray, ndarray]:
    """The hull of the studentised interval of the pseudo-values and of the BCa interval."""
    n_groups = len(without)
    pseudo = n_groups * estimate - (n_groups - 1) * without
    centre, low, high = studentised_mean(pseudo, np.arange(n_groups), times, confidence)
    low, high = estimate + low - centre, estimate + high - centre
    level = (1 - confidence) / 2
    for cell in range(len(estimate)):
        draws, jack = resampled[:, cell], without[:, cell]
        draws = np.sort(draws[np.isfinite(draws)])
        jack = jack[np.isfinite(jack)]
        if not len(draws) or not np.isfinite(estimate[cell]):
            continue
        tails = _bca(draws, jack, float(estimate[cell]), level, n_groups)
        ends = np.quantile(draws, tails)
        low[cell] = np.fmin(low[cell], min(ends[0], estimate[cell]))
        high[cell] = np.fmax(high[cell], max(ends[1], estimate[cell]))
    return low, high


def _bca(draws: ndarray, jack: ndarray, estimate: float, level: float, n_groups: int) -> tuple[float, float]:
    """The two shares of the sorted draws that are the ends; Student's t stands for the normal quantile (small samples)."""
    below = ((draws < estimate).sum() + 0.5 * (draws == estimate).sum()) / len(draws)
    z0 = float(ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws))))
    off = jack.mean() - jack if len(jack) else np.zeros(1)
    size = float((off**2).sum()) ** 1.5
    a = float((off**3).sum()) / (6 * size) if size > 0 else 0.0
    reach = float(stdtrit(n_groups - 1, 1 - level)) * float(np.sqrt(n_groups / (n_groups - 1)))
    out = []
    for z in (-reach, reach):
        turned = z0 + z
        # Beyond this the correction turns round; the plain quantile stands there.
        steep = 1 - a * turned
        out.append(float(ndtr(z0 + turned / steep if steep > 0.1 else z)))
    return out[0], out[1]


def _bounded(
    estimate: ndarray,
    low: ndarray,
    high: ndarray,
    n_groups: int,
    bounds: tuple[float | int, float | int],
    confidence: float,
) -> tuple[ndarray, ndarray]:
    """Ends within bounds; an estimate at a bound is as sure as a rate that all groups agree on."""
    least, most = bounds
    if not least < most:
        raise ValueError(f"bounds must be the least and the largest value, got {bounds}")
    share = np.clip((estimate - least) / (most - least), 0.0, 1.0)
    known = np.isfinite(share)
    exact = clopper_pearson(np.where(known, share, 0.5), float(n_groups), confidence)
    at_low, at_high = known & (share <= 0), known & (share >= 1)
    low = np.where(at_high, np.fmin(low, least + (most - least) * exact[1]), low)
    high = np.where(at_low, np.fmax(high, least + (most - least) * exact[2]), high)
    return np.clip(low, least, most), np.clip(high, least, most)


def ratio_of_means(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """mean(numerator) / mean(denominator) of paired rows, with Fieller's interval; cell by cell over trailing axes.

    Args:
        numerator: [n, ...].
        denominator: [n, ...] the same rows.
        groups: n labels to cluster by; None: every row is its own group.
        n_boot: Number of resamples.
        seed: Seed of the generator.
        confidence: Coverage aimed at.

    Returns:
        ``(ratio, low, high)``. The ends are NaN where no bounded interval has that coverage, because the denominator's mean is not
        clear of 0, or where there is one group.

    Raises:
        ValueError: If the two differ in shape, there are no rows, or an option is out of range.

    Example:
        >>> [round(x, 2) for x in ratio_of_means([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0])]
        [0.5, 0.5, 0.5]
    """
    _check(confidence, n_boot)
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if top.shape != bottom.shape:
        raise ValueError(f"numerator and denominator must be of the same shape, got {top.shape} and {bottom.shape}")
    labels = _labels([len(top)], groups)
    found = fieller(
        top.reshape(len(labels), -1),
        bottom.reshape(len(labels), -1),
        labels,
        _times(labels, n_boot, seed),
        confidence,
    )
    return _interval(found, top.shape[1:])


def rate_ci(successes: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """Exact (Clopper-Pearson) interval of a rate of independent trials; of trials that share groups, :func:`clustered_rate`.

    Args:
        successes: How many of them succeeded.
        trials: How many there were.
        confidence: Coverage, between 0 and 1.

    Returns:
        ``(rate, low, high)``.

    Raises:
        ValueError: If ``trials`` is below 1 or ``successes`` is not in [0, trials], or confidence is out of range.

    Example:
        >>> [round(x, 3) for x in rate_ci(0, 72)]
        [0.0, 0.0, 0.05]
    """
    _check(confidence, 1)
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"successes must be in [0, trials] and trials above 0, got {successes} of {trials}")
    return _interval(clopper_pearson(np.array([successes / trials]), float(trials), confidence), ())


def clustered_rate(
    hits: ArrayLike, groups: Sequence[Any] | NDArray[Any] | None = None, *, confidence: float = 0.95
) -> Interval:
    """A rate and its bounds where trials share groups (Korn and Graubard); exact where none do.

    Args:
        hits: [n, ...] booleans, or 0 and 1.
        groups: n labels to cluster by; None: every trial is its own group.
        confidence: Coverage, between 0 and 1.

    Returns:
        ``(rate, low, high)``; never a point.

    Raises:
        ValueError: If there are no trials, lengths differ, a hit is neither 0 nor 1, or confidence is out of range.

    Example:
        >>> [round(x, 2) for x in clustered_rate([0] * 24, ["a", "b", "c", "d", "e", "f"] * 4)]
        [0.0, 0.0, 0.46]
    """
    return cluster_bootstrap(np.asarray(hits, dtype=np.float64), groups, kind="rates", confidence=confidence)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    *,
    scores: bool = False,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Interval of mean(first) - mean(second), where row i of both is the same trial under two conditions.

    Args:
        first: [n] numbers or successes under the first condition.
        second: [n] the same trials under the second. Where all of both are 0 or 1 it is a difference of rates, which does not
            give a point when nothing changed.
        groups: n labels to cluster by; None: every row is its own group.
        scores: Whether both are scores that lie in [0, 1] by what they are, such as VQA accuracy. Their difference does not give a point either.
        n_boot: Number of resamples.
        seed: Seed of the generator.
        confidence: Coverage aimed at.

    Returns:
        ``(difference, low, high)``.

    Raises:
        ValueError: If the two differ in shape, scores are outside [0, 1], or as :func:`cluster_bootstrap` does.

    Example:
        >>> [round(end, 2) for end in paired_difference([0.3, 1.0, 0.6] * 4, [0.3, 1.0, 0.6] * 4, scores=True)]
        [0.0, -0.26, 0.26]
    """
    try:
        a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"first and second must be numbers, got {first!r:.40} and {second!r:.40} ({error})") from None
    if a.shape != b.shape:
        raise ValueError(f"first and second must be of the same shape, got {a.shape} and {b.shape}")
    for name, part in (("first", a), ("second", b)) if scores else ():
        if not ((part >= 0) & (part <= 1)).all():
            raise ValueError(
                f"{name} must be between 0 and 1 to be scores, got {np.nanmin(part)} to {np.nanmax(part)}; take scores=False, or leave out "
                "missing ones"
            )
    kind = "differences" if are_binary(a, b) else "score differences" if scores else "numbers"
    return cluster_bootstrap(a - b, groups, kind=kind, n_boot=n_boot, seed=seed, confidence=confidence)


def are_binary(*values: ArrayLike) -> bool:
    """Whether all values (missing ones apart) are 0 or 1, so that their differences are differences of rates."""
    return all(bool((np.isin(part, (0.0, 1.0)) | np.isnan(part)).all()) for part in map(np.asarray, values))


def log_interval(
    estimate: Float[ndarray, " cells"],
    resampled: Float[ndarray, "n_boot cells"],
    *,
    n_groups: int,
    confidence: float = 0.95,
) -> Interval:
    """Interval of positive ratios (of variances, of energies) from resamples that the caller made, on the logarithm.

    The resamples' mean less the estimate is how far the estimate itself is off; both are corrected for:
    exp(2 log estimate - mean log resampled -+ t sd), with Student's t and the standard deviation widened by
    sqrt(n / (n - 1)) for n groups.

    Args:
        estimate: [cells] above 0.
        resampled: [n_boot, cells] of resamples; those that are missing or not above 0 are left out.
        n_groups: How many groups were resampled.
        confidence: Coverage aimed at.

    Returns:
        ``(estimate, low, high)``; the ends are NaN where the estimate is not above 0, or of fewer than two resamples or groups.
    """
    usable = np.where(np.isfinite(resampled) & (resampled > 0), resampled, np.nan)
    low, high = np.full(len(estimate), np.nan), np.full(len(estimate), np.nan)
    if n_groups > 1:
        reach = float(stdtrit(n_groups - 1, 0.5 + confidence / 2)) * float(np.sqrt(n_groups / (n_groups - 1)))
        for cell in range(len(estimate)):
            draws = np.log(usable[np.isfinite(usable[:, cell]), cell])
            if len(draws) > 1 and estimate[cell] > 0:
                centre = 2 * np.log(estimate[cell]) - draws.mean()
                low[cell], high[cell] = np.exp(centre + reach * draws.std(ddof=1) * np.array([-1.0, 1.0]))
    return Interval(estimate, low, high)
