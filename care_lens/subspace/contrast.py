"""What "malicious against benign" means: the two matrices of the pencil, from the moments of the classes."""

from typing import Literal, get_args

import torch

from care_lens.subspace.errors import SubspaceError, TooFewRowsError, WidthError
from care_lens.subspace.moments import Moments
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance, Target, shrink

Contrast = Literal["covariance", "second_moment", "mean"]
Metric = Literal["benign", "identity"]


def class_moments(
    benign: torch.Tensor, malicious: torch.Tensor, contrast: Contrast, metric: Metric
) -> tuple[Moments, Moments]:
    """Moments of the two classes, each with as many rows as the contrast needs; errors as for
    ``SafetySubspace.fit``."""
    _check_options(contrast, metric)
    least = _least(contrast, metric)
    moments = (
        Moments.from_rows(benign, name="benign", least=least[0]),
        Moments.from_rows(malicious, name="malicious", least=least[1]),
    )
    check_classes(*moments, contrast, metric)
    return moments


def check_classes(benign: Moments, malicious: Moments, contrast: Contrast, metric: Metric) -> None:
    """Refuse moments that no pencil can be made of, however they came about.

    Raises:
        TooFewRowsError: If a class has fewer rows than the contrast needs.
        WidthError: If the classes differ in width.
        SubspaceError: If contrast or metric is unknown.
    """
    _check_options(contrast, metric)
    for name, of, least in zip(("benign", "malicious"), (benign, malicious), _least(contrast, metric), strict=True):
        if of.count < least:
            raise TooFewRowsError(f"{name} must have {least} rows or more, got {of.count}; give more examples")
    if benign.width != malicious.width:
        raise WidthError(
            f"benign and malicious must be equally wide, got {benign.width} and {malicious.width}; "
            "take both from one site of one model"
        )


def _least(contrast: Contrast, metric: Metric) -> tuple[int, int]:
    """How many rows each class needs."""
    return 2 if metric == "benign" else 1, 1 if contrast == "mean" else 2


def _check_options(contrast: Contrast, metric: Metric) -> None:
    for name, value, options in (
        ("contrast", contrast, get_args(Contrast)),
        ("metric", metric, get_args(Metric)),
    ):
        if value not in options:
            raise SubspaceError(f"{name} must be one of {options}, got {value!r}")


def pencil(
    benign: Moments,
    malicious: Moments,
    *,
    contrast: Contrast,
    metric: Metric,
    shrinkage: Shrinkage,
    target: Target = "identity",
) -> tuple[ShrunkCovariance, ShrunkCovariance]:
    """C_m and the metric (C_b, or the identity) of ``C_m u = lambda C_b u``.

    "covariance": the malicious covariance, shrunk. "second_moment": that, plus ``delta delta^T`` with
    ``delta = mean_malicious - mean_benign`` (added after shrinking): the second moment about the benign mean.
    "mean": ``delta delta^T`` alone.
    """
    delta = malicious.mean - benign.mean
    if contrast == "mean":
        numerator = ShrunkCovariance(0.0, delta[:, None])
    else:
        numerator = shrink(malicious, shrinkage, target=target)
        if contrast == "second_moment":
            numerator = numerator.plus(delta)
    identity = metric == "identity"
    return numerator, (
        ShrunkCovariance.identity(benign.width) if identity else shrink(benign, shrinkage, target=target, floor=True)
    )
