"""From the moments of two classes to the tensors of a safety subspace of a given rank. Everything here is float64 on the CPU."""

import logging
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from care_lens.subspace.contrast import Contrast, Metric, check_classes, pencil
from care_lens.subspace.errors import IdenticalClassesWarning, SubspaceError
from care_lens.subspace.memory import plan_fit
from care_lens.subspace.moments import Moments
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance, Target
from care_lens.subspace.solvers import PencilSolution, Solver, solve_pencil

Projection = Literal["orthogonal", "oblique"]

_MOST_LOST = 1e-4
_MOST_OFF = 1e-5
"""Benign standard deviations by which the rounding of a mean may shift coordinates."""
_SAME = 1e-9

logger = logging.getLogger(__name__)


def fit_moments(
    benign: Moments,
    malicious: Moments,
    *,
    rank: int,
    contrast: Contrast,
    shrinkage: Shrinkage,
    projection: Projection,
    solver: Solver,
    metric: Metric,
    target: Target = "identity",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a subspace and the diagnostics of its fit, from the moments of the classes in either form.

    Args:
        benign: Moments of the benign rows.
        malicious: Of the malicious ones.
        rank: Number of directions; choosing one needs rows.
        contrast: As for ``SafetySubspace.fit``; likewise shrinkage, projection, solver and metric.
        target: What both covariances are shrunk towards, see ``care_lens.subspace.shrink``.

    Returns:
        The tensors (float32, or float64 where that would not hold them) and JSON-able diagnostics.

    Raises:
        SubspaceError: As for ``SafetySubspace.fit``.

    Warns:
        IdenticalClassesWarning: As ``SafetySubspace.fit``.
    """
    if projection not in get_args(Projection):
        raise SubspaceError(f"projection must be one of {get_args(Projection)}, got {projection!r}")
    check_classes(benign, malicious, contrast, metric)
    _say_if_same(benign, malicious, contrast)
    plan = plan_fit(benign, malicious, rank=rank, solver=solver, low_rank=contrast == "mean")
    logger.info("%s", plan)
    numerator, denominator = pencil(
        benign, malicious, contrast=contrast, metric=metric, shrinkage=shrinkage, target=target
    )
    solution = solve_pencil(numerator, denominator, rank=rank, solver=solver)
    diagnostics = {
        "contrast": contrast,
        "metric": metric,
        "projection": projection,
        "n_benign": benign.count,
        "n_malicious": malicious.count,
        "shrinkage": shrinkage,
        "shrinkage_target": "diagonal" if shrinkage == "diagonal" else target,
        "shrinkage_benign": denominator.weight,
        "shrinkage_malicious": numerator.weight,
        "noise_eigenvalue": floor_of(numerator, denominator),
        "solver": solution.solver,
        "order": solution.order,
        "condition": solution.condition,
        "residual": solution.residual,
    }
    logger.debug("fitted a subspace of rank %d at width %d: %s", rank, benign.width, diagnostics)
    return subspace_tensors(solution, denominator, (benign, malicious), projection), diagnostics


def _say_if_same(benign: Moments, malicious: Moments, contrast: Contrast) -> None:
    """Warn where the two classes are one, as far as the contrast looks at them; classes of one kind that differ by chance do not count."""
    spread = max(benign.trace, malicious.trace)
    rounding = 1e-30 + (_SAME * float(benign.mean.norm())) ** 2 * _SAME  # of means far from 0
    same_mean = float((benign.mean - malicious.mean).square().sum()) <= _SAME**2 * spread + rounding
    same = same_mean if contrast == "mean" else contrast == "covariance" or same_mean
    if same and contrast != "mean":
        pairs = ((of.trace, of.squared_norm, of.fourth) for of in (benign, malicious))
        same = all(abs(one - other) <= _SAME * max(abs(one), abs(other)) for one, other in zip(*pairs, strict=True))
        same = same and bool(torch.allclose(benign.variances, malicious.variances, rtol=_SAME, atol=_SAME * spread))
    if same:
        warnings.warn(
            f"benign and malicious must differ for contrast={contrast!r}, got classes that are the same in all it looks at; the "
            "directions are picked by rounding: give rows of two classes",
            IdenticalClassesWarning,
            stacklevel=4,
        )


def floor_of(malicious: ShrunkCovariance, benign: ShrunkCovariance) -> float | None:
    """The eigenvalue of directions that no row speaks of; None where there is no single one."""
    if benign.ridge <= 0 or malicious.diagonal is not None or benign.diagonal is not None:
        return None
    return malicious.ridge / benign.ridge


def subspace_tensors(
    solution: PencilSolution,
    metric: ShrunkCovariance,
    moments: tuple[Moments, Moments],
    projection: Projection,
) -> dict[str, Tensor]:
    """The tensors of a subspace whose reading directions are those of a solution; the malicious mean is turned to their positive side."""
    delta = moments[1].mean - moments[0].mean
    read = _towards(solution.vectors, delta)
    basis, triangle = torch.linalg.qr(read)
    basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    tensors = {"basis": basis, "read": read, "eigenvalues": solution.eigenvalues}
    if projection == "orthogonal":
        tensors |= {"write": basis, "left": basis}
    else:
        rounded = read.float().double()
        # Of the exact vectors: what rounding adds to a direction of little variance, C_b would multiply out of proportion.
        write = metric.times(read)
        tensors |= {"write": torch.linalg.solve(rounded.T @ write, write, left=False), "left": read}
    # float32 loses about its rounding times the norms of the two sides; then nothing but float64 will do.
    sides = [float(torch.linalg.matrix_norm(tensors[name], 2)) for name in ("left", "write")]
    lost = torch.finfo(torch.float32).eps * sides[0] * sides[1]
    kept = torch.float32 if lost <= _MOST_LOST else torch.float64
    if kept == torch.float64 and projection == "oblique":
        tensors["write"] = torch.linalg.solve(read.T @ tensors["write"], tensors["write"], left=False)
    means = {"mean_benign": moments[0].mean, "mean_malicious": moments[1].mean}
    off = [mean - mean.float().double() for mean in means.values()]
    if all(float((read.T @ part).norm()) <= _MOST_OFF for part in off):
        means = {name: mean.float() for name, mean in means.items()}
    return {name: tensor.to(kept).contiguous() for name, tensor in tensors.items()} | means


def _towards(vectors: Tensor, delta: Tensor) -> Tensor:
    """Turn columns so that the malicious mean is on their positive side, where it is on either."""
    along = delta @ vectors
    decided = along.abs() > 1e-9 * delta.norm() * vectors.norm(dim=0)
    return vectors * torch.where(decided & (along < 0), -1.0, 1.0)
