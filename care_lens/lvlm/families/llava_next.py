"""LLaVA-NeXT: LLaVA that sees a picture twice, as an overview and in crops of a higher resolution.

The overview is the picture squashed to a square. For the fine view it is resized as it is to fit one of
``config.image_grid_pinpoints``, padded to it around its centre and cut in square crops. Overview and crops are the
entries of the vision tower's activations: [tile, patch, d], overview first, the tiles of all images one after another.
Entries with which a batch is filled up, where images have different numbers of crops, never reach the tower.

The tokens of an image are its overview, then its crops joined to one picture, without the rows or columns of tokens
that are padding alone, with one learned newline token after each row. Newlines are image tokens of no grid.

Granite Vision is a LLaVA-NeXT whose decoder multiplies what attention and MLP give by ``residual_multiplier``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured, PictureRegion, Tile
from care_lens.lvlm.families.llava import (
    DECODER,
    ENCODER,
    OUTSIDE,
    PLAIN_OUTSIDE,
    class_tokens,
    projector_width,
    vision_depth,
)

DROPPED = (
    "[tile, patch, d] before crops are joined: patches that show padding alone are dropped after it, so edits of those "
    "do nothing, and newline tokens are not among them"
)
"""What to know about the projector's output."""


@dataclass(frozen=True)
class _Axis:
    """The fine grid along one side of a picture.

    Attributes:
        picture: Pixels of the picture itself.
        resized: Pixels that it is resized to.
        crops: Number of crops.
        first: First token that is kept, counted over all crops.
        count: Tokens that are kept.
        side: Pixels of a crop.
        patch: Pixels of a patch.
    """

    picture: int
    resized: int
    crops: int
    first: int
    count: int
    side: int
    patch: int

    def runs(self) -> list[tuple[int, int]]:
        """Runs of kept tokens, first and one past the last, whose patches lie evenly.

        Patches of 14 pixels leave the last 6 of a crop of 384 out: there each crop is a run of its own.
        """
        per_crop, stop = self.side // self.patch, self.first + self.count
        if self.side % self.patch == 0:
            return [(self.first, stop)]
        return list(pairwise([self.first, *range((self.first // per_crop + 1) * per_crop, stop, per_crop), stop]))

    def extent(self, start: int, stop: int) -> tuple[float, float]:
        """Start and length, in the picture's pixels, of what a run shows; part of it may be padding."""
        padding = (self.crops * self.side - self.resized) // 2
        scale = self.picture / self.resized
        begin, end = self._pixel(start), self._pixel(stop - 1) + self.patch
        return (begin - padding) * scale, (end - begin) * scale

    def _pixel(self, token: int) -> int:
        crop, within = divmod(token, self.side // self.patch)
        return crop * self.side + within * self.patch


def crops(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of crops.

    Args:
        config: The model's config.
        size: Width and height of the picture.
    """
    side = config.vision_config.image_size
    return get_anyres_image_grid_shape(size[::-1], config.image_grid_pinpoints, side)


def overview(config: Any, region: PictureRegion) -> Tile:
    """The tokens of a tile that shows a region of the picture squashed to a square.

    Args:
        config: The model's config.
        region: The region; patches may leave out its right and lower edge.
    """
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = side // patch
    seen = n * patch / side
    left, top, width, height = region
    return Tile(0, n, n, PictureRegion(left, top, width * seen, height * seen))


def image_layout(config: Any, size: tuple[int, int], most: float | int = math.inf) -> ImageLayout:
    """The tokens of one image: overview, joined crops, newlines.

    Args:
        config: The model's config.
        size: Width and height of the picture.
        most: Joined crops of more tokens than so many tiles have are resampled to about as many.
    """
    width, height = size
    base = overview(config, PictureRegion(0.0, 0.0, float(width), float(height)))
    offset = base.rows * base.cols
    y, x = _axes(config, size)
    rows, cols = y.count, x.count
    shrink = math.sqrt(rows * cols / (most * offset))
    if shrink > 1.1:  # the model's own threshold; the new tokens lie evenly over the same part of the picture
        rows, cols = int(rows // shrink), int(cols // shrink)
        region = _region(x.extent(x.first, x.first + x.count), y.extent(y.first, y.first + y.count))
        tiles = [Tile(offset, rows, cols, region, cols + 1)]
    else:
        tiles = [
            Tile(
                offset + (above - y.first) * (cols + 1) + (before - x.first),
                below - above,
                after - before,
                _region(x.extent(before, after), y.extent(above, below)),
                cols + 1,
            )
            for above, below in y.runs()
            for before, after in x.runs()
        ]
    return ImageLayout(offset + rows * (cols + 1), (base, *tiles) if rows * cols else (base,))


def _region(across: tuple[float, float], down: tuple[float, float]) -> PictureRegion:
    return PictureRegion(across[0], down[0], across[1], down[1])


def _axes(config: Any, size: tuple[int, int]) -> tuple[_Axis, _Axis]:
    """The fine grid of a picture, downwards and across."""
    (width, height), (down, across) = size, crops(config, size)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    n = side // patch
    tokens = torch.arange(down * n * across * n).view(1, down * n, across * n)
    kept = unpad_image(tokens, (height, width))[0]  # the model's own rounding
    above, before = divmod(int(kept.flatten()[0]) if kept.numel() else 0, across * n)
    by_width, by_height = across * side / width, down * side / height
    if by_width < by_height:
        resized = across * side, min(math.ceil(height * by_width), down * side)
    else:
        resized = min(math.ceil(width * by_height), across * side), down * side
    return (
        _Axis(height, resized[1], down, above, kept.shape[0], side, patch),
        _Axis(width, resized[0], across, before, kept.shape[1], side, patch),
    )


def require_settings(about: Pictured) -> None:
    """Refuse settings of the image processor under which tokens would not show what the layout says.

    Raises:
        ValueError: If its resolutions are not the model's, or it crops the tiles again.
    """
    images, config = about.processor.image_processor, about.config
    ours, theirs = (
        [list(point) for point in points] for points in (config.image_grid_pinpoints, images.image_grid_pinpoints)
    )
    if ours != theirs:
        raise ValueError(
            f"image_grid_pinpoints of the image processor must be those of the model, {ours}, got {theirs}"
        )
    side, given = config.vision_config.image_size, dict(images.size)
    if images.do_center_crop:
        given = {"size": given.get("shortest_edge") or given["height"], "crop_size": images.crop_size["height"]}
    if wrong := {name: value for name, value in given.items() if value is not None and value != side}:
        raise ValueError(f"the image processor must make tiles of the vision tower's {side} pixels, got {wrong}")


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    require_settings(about)
    return [image_layout(about.config, size) for size in about.sizes]


def tiles(about: Pictured) -> int:
    """Number of overviews and crops of some images."""
    return sum(1 + math.prod(crops(about.config, size)) for size in about.sizes)


_SCALED_DECODER = replace(
    DECODER,
    points={name: at for name, at in DECODER.points.items() if name not in ("hook_attn_out", "hook_mlp_out")},
    scales=("residual_multiplier", "residual_multiplier"),
)


def _variant(config: Any) -> Family:
    """The family with the decoder that the config names."""
    return _SCALED if hasattr(config.text_config, "residual_multiplier") else LLAVA_NEXT


LLAVA_NEXT = Family(
    name="llava_next",
    architectures=("LlavaNextForConditionalGeneration",),
    language=DECODER,
    vision=ENCODER,
    outside=OUTSIDE,
    vision_depth=vision_depth,
    projector_width=projector_width,
    layout=_layout,
    class_tokens=class_tokens,
    entries=tiles,
    extra_inputs=("image_sizes",),
    plain_outside=PLAIN_OUTSIDE,
    variant=_variant,
    notes={"projector.hook_out": DROPPED},
)
"""The LLaVA-NeXT (LLaVA 1.6) family."""

_SCALED = replace(LLAVA_NEXT, language=_SCALED_DECODER)
