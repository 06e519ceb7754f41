"""How far judges agree on the same answers: Cohen's and Fleiss' kappa, with intervals clustered by item.

    verdicts = pd.concat([judge_store(store, judge) for judge in judges])
    judge_agreement(verdicts)

Kappa = (observed - expected) / (1 - expected) agreement. Cohen's expects what two judges with their own rates would share by chance, Fleiss' what several
judges with one common rate would. 1 is perfect agreement, 0 is chance. It is not a number where every judge says the same of every answer: then
nothing tells agreement from habit; the share of equal verdicts ("agreement") is beside it. Answers that a judge could not judge are left out and counted.

Source: Cohen 1960; Fleiss 1971. Intervals: :func:`care_lens.core.cluster_bootstrap`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int
from numpy import ndarray

from care_lens.core.outcome import Verdict
from care_lens.core.stats import Interval, cluster_bootstrap, clustered_rate
from care_lens.evaluation.metrics import group_of, records, without_blanks

#: What an answer is in a frame of verdicts.
ANSWER = ("defence", "channel", "id", "group", "seed")


def cohen_kappa(
    first: Sequence[Any],
    second: Sequence[Any],
    groups: Sequence[Any] | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Cohen's kappa of two judges.

    Args:
        first: n labels, of any kind.
        second: n labels of the same answers.
        groups: n labels to cluster by; None: every answer is its own group.
        n_boot: Resamples of whole groups.
        seed: Their seed.
        confidence: Coverage of the interval.

    Returns:
        ``(kappa, low, high)``; NaN where both judges say one thing of everything, and without bounds where there is one group.

    Raises:
        ValueError: If the two differ in length or are empty.

    Example:
        >>> kappa = cohen_kappa(["yes"] * 20 + ["no"] * 15 + ["yes"] * 5 + ["no"] * 10, ["yes"] * 20 + ["no"] * 15 + ["no"] * 5 + ["yes"] * 10)
        >>> round(kappa.estimate, 1)
        0.4
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(
            f"first and second must be one label each for one or more answers, got {len(first)} and {len(second)}"
        )
    codes = _codes([*first, *second]).reshape(2, -1).T
    return _kappa(codes, _cohen, groups, n_boot, seed, confidence)


def fleiss_kappa(
    ratings: Sequence[Sequence[Any]],
    groups: Sequence[Any] | None = None,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Fleiss' kappa of several judges who have all judged every answer.

    Args:
        ratings: For each answer its labels, one from each judge.
        groups: A label for each answer to cluster by; None: every answer is its own group.
        n_boot: Resamples of whole groups.
        seed: Their seed.
        confidence: Coverage of the interval.

    Returns:
        ``(kappa, low, high)``; NaN where all judges say one thing of everything.

    Raises:
        ValueError: If there are no answers, fewer than two judges, or not as many labels for each answer.

    Example:
        >>> round(fleiss_kappa([["yes", "yes", "no"], ["no", "no", "no"], ["yes", "yes", "yes"], ["no", "no", "yes"]]).estimate, 2)
        0.33
    """
    sizes = {len(row) for row in ratings}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"ratings must be as many labels for each answer, 2 or more, got {sorted(sizes)}")
    codes = _codes([label for row in ratings for label in row]).reshape(len(ratings), -1)
    return _kappa(codes, _fleiss, groups, n_boot, seed, confidence)


def judge_agreement(
    verdicts: pd.DataFrame, *, by_channel: bool = False, n_boot: int = 2000, seed: int = 0, confidence: float = 0.95
) -> pd.DataFrame:
    """How far the judges of a frame of verdicts agree: every pair, and all of them.

    Args:
        verdicts: Frames of :func:`~care_lens.evaluation.judging.judge_store` of several judges, one below the other.
        by_channel: Whether each channel has rows of its own.
        n_boot: Resamples of whole groups.
        seed: Their seed.
        confidence: Coverage of the intervals.

    Returns:
        Frame with the columns channel ("all" unless ``by_channel``), first, second (judges; "all" and "" of all together), metric ("agreement", "cohen-kappa" for pairs;
        "fleiss-kappa" for three or more), value, ci_low, ci_high, n (answers counted), missing (answers that one of them could not judge), groups.

    Raises:
        ValueError: If there are fewer than two judges, a judge judged an answer twice, or the judges did not judge the same answers.
    """
    lacking = [column for column in (*ANSWER, "judge", "verdict") if column not in verdicts.columns]
    if lacking:
        raise ValueError(f"verdicts must be frames of judge_store, got none of the columns {lacking}")
    verdicts = without_blanks(verdicts)
    judges = list(dict.fromkeys(verdicts["judge"]))
    if len(judges) < 2:
        raise ValueError(f"verdicts must be of two judges or more, got {judges}; join their frames with pandas.concat")
    said = _by_answer(verdicts, judges)
    channels = dict.fromkeys(answer[1] for answer in said) if by_channel else {"all": None}
    options = {"n_boot": n_boot, "seed": seed, "confidence": confidence}
    rows = []
    for channel in channels:
        here = {answer: held for answer, held in said.items() if not by_channel or answer[1] == channel}
        for pair in itertools.combinations(judges, 2):
            names = {"channel": channel, "first": pair[0], "second": pair[1]}
            codes, groups, missing = _judged(here, pair)
            counts = {"n": len(codes), "missing": missing, "groups": len(set(groups))}
            same = clustered_rate(codes[:, 0] == codes[:, 1], groups, confidence=confidence) if len(codes) else _NOTHING
            rows.append({**names, "metric": "agreement", **_figure(same), **counts})
            kappa = _kappa(codes, _cohen, groups, n_boot, seed, confidence) if len(codes) else _NOTHING
            rows.append({**names, "metric": "cohen-kappa", **_figure(kappa), **counts})
        if len(judges) > 2:
            codes, groups, missing = _judged(here, judges)
            kappa = _kappa(codes, _fleiss, groups, *options.values()) if len(codes) else _NOTHING
            names = {"channel": channel, "first": "all", "second": "", "metric": "fleiss-kappa"}
            rows.append({**names, **_figure(kappa), "n": len(codes), "missing": missing, "groups": len(set(groups))})
    return pd.DataFrame(rows)


_NOTHING = Interval(float("nan"), float("nan"), float("nan"))


def _figure(found: Interval) -> dict[str, float]:
    return {"value": found.estimate, "ci_low": found.low, "ci_high": found.high}


def _by_answer(verdicts: pd.DataFrame, judges: Sequence[str]) -> dict[tuple[Any, ...], dict[str, str]]:
    """Verdicts by answer, then by judge."""
    said: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in records(verdicts):
        held = said.setdefault(tuple(row[column] for column in ANSWER), {})
        if row["judge"] in held:
            raise ValueError(
                f"verdicts must be one for each judge and answer, got two of {row['judge']!r} for {row['id']!r}"
            )
        held[row["judge"]] = row["verdict"]
    if odd := [answer for answer, held in said.items() if len(held) < len(judges)]:
        lack = sorted({*judges} - {*said[odd[0]]})
        raise ValueError(
            f"judges must judge the same answers, got {len(odd)} that some did not, such as {odd[0]} without {lack}"
        )
    return said


def _judged(
    said: dict[tuple[Any, ...], dict[str, str]], wanted: Sequence[str]
) -> tuple[Int[ndarray, "answers judges"], list[str], int]:
    """Codes of the verdicts that some of the judges gave, the answers' groups, and how many answers one of them could not judge."""
    rows, groups = [], []
    for answer, held in said.items():
        given = [Verdict(held[judge]) for judge in wanted]
        if Verdict.MISSING not in given:
            rows.append([list(Verdict).index(verdict) for verdict in given])
            groups.append(group_of(dict(zip(ANSWER, answer, strict=True))))
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(wanted)), groups, len(said) - len(rows)


def _codes(labels: Sequence[Any]) -> Int[ndarray, " labels"]:
    known: dict[Any, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)


def _kappa(
    codes: Int[ndarray, "answers judges"],
    statistic: Callable[[Int[ndarray, "answers judges"]], float],
    groups: Sequence[Any] | None,
    n_boot: int,
    seed: int,
    confidence: float,
) -> Interval:
    if not np.isfinite(statistic(codes)):
        return _NOTHING

    def of(rows: ndarray) -> float:
        return statistic(rows.astype(np.int64))

    return cluster_bootstrap(
        codes, groups, statistic=of, bounds=(-1, 1), n_boot=n_boot, seed=seed, confidence=confidence
    )


def _cohen(codes: Int[ndarray, "answers 2"]) -> float:
    first, second = (np.bincount(codes[:, side], minlength=int(codes.max()) + 1) / len(codes) for side in (0, 1))
    return _beyond_chance(float((codes[:, 0] == codes[:, 1]).mean()), float(first @ second))


def _fleiss(codes: Int[ndarray, "answers judges"]) -> float:
    judges = codes.shape[1]
    counts = (codes[:, :, None] == np.arange(int(codes.max()) + 1)).sum(axis=1)
    pairs = (counts * (counts - 1)).sum(axis=1) / (judges * (judges - 1))
    shares = counts.sum(axis=0) / codes.size
    return _beyond_chance(float(pairs.mean()), float(shares @ shares))


def _beyond_chance(observed: float, expected: float) -> float:
    return (observed - expected) / (1 - expected) if expected < 1 else float("nan")
