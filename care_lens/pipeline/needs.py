"""What a run needs of its study, in numbers, checked before the first forward pass.

A gate that may touch a share epsilon of benign prompts needs n >= 1/epsilon - 1 of them in each half of the calibration split; a
subspace of rank k by the covariance contrast needs k + 1 malicious examples, by second moments k; a pair set needs two items.

    settings = require_feasible(study, settings)  # raises, or leaves out what cannot be done, and says so
    settings = shortened(study, RunSettings())  # settings for a quick look at any study
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from care_lens.core.errors import CareLensError
from care_lens.data.study import Study, StudyError
from care_lens.pipeline.settings import RunSettings, Size
from care_lens.repair import halves
from care_lens.repair.gate import needed_for

log = logging.getLogger(__name__)

#: Benign examples that a covariance needs to be invertible with shrinkage.
_LEAST_BENIGN = 4
#: The smallest half of the calibration split with which a quick look makes sense: one prompt in three may be touched.
_LEAST_HALF = 2


class NeedsError(CareLensError, ValueError):
    """The study is too small for the settings; the message says how much is needed of what."""


def require_ready(study: Study, settings: RunSettings) -> RunSettings:
    """Refuse a study that lacks what the steps need or is too small for the settings, all gaps at once.

    Returns:
        As :func:`require_feasible`.

    Raises:
        StudyError: If something is lacking; where the study is too small besides, that is in the message too.
        NeedsError: If it is too small alone.
    """
    try:
        study.require()
    except StudyError as lacking:
        try:
            require_feasible(study, settings)
        except NeedsError as small:
            raise StudyError(f"{lacking}; and {small}") from None
        raise
    return require_feasible(study, settings)


def require_feasible(study: Study, settings: RunSettings) -> RunSettings:
    """The settings that the study can carry, with a warning for each that is left out; nothing is run.

    Args:
        study: as it will be run, limited already.
        settings: of the run.

    Returns:
        The settings, without epsilons and reader ranks for which there are too few examples.

    Raises:
        NeedsError: if no epsilon, no reader rank or the rank of the printed form cannot be had, or a pair set has one item only;
            it lists all gaps with the numbers needed.
    """
    half, counts = _smallest_half(study, settings), _malicious(study)
    gaps = []
    epsilons = [e for e in settings.epsilons if needed_for(e) <= half]
    if not epsilons:
        best = max(settings.epsilons)
        gaps.append(
            f"calibration: a gate at epsilon {best:g} needs {needed_for(best)} benign prompts in each half of the split, cut by item, got {half}; "
            f"give at least {2 * needed_for(best)} of many items, or an epsilon of {_epsilon(half)} or more"
        )
    ranks = [r for r in settings.reader_ranks if min(counts.values(), default=0) >= max(r, 1)]
    if not ranks:
        least = min(settings.reader_ranks)
        gaps.append(f"fit: readers of rank {least} need {max(least, 1)} examples in each modality, got {counts}")
    if any(n <= settings.printed_rank for n in counts.values()):
        gaps.append(
            f"fit: the subspaces of rank {settings.printed_rank}, those of published CARE, need {settings.printed_rank + 1} examples in each seen modality, got "
            f"{counts}; give more, or a smaller printed_rank"
        )
    if len(study.benign("fit")) < _LEAST_BENIGN:
        gaps.append(f"fit: {_LEAST_BENIGN} benign examples are needed, got {len(study.benign('fit'))}")
    gaps += _pair_gaps(study, settings)
    _refuse(gaps)
    for what, asked, kept in (
        ("epsilons", settings.epsilons, epsilons),
        ("reader ranks", settings.reader_ranks, ranks),
    ):
        if left := [value for value in asked if value not in kept]:
            log.warning(
                "%s %s are left out: the halves of the calibration split have %d prompts or more, the seen modalities %s examples",
                what, left, half, counts,
            )  # fmt: skip
    return replace(settings, epsilons=tuple(epsilons), reader_ranks=tuple(ranks))


def require_diagnosable(study: Study, settings: RunSettings) -> None:
    """Refuse a study that step 1 alone cannot be run on; nothing is run.

    Args:
        study: as it will be run, limited already.
        settings: of the run.

    Raises:
        NeedsError: if a pair set has one item only, there is no seen attack in the fit split to ablate on, or no benign example to take the
            mean over; it lists all gaps.
    """
    gaps = _pair_gaps(study, settings)
    if not any(study.malicious("fit", modality) for modality in study.seen):
        gaps.append("fit: ablation needs examples of a seen attack channel, got none; name one in seen")
    if not study.benign("fit"):
        gaps.append("fit: ablation needs a benign example to take the mean over, got none; give some")
    _refuse(gaps)


def _pair_gaps(study: Study, settings: RunSettings) -> list[str]:
    gaps = []
    for name, pairs in study.pairs.items():
        items = len(set(pairs[: settings.pairs].groups))
        if len(pairs) and items < 2:
            gaps.append(
                f"pairs: {name!r} needs pairs of 2 items or more for intervals, got {items}; give more or leave the set out"
            )
    return gaps


def _refuse(gaps: Sequence[str]) -> None:
    if gaps:
        raise NeedsError(f"the study must be large enough for the settings: {'; '.join(gaps)}")


def shortened(
    study: Study, settings: RunSettings, size: Size = "short", *, given: Mapping[str, Any] | None = None
) -> RunSettings:
    """Settings for a part of the study that it can carry: fewer examples, and epsilons and ranks that go with them, each said in a warning.

    Args:
        study: not limited yet.
        settings: of a full run.
        size: "short", a quick look; "compact"; or "full", for the settings as they are.
        given: settings by name that stay as they are given, whatever the size.

    Returns:
        What `RunSettings.sized` gives, made feasible. Of a study that is too small for any settings `require_feasible` says so.
    """
    given = given or {}
    short = replace(settings.sized(size), **given)
    if short.limit is None:
        return short
    few = short.part(study)
    half, counts = _smallest_half(few, short), _malicious(few)
    learned = "" if short.learn_limit is None else f" ({short.learn_limit} where it is learned from)"
    said = [f"at most {short.limit} examples a channel{learned} and {short.pairs} pairs"]
    if "epsilons" not in given and half >= _LEAST_HALF and not any(needed_for(e) <= half for e in short.epsilons):
        short = replace(short, epsilons=(_epsilon(half),))
        said.append(
            f"epsilon {short.epsilons[0]:g}, since the halves of the calibration split have {half} benign prompts"
        )
    most = min(counts.values(), default=0) - 1
    if 1 <= most < short.printed_rank:
        short = replace(short, printed_rank=most)
        said.append(f"published CARE of rank {most}, since a seen modality has {most + 1} examples")
    ranks = tuple(r for r in short.reader_ranks if r <= most + 1)
    if "reader_ranks" not in given and ranks and ranks != short.reader_ranks:
        short = replace(short, reader_ranks=ranks)
        said.append(f"reader ranks {list(ranks)}")
    log.warning("%s: %s; the figures are not to be quoted", size, "; ".join(said))
    return short


def _smallest_half(study: Study, settings: RunSettings) -> int:
    return min(map(len, halves(study.benign("calibration"), seed=settings.seed)))


def _malicious(study: Study) -> dict[str, int]:
    """Examples of the fit split by seen modality; modalities without any are not learned."""
    found = {m: len(study.malicious("fit", m)) for m in study.seen}
    return {modality: n for modality, n in found.items() if n}


def _epsilon(half: int) -> float:
    """The smallest epsilon of two decimals for which so many prompts are enough."""
    return math.ceil(100 / (half + 1) - 1e-9) / 100
