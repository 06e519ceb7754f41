"""InternVL: a tower whose blocks scale what attention and MLP add, pixel shuffle, a projector, and a decoder.

A picture is cut in tiles of the grid that fits its shape best, in raster order; where there are several, the whole picture
follows as a last tile. Pixel shuffle makes one token of a square of patches, still in raster order.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured, PictureRegion, PlainTower, Tile
from care_lens.lvlm.families.bridged import TowerBlock, native_attention
from care_lens.lvlm.families.llava import BLOCK, ENCODER, NATIVE_DECODER, OUTSIDE, PLAIN_OUTSIDE, vision_depth


class InternVLAdapter(LlavaArchitectureAdapter):
    """A LLaVA-like model with InternVL's tower, and attention of the decoder left to Hugging Face."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        native_attention(self.components["blocks"])
        self.components["vision_encoder"] = GeneralizedComponent(
            name="model.vision_tower",
            submodules={
                "embeddings": GeneralizedComponent(name="embeddings"),
                "blocks": TowerBlock(
                    "encoder.layer",
                    norms=("layernorm_before", "layernorm_after"),
                    attn="attention",
                    attn_out="projection_layer",
                    mlp="mlp",
                    mlp_parts={"in": "fc1", "out": "fc2"},
                ),
                "layernorm": GeneralizedComponent(name="layernorm"),
            },
        )


def _projector_width(config: Any) -> int:
    return config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    tower = about.config.vision_config
    rows, cols = (
        int(side // patch * about.config.downsample_ratio)
        for side, patch in zip(tower.image_size, tower.patch_size, strict=True)
    )
    images = []
    for width, height in about.sizes:
        down, across = _tiling(about.processor, width, height)
        w, h = width / across, height / down
        regions = [PictureRegion(x * w, y * h, w, h) for y in range(down) for x in range(across)]
        if len(regions) > 1:
            regions.append(PictureRegion(0.0, 0.0, float(width), float(height)))
        tiles = tuple(Tile(i * rows * cols, rows, cols, region) for i, region in enumerate(regions))
        images.append(ImageLayout(len(tiles) * rows * cols, tiles))
    return images


def _tiling(processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of the tiles a picture is cut in, by the image processor's own rule."""
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    images = processor.image_processor
    settings = {name: getattr(images, name) for name in ("crop_to_patches", "min_patches", "max_patches")}
    settings |= {name: value for name, value in processor.images_kwargs.items() if name in settings}
    if not settings["crop_to_patches"]:
        return 1, 1
    tile = (images.size["height"], images.size["width"])
    across, down = get_optimal_tiled_canvas((height, width), tile, settings["min_patches"], settings["max_patches"])
    return down, across


INTERNVL = Family(
    name="internvl",
    architectures=("InternVLForConditionalGeneration",),
    language=NATIVE_DECODER,
    vision=replace(
        ENCODER,
        blocks="vision_encoder.blocks",
        points={name: path for name, path in ENCODER.points.items() if name not in ("hook_attn_out", "hook_mlp_out")},
        scales=("lambda_1", "lambda_2"),
        plain=PlainTower(
            blocks="model.vision_tower.encoder.layer",
            points={
                **BLOCK,
                "hook_attn_out": ("attention", "out"),
                "attn.hook_z": ("attention.projection_layer", "in"),
                "mlp.hook_post": ("mlp.fc2", "in"),
            },
            mid_norm="layernorm_after",
            attn="attention",
        ),
    ),
    outside=OUTSIDE,
    vision_depth=vision_depth,
    projector_width=_projector_width,
    plain_outside=PLAIN_OUTSIDE,
    layout=_layout,
    class_tokens=lambda config: 1,
    entries=lambda about: len(about.outputs["pixel_values"]),
    adapters={"InternVLForConditionalGeneration": InternVLAdapter},
    notes={
        "projector.hook_in": "each entry is a square of patches, side by side in the last axis",
    },
)
"""The InternVL family."""
