"""Gemma3: a SigLIP tower, pooling to a fixed number of tokens an image, and a decoder with norms after its branches too.

The tokens of one image see each other in both directions, in layers with and without a sliding window; the model reads which
they are from ``token_type_ids``, which are therefore always given.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured, PictureRegion, Tile, TowerMap
from care_lens.lvlm.families.llava import (
    BLOCK,
    DECODER,
    ENCODER,
    OUTSIDE,
    PLAIN_DECODER,
    PLAIN_OUTSIDE,
    picture_region,
    vision_dims,
)

POST_NORM_DECODER: TowerMap = replace(
    DECODER,
    points={**DECODER.points, "hook_attn_out": "ln1_post.hook_out", "hook_mlp_out": "ln2_post.hook_out"},
    mlp="ln2_post",
    plain=replace(
        PLAIN_DECODER,
        points={
            **BLOCK,
            "hook_attn_out": ("post_attention_layernorm", "out"),
            "hook_mlp_out": ("post_feedforward_layernorm", "out"),
        },
        mid_norm="pre_feedforward_layernorm",
        mlp="post_feedforward_layernorm",
        out={},
    ),
)
"""A decoder whose branches are normed before they are added to the stream."""


def all_layers(config: Any) -> int:
    """Number of vision blocks, where the projector reads the last one's output."""
    return config.vision_config.num_hidden_layers


def vision_width(config: Any) -> int:
    """Width of the projector's input, where it is the vision tower's."""
    return vision_dims(config).width


def square_layout(about: Pictured, side: int, pixels: int) -> Sequence[ImageLayout]:
    """One square of tokens an image.

    Args:
        about: The images.
        side: Tokens a side.
        pixels: Side of a token in pixels of the resized picture.

    Returns:
        The layouts; what is left of the picture at its right and lower edge belongs to no token.
    """
    height, width = about.outputs["pixel_values"].shape[-2:]
    layouts = []
    for size in about.sizes:
        left, top, w, h = picture_region(about.processor.image_processor, *size)
        seen = PictureRegion(left, top, w * side * pixels / width, h * side * pixels / height)
        layouts.append(ImageLayout(side * side, (Tile(0, side, side, seen),)))
    return layouts


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    if (found := len(about.outputs["pixel_values"])) != len(about.sizes):
        raise ValueError(
            f"processor must make one image of each picture, got {found} of {len(about.sizes)}; pan and scan is not supported, "
            "set do_pan_and_scan to False in processor.images_kwargs"
        )
    vision = about.config.vision_config
    side = int(about.config.mm_tokens_per_image**0.5)
    pooled = vision.image_size // vision.patch_size // side
    return square_layout(about, side, pooled * vision.patch_size)


GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    language=POST_NORM_DECODER,
    vision=ENCODER,
    outside=OUTSIDE,
    vision_depth=all_layers,
    projector_width=vision_width,
    layout=_layout,
    plain_outside=PLAIN_OUTSIDE,
    image_text=lambda processor: processor.boi_token,
    token_inputs={"token_type_ids": 0},
    notes={"projector.hook_in": "one entry a patch, before pooling", "projector.hook_out": "one entry a pooled token"},
)
"""The Gemma3 family."""
