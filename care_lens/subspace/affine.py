"""The one edit behind a subspace, its linear maps and a writer: what of ``h - c`` lies in the coordinates L, written along W.

    along(h) = W L^T (h - c)

A subspace takes ``alpha`` times it away, a linear map adds it to a multiple of ``h - c``, a writer's edit is its negative. What they have
in common is here: in which dtype it is computed, how a centre far from 0 is taken off, and the order of the two products, O(d k) a row.
Activations are row vectors; nothing is written in place.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.centring import Parts, subtract


def working_dtype(h: torch.dtype, *own: Tensor, least: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype in which activations are edited: theirs, but ``least`` or wider; float64 where an own tensor is.

    Args:
        h: Of the activations.
        own: Tensors of the edit. A fit keeps float64 where float32 would lose too much of so oblique a projector.
        least: The narrowest.
    """
    if any(tensor.dtype == torch.float64 for tensor in own):
        return torch.float64
    return torch.promote_types(h, least)


def along(
    h: Float[Tensor, "*batch d"],
    *,
    write: Float[Tensor, "d k"],
    left: Float[Tensor, "d k"],
    centre: Parts | None = None,
    back: bool = False,
) -> Float[Tensor, "*batch d"]:
    """``W L^T (h - c)``, or its negative: the way back to the centre.

    Args:
        h: [..., d] activations in the dtype that is computed in, see :func:`working_dtype`.
        write: [d, k] W; moved to the device and dtype of h if it is elsewhere.
        left: [d, k] L, likewise.
        centre: The centre c in the two parts that :func:`~care_lens.subspace.centring.split` makes for h; None: the origin.
        back: Whether the negative is wanted.

    Returns:
        [..., d] in the dtype of h.
    """
    about = h if centre is None else subtract(h, *centre)
    coordinates = about @ left.to(about)
    return (-coordinates if back else coordinates) @ write.to(about).T
