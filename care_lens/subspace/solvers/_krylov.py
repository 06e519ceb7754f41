"""Leading eigenpairs of a symmetric operator by block Lanczos with restarts.

A block of k vectors and some guards is multiplied again and again, each product made orthogonal to all before it
(twice, so that it stays so), and the Rayleigh-Ritz pairs of what is spanned are taken; from the best of them, and the
block that comes next, it goes on. All products are of matrices with matrices, which is what makes it faster than
LAPACK's tridiagonal reduction when few of many eigenvalues are wanted. A multiple eigenvalue is found as often as it
occurs, up to the size of a block. Start vectors are drawn with a fixed seed. Source: Golub and Underwood 1977
("The block Lanczos method"), with the restarts of Wu and Simon 2000 ("Thick-restart Lanczos").
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.linalg import eigh
from torch import Tensor

BLOCKS = 6
_CYCLES = 40
_SEED = 0
_LOST = 1e-13
_LEAST_ORDER = 2048
"""Below it LAPACK is as fast."""

Operator = Callable[[Tensor], Tensor]
"""Products of a symmetric [n, n] matrix with [n, b] columns."""


@dataclass(frozen=True, eq=False)
class TopPairs:
    """Leading eigenpairs.

    Attributes:
        values: [k] descending.
        vectors: [n, k] orthonormal.
        error: Largest residual norm over the largest eigenvalue in magnitude.
        products: Number of vectors that were multiplied.
    """

    values: Float[Tensor, "k"]
    vectors: Float[Tensor, "n k"]
    error: float
    products: int


def block_size(rank: int) -> int:
    """Vectors in a block for ``rank`` pairs: a quarter more, 8 at the least."""
    return rank + max(8, rank // 4)


def worthwhile(order: int, rank: int) -> bool:
    """Whether few enough pairs are wanted that this is the faster way."""
    return order >= _LEAST_ORDER and order >= 2 * BLOCKS * block_size(rank)


def top_pairs(operator: Operator, order: int, rank: int, *, tolerance: float) -> TopPairs:
    """The ``min(rank, order)`` leading eigenpairs.

    Args:
        operator: The matrix, as its products.
        order: Its order n.
        rank: Number of pairs k.
        tolerance: Largest residual norm that is good enough, over the largest eigenvalue in magnitude.

    Returns:
        The pairs; ``error`` is above the tolerance if they did not get there in 40 restarts.
    """
    block = block_size(rank)
    if order < (BLOCKS + 1) * block:
        return _direct(operator(torch.eye(order, dtype=torch.float64)), rank)
    generator = torch.Generator().manual_seed(_SEED)
    fresh = torch.linalg.qr(torch.randn(order, block, generator=generator, dtype=torch.float64)).Q
    spanned = image = fresh[:, :0]
    products, found = 0, None
    for _ in range(_CYCLES):
        while spanned.shape[1] < BLOCKS * block:
            ahead = operator(fresh)
            products += block
            spanned, image = torch.cat([spanned, fresh], dim=1), torch.cat([image, ahead], dim=1)
            fresh = _orthogonal(ahead, spanned, float(image.norm(dim=0).max()), generator)
        projected = spanned.T @ image
        size = projected.shape[0]
        ascending, ritz = eigh(((projected + projected.T) / 2).numpy(), check_finite=False, driver="evd")
        values = torch.from_numpy(ascending).flip(0)
        leading = torch.from_numpy(ritz[:, size - block :].copy()).flip(1)
        vectors, moved = spanned @ leading, image @ leading
        residuals = moved - vectors * values[:block]
        scale = float(values.abs().max())
        error = float(residuals[:, :rank].norm(dim=0).max()) / scale if scale > 0 else 0.0
        found = TopPairs(values[:rank], vectors[:, :rank], error, products)
        if error <= tolerance:
            break
        # All residuals lie in the span of the block that comes next, so that going on from here loses little.
        spanned, image = vectors, moved
    assert found is not None
    return found


def _orthogonal(block: Tensor, against: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of a block less its part in a span; where only rounding is left, of random vectors there."""
    block, triangle = torch.linalg.qr(block - against @ (against.T @ block))
    lost = triangle.diagonal().abs() <= _LOST * scale
    if bool(lost.any()):
        block[:, lost] = torch.randn(len(block), int(lost.sum()), generator=generator, dtype=torch.float64)
    for _ in range(2):
        block = torch.linalg.qr(block - against @ (against.T @ block)).Q
    return block


def _direct(matrix: Tensor, rank: int) -> TopPairs:
    order = matrix.shape[0]
    ascending, vectors = eigh(((matrix + matrix.T) / 2).numpy(), check_finite=False)
    kept = min(rank, order)
    values = torch.from_numpy(ascending).flip(0)[:kept]
    return TopPairs(values, torch.from_numpy(vectors[:, order - kept :].copy()).flip(1), 0.0, order)
