"""From rows to the tensors of a safety subspace. Everything here is float64 on the CPU."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from care_lens.subspace.auto_rank import RankChoice, choose_rank
from care_lens.subspace.contrast import Contrast, Metric, class_moments, pencil
from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.moments import Moments
from care_lens.subspace.shrinkage import Shrinkage, ShrunkCovariance
from care_lens.subspace.solvers import PencilSolution, Solver, solve_pencil

Projection = Literal["orthogonal", "oblique"]
Groups = tuple[Sequence[str], Sequence[str]]

_LARGEST_AUTO_RANK = 64

logger = logging.getLogger(__name__)


def fit_tensors(
    benign: Tensor,
    malicious: Tensor,
    *,
    rank: int | Literal["auto"],
    contrast: Contrast,
    shrinkage: Shrinkage,
    projection: Projection,
    solver: Solver,
    metric: Metric,
    groups: Groups | None,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The float32 tensors of a subspace and the diagnostics of its fit; see ``SafetySubspace.fit``."""
    if projection not in get_args(Projection):
        raise SubspaceError(f"projection must be one of {get_args(Projection)}, got {projection!r}")
    if rank != "auto" and (not isinstance(rank, int) or isinstance(rank, bool)):
        raise SubspaceError(f"rank must be 'auto' or a number, got {rank!r}")
    moments = class_moments(benign, malicious, contrast, metric)

    def solve(
        of: tuple[Moments, Moments], rank: int, clip: bool
    ) -> tuple[PencilSolution, ShrunkCovariance, ShrunkCovariance]:
        numerator, denominator = pencil(*of, contrast=contrast, metric=metric, shrinkage=shrinkage)
        return (
            solve_pencil(numerator, denominator, rank=rank, solver=solver, clip=clip),
            numerator,
            denominator,
        )

    def directions(held_in: Tensor, against: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of = class_moments(held_in, against, contrast, metric)
        most = min(_LARGEST_AUTO_RANK, of[0].width)
        centre = of[1].mean if contrast == "covariance" else of[0].mean
        return solve(of, most, True)[0].vectors, of[0].mean, centre

    counts = [of.count for of in moments]
    if groups is None:
        groups = ([f"benign {i}" for i in range(counts[0])], [f"malicious {i}" for i in range(counts[1])])
    elif [len(items) for items in groups] != counts:
        raise SubspaceError(
            f"groups must be as long as the rows {tuple(counts)}, got {tuple(map(len, groups))}; "
            "give the item of each benign and of each malicious row"
        )
    choice: RankChoice | None = None
    if rank == "auto" and contrast == "mean":
        rank = 1
    elif rank == "auto":
        choice = _auto_rank(moments, directions, groups, seed)
        rank = max(choice.rank, 1)
    solution, numerator, denominator = solve(moments, rank, False)
    diagnostics = {
        "contrast": contrast,
        "metric": metric,
        "projection": projection,
        "n_benign": moments[0].count,
        "n_malicious": moments[1].count,
        "shrinkage": shrinkage,
        "shrinkage_benign": denominator.weight,
        "shrinkage_malicious": numerator.weight,
        "noise_eigenvalue": numerator.ridge / denominator.ridge if denominator.ridge > 0 else None,
        "solver": solution.solver,
        "order": solution.order,
        "condition": solution.condition,
        "residual": solution.residual,
        "auto_rank": None if choice is None else choice.to_dict(),
        "seed": seed,
    }
    logger.debug("fitted a subspace of rank %d at width %d: %s", rank, moments[0].width, diagnostics)
    return _tensors(solution, denominator, moments, projection), diagnostics


def _auto_rank(moments: tuple[Moments, Moments], directions: Any, groups: Groups, seed: int) -> RankChoice:
    rows = [of.centred + of.mean for of in moments]
    choice = choose_rank(rows[0], rows[1], directions, groups=groups, seed=seed)
    if choice.rank == 0 and choice.ratios:
        warnings.warn(
            f"rank='auto' found no direction: held-out malicious/benign energy {choice.ratios[0]:.3g} of the "
            f"first is not above {choice.threshold:.3g}, which benign against benign reaches; rank 1 is "
            "kept, expect nothing of it",
            stacklevel=4,
        )
    return choice


def _tensors(
    solution: PencilSolution,
    metric: ShrunkCovariance,
    moments: tuple[Moments, Moments],
    projection: Projection,
) -> dict[str, Tensor]:
    delta = moments[1].mean - moments[0].mean
    read = _towards(solution.vectors, delta)
    basis, triangle = torch.linalg.qr(read)
    basis = basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    tensors = {"basis": basis, "read": read, "eigenvalues": solution.eigenvalues}
    if projection == "orthogonal":
        tensors |= {"write": basis, "left": basis}
    else:
        rounded = read.float().double()
        write = metric.times(rounded)
        tensors |= {"write": torch.linalg.solve(rounded.T @ write, write, left=False), "left": read}
    tensors |= {"mean_benign": moments[0].mean, "mean_malicious": moments[1].mean}
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}


def _towards(vectors: Tensor, delta: Tensor) -> Tensor:
    """Turn columns so that the malicious mean is on their positive side, where it is on either."""
    along = delta @ vectors
    decided = along.abs() > 1e-9 * delta.norm() * vectors.norm(dim=0)
    return vectors * torch.where(decided & (along < 0), -1.0, 1.0)
