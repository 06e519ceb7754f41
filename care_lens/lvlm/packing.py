"""Towers that lay the patches of all images in one row: between their order and [image, patch, ...] in raster order.

Images of different sizes have different numbers of patches: rows of the uniform form are padded with zeros at their end,
and what a hook writes there is dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the patches of each image are in a tower's own order.

    Attributes:
        order: [n] for each patch, image after image in raster order, its row in the tower's own tensor.
        mask: [image, patch] which entries of the uniform form are patches.
    """

    order: Int[Tensor, "n"]
    mask: Bool[Tensor, "image patch"]

    @classmethod
    def of(cls, orders: Sequence[Int[Tensor, "_patches"]]) -> "Packing":
        """Make one of the images' rows.

        Args:
            orders: For each image the rows of its patches in the tower's own tensor, in raster order of the picture.
        """
        lengths = torch.tensor([len(order) for order in orders])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        order = torch.cat(list(orders))
        return cls(order, mask.to(order.device))

    def unpack(self, native: Tensor) -> Tensor:
        """[..., n, rest] in the tower's order as [image, patch, rest] in raster order."""
        rows = native.reshape(-1, *native.shape[-1:])
        out = rows.new_zeros(*self.mask.shape, *rows.shape[1:])
        out[self.mask.to(rows.device)] = rows[self.order.to(rows.device)]
        return out

    def pack(self, value: Tensor, shape: torch.Size) -> Tensor:
        """The inverse: a tensor of the tower's own shape."""
        rows = value[self.mask.to(value.device)]
        out = torch.empty_like(rows)
        out[self.order.to(value.device)] = rows
        return out.reshape(shape)
