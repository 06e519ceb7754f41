"""Idefics3 and SmolVLM: a SigLIP-like tower, a projector that merges squares of patches, and a Llama decoder.

A picture is stretched to a whole number of square tiles, in raster order, each announced by a token with its row and column;
the whole picture follows as a last tile. Rows of a batch with fewer tiles are filled up with empty ones, which the model drops
before its vision tower: they are no entries of vision activations. It knows them by pixels that are all zero, and fails on a
batch whose own pixels were replaced by zeros: blank a picture with another value.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.model_bridge.supported_architectures.idefics3 import Idefics3ArchitectureAdapter

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured, PictureRegion, Tile
from care_lens.lvlm.families.llava import DECODER, ENCODER, OUTSIDE, PLAIN_DECODER, PLAIN_ENCODER


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    side = about.outputs["pixel_values"].shape[-1]
    patch = about.config.vision_config.patch_size
    grid = side // patch // about.config.scale_factor
    # Where patches do not fill a tile, the model does not see its right and lower edge.
    seen = side // patch * patch / side
    images = []
    for width, height in about.sizes:
        down, across = _tiling(about.processor, width, height)
        w, h = width / across, height / down
        regions = [PictureRegion(x * w, y * h, w * seen, h * seen) for y in range(down) for x in range(across)]
        if len(regions) > 1:
            regions.append(PictureRegion(0.0, 0.0, width * seen, height * seen))
        tiles = tuple(Tile(i * grid * grid, grid, grid, region) for i, region in enumerate(regions))
        images.append(ImageLayout(len(tiles) * grid * grid, tiles))
    return images


def _tiling(processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a picture, by the image processor's own rule.

    Its ``get_number_of_image_patches`` is not used: it is off where the longest edge is not a whole number of tiles.
    """
    from transformers.models.idefics3.image_processing_idefics3 import get_resize_output_image_size

    names = ("do_image_splitting", "do_resize", "size", "max_image_size")
    given = getattr(processor, "images_kwargs", {})
    settings = {name: given.get(name, getattr(processor.image_processor, name)) for name in names}
    if not settings["do_image_splitting"]:
        return 1, 1
    if settings["do_resize"]:
        size = settings["size"]
        if longest := size.get("longest_edge"):
            height, width = get_resize_output_image_size(torch.empty(height, width, device="meta"), longest)
        else:
            height, width = size["height"], size["width"]
    side, ratio = settings["max_image_size"]["longest_edge"], width / height
    # The longer edge is stretched to whole tiles, and the shorter one, in proportion, again.
    if width >= height:
        across = math.ceil(width / side)
        return math.ceil(int(across * side / ratio) / side), across
    down = math.ceil(height / side)
    return down, math.ceil(int(down * side * ratio) / side)


IDEFICS3 = Family(
    name="idefics3",
    architectures=("Idefics3ForConditionalGeneration",),
    language=replace(
        DECODER,
        plain=replace(PLAIN_DECODER, blocks="model.text_model.layers", final_norm="model.text_model.norm"),
    ),
    vision=replace(
        ENCODER,
        points={**ENCODER.points, "hook_resid_post": "hook_out"},
        own_resid_post=False,
        plain=replace(PLAIN_ENCODER, blocks="model.vision_model.encoder.layers"),
    ),
    outside=OUTSIDE,
    vision_depth=lambda config: config.vision_config.num_hidden_layers,
    projector_width=lambda config: config.vision_config.hidden_size,
    layout=_layout,
    # A row is prepared by itself, and so has no empty tiles here.
    entries=lambda about: about.outputs["pixel_values"].shape[1],
    nested_images=True,
    plain_outside={
        "vision.hook_embed": ("model.vision_model.embeddings", "out"),
        "projector.hook_in": ("model.connector", "in"),
        "projector.hook_out": ("model.connector", "out"),
    },
    extra_inputs=("pixel_attention_mask",),
    notes={
        "vision.hook_embed": "the tiles of all images, without those that fill up a row; pixels that are all zero are taken for "
        "such a tile, so blank a picture with another value",
        "projector.hook_in": "patches of the vision tower, which the projector itself merges: it gives one token for each "
        "square of scale_factor x scale_factor of them",
    },
)
"""The Idefics3 family."""


class SmolVLMAdapter(Idefics3ArchitectureAdapter):
    """TransformerLens's adapter of Idefics3, for a model of the same parts under the same names."""


SMOLVLM = replace(
    IDEFICS3,
    name="smolvlm",
    architectures=("SmolVLMForConditionalGeneration",),
    adapters={"SmolVLMForConditionalGeneration": SmolVLMAdapter},
)
"""The SmolVLM family."""
