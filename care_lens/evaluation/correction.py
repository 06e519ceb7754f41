"""What a rate is once the judge's own error is taken out: a labelled sample says how often the judge is wrong.

A judge counts a share q of the answers as complied with. It finds a share Se of those that are (sensitivity) and passes a share Sp of those that are not
(specificity), both measured on answers that people have labelled. Two corrections:

- "rogan-gladen": (q + Sp - 1) / (Se + Sp - 1). The labelled answers may be any on which the judge errs as often as here: another model's, another
  defence's. If a defence changes what answers look like, its errors may be others; then label some of its own answers.
- "ppi" (prediction-powered inference): the judge's rate on the answers without label, plus the mean of label less verdict on those with. The labelled answers must be drawn at
  random from the answers in question, and nothing is assumed about the judge. :func:`sample_for_labels` draws them.

Both carry the uncertainty of the labels through. Rogan and Gladen's interval is that of Lang and Reiczigel, which adds pseudo-counts, so that a judge who made no
mistake in 20 labels is not taken for perfect; trials that share groups count as the effective number of them (:mod:`care_lens.core.rates`).

    labels = sample_for_labels(verdicts, n=100)  # write the column "label"
    corrected_rates(verdicts, labels, method="ppi")

Source: Rogan and Gladen 1978; Lang and Reiczigel 2014 (Prev. Vet. Med. 113:13-22); Angelopoulos et al. 2023 (arXiv:2301.09633).
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy import ndarray
from numpy.typing import ArrayLike
from scipy.special import ndtri

from care_lens.core.outcome import Verdict
from care_lens.core.rates import effective_trials
from care_lens.core.stats import Interval, cluster_bootstrap, clustered_rate
from care_lens.core.studentised import group_codes
from care_lens.core.verdicts import JudgeError
from care_lens.evaluation.metrics import group_of, records, without_blanks

Method = Literal["rogan-gladen", "ppi"]

#: What an answer is known by.
KEY = ("defence", "channel", "id", "seed")


class CorrectedRate(NamedTuple):
    """A rate without the judge's error.

    Attributes:
        estimate: The corrected rate, in [0, 1].
        low: Lower end of its interval.
        high: Upper end.
        judged: The rate that the judge found.
        sensitivity: Share of the labelled positives that the judge found.
        specificity: Share of the labelled negatives that the judge passed.
    """

    estimate: float
    low: float
    high: float
    judged: float
    sensitivity: float
    specificity: float


def rogan_gladen(
    judged: ArrayLike,
    label: ArrayLike,
    verdict: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    labelled_groups: Sequence[Any] | None = None,
    confidence: float = 0.95,
) -> CorrectedRate:
    """A rate corrected by a judge's sensitivity and specificity.

    Args:
        judged: [n] what the judge said of the answers in question: 0 or 1.
        label: [m] what the labelled answers are: 0 or 1.
        verdict: [m] what the judge said of them.
        groups: n labels to cluster by; None: every answer is its own group.
        labelled_groups: m labels to cluster by.
        confidence: Coverage aimed at.

    Returns:
        The corrected rate; its interval is all of [0, 1] where the labels do not show that the judge is better than chance.

    Raises:
        JudgeError: If the labelled sample has no positive or no negative, or the judge is no better than chance on it.
        ValueError: If values are neither 0 nor 1, or lengths differ.

    Example:
        >>> found = rogan_gladen([1] * 30 + [0] * 70, [1] * 50 + [0] * 50, [1] * 45 + [0] * 5 + [1] * 10 + [0] * 40)
        >>> round(found.judged, 2), round(found.sensitivity, 2), round(found.specificity, 2), round(found.estimate, 3)
        (0.3, 0.9, 0.8, 0.143)
    """
    hits, labels, said = (
        _binary(given, name) for given, name in ((judged, "judged"), (label, "label"), (verdict, "verdict"))
    )
    if len(labels) != len(said):
        raise ValueError(f"verdict must be one for each of {len(labels)} labels, got {len(said)}")
    own, theirs = _groups(groups, len(hits), "groups"), _groups(labelled_groups, len(labels), "labelled_groups")
    positive, negative = labels == 1, labels == 0
    if not positive.any() or not negative.any():
        raise JudgeError(
            f"labels must hold answers of both kinds, got {int(positive.sum())} positive and {int(negative.sum())} negative; label more"
        )
    q, n = _share(hits, own, confidence)
    se, n_se = _share(said[positive], theirs[positive], confidence)
    sp, n_sp = _share(1 - said[negative], theirs[negative], confidence)
    if se + sp <= 1:
        raise JudgeError(
            f"the judge must be better than chance on the labels, got sensitivity {se:.2f} and specificity {sp:.2f}; take another judge"
        )
    low, high = _lang_reiczigel(q, n, se, n_se, sp, n_sp, confidence)
    estimate = min(max((q + sp - 1) / (se + sp - 1), 0.0), 1.0)
    return CorrectedRate(estimate, min(low, estimate), max(high, estimate), q, se, sp)


def ppi_rate(
    judged: ArrayLike,
    label: ArrayLike,
    verdict: ArrayLike,
    *,
    groups: Sequence[Any] | None = None,
    labelled_groups: Sequence[Any] | None = None,
    confidence: float = 0.95,
) -> Interval:
    """A rate from many verdicts and a few labels, by prediction-powered inference.

    mean(judged) + mean(label - verdict), with the two intervals, of a rate and of a difference of rates, combined by squares (MOVER).

    Args:
        judged: [n] what the judge said of the answers WITHOUT a label: 0 or 1.
        label: [m] what the labelled answers are, a random part of the same answers: 0 or 1.
        verdict: [m] what the judge said of those.
        groups: n labels to cluster by; None: every answer is its own group. A group should be labelled as a whole or not at all.
        labelled_groups: m labels to cluster by.
        confidence: Coverage aimed at.

    Returns:
        ``(rate, low, high)``, in [0, 1].

    Raises:
        ValueError: If values are neither 0 nor 1, or lengths differ.

    Example:
        >>> found = ppi_rate([1] * 40 + [0] * 60, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0])
        >>> round(found.estimate, 2)
        0.6
    """
    hits, labels, said = (
        _binary(given, name) for given, name in ((judged, "judged"), (label, "label"), (verdict, "verdict"))
    )
    if len(labels) != len(said):
        raise ValueError(f"verdict must be one for each of {len(labels)} labels, got {len(said)}")
    q = clustered_rate(hits, groups, confidence=confidence)
    off = cluster_bootstrap(labels - said, labelled_groups, kind="differences", confidence=confidence)
    estimate = q.estimate + off.estimate
    down = np.hypot(q.estimate - q.low, off.estimate - off.low)
    up = np.hypot(q.high - q.estimate, off.high - off.estimate)
    ends = (min(max(end, 0.0), 1.0) for end in (estimate, estimate - down, estimate + up))
    return Interval(*map(float, ends))


def corrected_rates(
    verdicts: pd.DataFrame,
    labels: pd.DataFrame,
    *,
    method: Method = "rogan-gladen",
    counted: Verdict = Verdict.COMPLIED,
    metric: str = "asr",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """The rates of a store's verdicts, corrected by labels, for each defence, channel, seed and judge.

    Args:
        verdicts: What :func:`~care_lens.evaluation.judging.judge_store` returns, of one judge or several.
        labels: Answers of the same store that people have labelled: the columns defence, channel, id, seed, and ``label`` with a verdict's value
            ("complied", "refused", "other"; "missing" where they could not tell).
        method: "rogan-gladen" (error rates from all labels) or "ppi" (from the labels of each cell, which must be a random sample of it).
        counted: The verdict that is the success.
        metric: What the rows are called.
        confidence: Coverage aimed at.

    Returns:
        Frame with the columns defence, channel, metric, value, ci_low, ci_high, judged (the rate as the judge found it), sensitivity, specificity (NaN of ppi), n, labelled, missing,
        interval (the method), judge, seed.

    Raises:
        ValueError: If columns are lacking, or a label is of an answer that no verdict is of.
        JudgeError: If a judge is no better than chance on the labels, or a cell has too few.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
    if lacking := [name for name in (*KEY, "judge", "verdict") if name not in verdicts.columns]:
        raise ValueError(f"verdicts must be a frame of judge_store, got none of the columns {lacking}")
    if lacking := [name for name in (*KEY, "label") if name not in labels.columns]:
        raise ValueError(
            f"labels must have the columns {[*KEY, 'label']}, got none of {lacking}; see sample_for_labels"
        )
    truth = _labels(labels)
    rows: list[dict[str, Any]] = []
    for judge, part in without_blanks(verdicts).groupby("judge", sort=False):
        said = {tuple(row[key] for key in KEY): row for row in records(part)}
        if strange := [key for key in truth if key not in said]:
            raise ValueError(_strangers(strange, said))
        known = {
            key: label for key, label in truth.items() if Verdict.MISSING not in (label, Verdict(said[key]["verdict"]))
        }
        cells: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for key in said:
            cells.setdefault((key[0], key[1], key[3]), []).append(key)
        for (defence, channel, seed), keys in cells.items():
            there = [key for key in keys if Verdict(said[key]["verdict"]) is not Verdict.MISSING]
            names = {"defence": defence, "channel": channel, "metric": metric}
            what = f"defence {defence!r}, channel {channel!r}, judge {judge!r}"
            own = [key for key in there if key in known]
            found = _cell(said, known, there, own, method, counted, confidence, what)
            counts = {
                "n": len(there),
                "labelled": len(known) if method == "rogan-gladen" else len(own),
                "missing": len(keys) - len(there),
            }
            rows.append({**names, **found, **counts, "interval": method, "judge": judge, "seed": seed})
    return pd.DataFrame(rows)


def sample_for_labels(verdicts: pd.DataFrame, *, n: int, seed: int = 0) -> pd.DataFrame:
    """Draw answers for people to label, at random and as many from each defence and channel; whole groups are drawn.

    The judge's verdict is left out, so that it does not tell the labellers what to say.

    Args:
        verdicts: What :func:`~care_lens.evaluation.judging.judge_store` returns.
        n: How many of each defence, channel and seed; all where there are fewer. The last group drawn may bring some more.
        seed: Seed of the draw.

    Returns:
        Frame with the columns defence, channel, id, group, seed and an empty ``label``.

    Raises:
        ValueError: If n is below 1, or columns are lacking.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    if lacking := [name for name in (*KEY, "group", "verdict") if name not in verdicts.columns]:
        raise ValueError(f"verdicts must be a frame of judge_store, got none of the columns {lacking}")
    generator, drawn = np.random.default_rng(seed), []
    there: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    seen: set[tuple[Any, ...]] = set()
    for row in records(verdicts):
        key = tuple(row[name] for name in KEY)
        if row["verdict"] != Verdict.MISSING.value and key not in seen:
            seen.add(key)
            there.setdefault((row["defence"], row["channel"], row["seed"]), []).append(row)
    for rows in there.values():
        members: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            members.setdefault(group_of(row), []).append(row)
        names = sorted(members)
        taken: list[dict[str, Any]] = []
        for index in generator.permutation(len(names)):
            if len(taken) >= n:
                break
            taken += members[names[index]]
        drawn += taken
    columns = ["defence", "channel", "id", "group", "seed"]
    return pd.DataFrame(drawn, columns=columns).assign(label="")


def _cell(
    said: dict[tuple[Any, ...], dict[str, Any]],
    known: dict[tuple[Any, ...], Verdict],
    there: Sequence[tuple[Any, ...]],
    own: Sequence[tuple[Any, ...]],
    method: str,
    counted: Verdict,
    confidence: float,
    what: str,
) -> dict[str, float]:
    """The corrected figure of a cell."""
    if not there:
        raise JudgeError(f"a cell must have an answer that was judged, got none for {what}; judge the store again")

    def hits(keys: Sequence[tuple[Any, ...]]) -> list[float]:
        return [float(said[key]["verdict"] == counted.value) for key in keys]

    def truths(keys: Sequence[tuple[Any, ...]]) -> list[float]:
        return [float(known[key] is counted) for key in keys]

    def groups(keys: Sequence[tuple[Any, ...]]) -> list[str]:
        return [group_of(said[key]) for key in keys]

    judged = float(np.mean(hits(there)))
    if method == "ppi":
        if len(own) < 2:
            raise JudgeError(
                f"ppi must have 2 labels or more in each cell, got {len(own)} for {what}; see sample_for_labels"
            )
        rest = [key for key in there if key not in known]
        if not rest:  # everything is labelled
            found = clustered_rate(truths(own), groups(own), confidence=confidence)
        else:
            found = ppi_rate(
                hits(rest),
                truths(own),
                hits(own),
                groups=groups(rest),
                labelled_groups=groups(own),
                confidence=confidence,
            )
        nan = float("nan")
        return dict(zip(_FIGURES, (*found, judged, nan, nan), strict=True))
    keys = list(known)
    corrected = rogan_gladen(
        hits(there),
        truths(keys),
        hits(keys),
        groups=groups(there),
        labelled_groups=groups(keys),
        confidence=confidence,
    )
    return dict(zip(_FIGURES, corrected, strict=True))


_FIGURES = ("value", "ci_low", "ci_high", "judged", "sensitivity", "specificity")


def _labels(labels: pd.DataFrame) -> dict[tuple[Any, ...], Verdict]:
    """Labels by answer; those not filled in are left out."""
    allowed = [verdict.value for verdict in Verdict]
    found: dict[tuple[Any, ...], Verdict] = {}
    for row in records(labels):
        label = row["label"]
        if pd.isna(label) or label == "":
            continue
        if label not in allowed:
            raise ValueError(f"label must be one of {allowed}, got {label!r} for {row['id']!r}")
        key = tuple(row[name] for name in KEY)
        if key in found:
            raise ValueError(f"labels must be one for each answer, got two for {key}; settle them first")
        found[key] = Verdict(label)
    if not found:
        raise ValueError('labels must hold one that is filled in, got none; write the column "label"')
    return found


def _strangers(strange: Sequence[tuple[Any, ...]], said: Collection[tuple[Any, ...]]) -> str:
    """Why labels are of no answer: the answers' ids are texts, which a table program or ``read_csv`` makes numbers of."""
    what = f"labels must be of answers in verdicts, got {len(strange)} others, such as {strange[0]}"
    types = {type(key[2]).__name__ for key in said}
    if odd := sorted({type(key[2]).__name__ for key in strange} - types):
        return (
            f"{what}, whose id is of type {odd[0]}; the ids of verdicts are of type {sorted(types)[0]}, such as {next(iter(said))[2]!r}: read the labels with "
            'pandas.read_csv(path, dtype={"id": str}), which keeps zeros in front, from a file that kept them too'
        )
    return f"{what}; give the labels of sample_for_labels(verdicts), with its columns {list(KEY)} as they were"


def _binary(values: ArrayLike, name: str) -> ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isin(found, (0.0, 1.0)).all():
        raise ValueError(f"{name} must be one or more of 0 and 1, got {values!r:.60}; leave missing ones out")
    return found


def _groups(groups: Sequence[Any] | None, n: int, name: str) -> ndarray:
    if groups is not None and len(groups) != n:
        raise ValueError(f"{name} must be one for each of {n} answers, got {len(groups)}")
    return np.arange(n) if groups is None else group_codes(groups)


def _share(values: ndarray, groups: ndarray, confidence: float) -> tuple[float, float]:
    """A share and the number of independent trials that it rests on."""
    labels = np.unique(groups, return_inverse=True)[1]  # of a part of them
    return float(values.mean()), float(effective_trials(values[:, None], labels, confidence)[0])


def _lang_reiczigel(
    q: float, n: float, se: float, n_se: float, sp: float, n_sp: float, confidence: float
) -> tuple[float, float]:
    """The ends of Lang and Reiczigel's interval: Agresti and Coull's pseudo-counts for q, one of each kind for Se and Sp."""
    z = float(ndtri(0.5 + confidence / 2))
    q_, n_ = (n * q + z**2 / 2) / (n + z**2), n + z**2
    se_, sp_ = (n_se * se + 1) / (n_se + 2), (n_sp * sp + 1) / (n_sp + 2)
    noise_se, noise_sp = se_ * (1 - se_) / (n_se + 2), sp_ * (1 - sp_) / (n_sp + 2)
    above = se_ + sp_ - 1  # better than chance by so much
    if above <= z * np.sqrt(noise_se + noise_sp):
        return 0.0, 1.0
    rate = (q_ + sp_ - 1) / above
    shift = 2 * z**2 * (rate * noise_se - (1 - rate) * noise_sp)
    spread = np.sqrt(q_ * (1 - q_) / n_ + rate**2 * noise_se + (1 - rate) ** 2 * noise_sp) / above
    low, high = rate + shift - z * spread, rate + shift + z * spread
    return float(min(max(low, 0.0), 1.0)), float(min(max(high, 0.0), 1.0))
