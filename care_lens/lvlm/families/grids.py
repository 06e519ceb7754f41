"""Towers that take a picture as a grid of patches, in blocks that are merged into one token each.

The patches of all images are in one row, merge block after merge block, and in raster order within a block. Which grid each
image has is in ``grid_thw``: frames, rows and columns of patches.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from care_lens.lvlm.families.base import ImageLayout, Pictured, PictureRegion, Tile
from care_lens.lvlm.packing import Packing

PATCHES, TOKENS = "patches", "tokens"
"""Keys of the packings: of patches, and of the tokens that blocks of them are merged into."""

NO_PATTERN = (
    "the tower attends within each image (or window) on its own, so there is no one pattern; use attn.hook_z, the heads' "
    "outputs"
)
"""Why these towers have no ``attn.hook_pattern``."""


def grid_layout(about: Pictured) -> Sequence[ImageLayout]:
    """One rectangle of tokens an image, which shows all of it (the processor resizes and does not crop).

    Args:
        about: The images.
    """
    merge = about.config.vision_config.spatial_merge_size
    layouts = []
    grids = about.outputs["image_grid_thw"].tolist()
    for (_, height, width), size in zip(grids, about.sizes, strict=True):
        rows, cols = height // merge, width // merge
        layouts.append(ImageLayout(rows * cols, (Tile(0, rows, cols, PictureRegion(0.0, 0.0, *map(float, size))),)))
    return layouts


def grid_packings(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Packing]:
    """Packings of patches in merge blocks, and of the merged tokens, which are in raster order already.

    Args:
        model: The Hugging Face model.
        args: Arguments of the vision tower's forward pass.
        kwargs: Its keyword arguments.
    """
    merge = model.config.vision_config.spatial_merge_size
    grids = tower_grids(args, kwargs)
    return {
        PATCHES: packed_blocks(grids, merge),
        TOKENS: packed_blocks([(t, h // merge, w // merge) for t, h, w in grids]),
    }


def tower_grids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Frames, rows and columns of the images that a vision tower is called with.

    Args:
        args: Arguments of the tower's forward pass.
        kwargs: Its keyword arguments.
    """
    grids: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
    return [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]


def packed_blocks(
    grids: Sequence[tuple[int, int, int]], merge: int = 1, rows: Int[Tensor, "n"] | None = None
) -> Packing:
    """The packing of grids in merge blocks.

    Args:
        grids: Frames, rows and columns of each image.
        merge: Side of a merge block.
        rows: [n] where the tower has the entry that is at each place in block order; None: at that place.
    """
    orders, start = [], 0
    for t, h, w in grids:
        places = torch.arange(start, start + t * h * w).view(t, h // merge, w // merge, merge, merge)
        raster = places.transpose(2, 3).flatten()
        orders.append(raster if rows is None else rows[raster])
        start += t * h * w
    return Packing.of(orders)
