"""How far apart two subspaces are."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.errors import NonFiniteError


@dataclass(frozen=True, eq=False)
class SubspaceComparison(ShortRepr):
    """Overlap of two subspaces of one space.

    Attributes:
        cosines: [min(k1, k2)] cosines of the principal angles, descending, float64.
        angles: [min(k1, k2)] the angles in radians.
        kernel: TransformerLens's projection kernel, the sum of the squared cosines.
        normalized: The kernel over ``sqrt(k1 k2)``: 1 for equal subspaces, 0 for orthogonal ones.
        chance: What ``normalized`` is on average for random subspaces of these ranks, ``sqrt(k1 k2) / d``.
    """

    cosines: Float[Tensor, "angle"]
    angles: Float[Tensor, "angle"]
    kernel: float
    normalized: float
    chance: float


def compare_bases(first: Float[Tensor, "d k1"], second: Float[Tensor, "d k2"]) -> SubspaceComparison:
    """Compare the column spans of two matrices of full column rank.

    Args:
        first: [d, k1].
        second: [d, k2].

    Returns:
        The comparison, on the CPU.

    Notes:
        An angle below about 1e-7 is not resolved from its cosine; float32 bases are no better than 1e-3 to
        1e-4 radians.
    """
    for name, basis in (("first", first), ("second", second)):
        if not bool(basis.isfinite().all()):
            raise NonFiniteError(f"{name} must hold finite numbers, got NaN or infinity")
        if torch.linalg.matrix_rank(basis.detach().to("cpu", torch.float64)) == 0:
            raise ValueError(f"{name} must span a direction, got a matrix of rank 0")
    from transformer_lens.tools.analysis.projection_kernel import orthonormal_subspace, projection_kernel

    found = [orthonormal_subspace(basis.detach().to("cpu", torch.float64)) for basis in (first, second)]
    kernel = projection_kernel(*found)
    return SubspaceComparison(
        cosines=kernel.cosines,
        angles=kernel.angles,
        kernel=float(kernel.score),
        normalized=float(kernel.normalized),
        chance=math.sqrt(found[0].rank * found[1].rank) / found[0].ambient_dim,
    )
