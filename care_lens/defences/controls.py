"""Controls for rivals: the same edit along random directions. :func:`care_lens.repair.random_control` is that for repairs.

beside = random_directions(defence, seed=0)  # a row of its own in a table
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from care_lens.defences.means import ActAdd, AddedVector
from care_lens.defences.published_care import CARESubspace, PublishedCARE
from care_lens.defences.refusal_direction import RefusalDirection
from care_lens.defences.stored import FitError
from care_lens.subspace import random_isometry


def random_directions(defence: Any, *, seed: int = 0) -> Any:
    """A defence whose directions are random: added vectors of the same norms, or subspaces with the same singular values.

    Args:
        defence: A difference of means, CAA, ActAdd, a refusal direction, or published CARE.
        seed: Of the draw.

    Returns:
        A defence of the same class, named "random directions of ...". Strengths, sites and means stay.

    Raises:
        FitError: If the defence is of another kind.
    """
    generator = torch.Generator().manual_seed(seed)

    def vector(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return (drawn / drawn.norm(dim=-1, keepdim=True) * like.double().norm(dim=-1, keepdim=True)).to(like)

    def subspace(held: CARESubspace) -> CARESubspace:
        (columns,) = random_isometry((held.columns,), span=(held.columns,), generator=generator)
        return dataclasses.replace(held, columns=columns)

    name = f"random directions of {defence.name}"
    if isinstance(defence, AddedVector):
        return dataclasses.replace(defence, vector=vector(defence.vector), name=name)
    if isinstance(defence, ActAdd):
        return dataclasses.replace(defence, vectors=vector(defence.vectors), name=name)
    if isinstance(defence, RefusalDirection):
        return dataclasses.replace(defence, direction=vector(defence.direction), name=name)
    if isinstance(defence, PublishedCARE):
        sides = {
            side: {n: subspace(held) for n, held in getattr(defence, side).items()} for side in ("visual", "textual")
        }
        return dataclasses.replace(defence, **sides, name=name)
    raise FitError(
        f"defence must add a vector or be published CARE to have a control of random directions, got a {type(defence).__name__}; for a "
        "repair see care_lens.repair.random_control"
    )
