"""What "malicious against benign" means: the two matrices of the pencil, from the moments of the classes."""

from typing import Literal, get_args

import torch

from care_lens.subspace.errors import SubspaceError, WidthError
from care_lens.subspace.moments import Moments
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance, shrink

Contrast = Literal["covariance", "second_moment", "mean"]
Metric = Literal["benign", "identity"]


def class_moments(
    benign: torch.Tensor, malicious: torch.Tensor, contrast: Contrast, metric: Metric
) -> tuple[Moments, Moments]:
    """Moments of the two classes, each with as many rows as the contrast needs; errors as for
    ``SafetySubspace.fit``."""
    for name, value, options in (
        ("contrast", contrast, get_args(Contrast)),
        ("metric", metric, get_args(Metric)),
    ):
        if value not in options:
            raise SubspaceError(f"{name} must be one of {options}, got {value!r}")
    moments = (
        Moments.from_rows(benign, name="benign", least=2 if metric == "benign" else 1),
        Moments.from_rows(malicious, name="malicious", least=1 if contrast == "mean" else 2),
    )
    if moments[0].width != moments[1].width:
        raise WidthError(
            f"benign and malicious must be equally wide, got {moments[0].width} and {moments[1].width}; "
            "take both from one site of one model"
        )
    return moments


def pencil(
    benign: Moments, malicious: Moments, *, contrast: Contrast, metric: Metric, shrinkage: Shrinkage
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
        numerator = shrink(malicious, shrinkage)
        if contrast == "second_moment":
            numerator = numerator.plus(delta)
    identity = metric == "identity"
    return numerator, ShrunkCovariance.identity(benign.width) if identity else shrink(benign, shrinkage)
