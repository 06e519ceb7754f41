"""Mistral 3: a Pixtral tower, a projector that merges patches, and a decoder of the Mistral kind.

Pixtral lays the patches of all images in one row and masks attention between them. The projector's input is that row, its
output the row of merged patches. In the text each row of an image's tokens ends in a token of its own ([IMG_BREAK], after
the last row [IMG_END]), which is no image token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured, PictureRegion, PlainTower, Tile
from care_lens.lvlm.families.bridged import TowerBlock, native_attention
from care_lens.lvlm.families.llava import BLOCK, ENCODER, NATIVE_DECODER, PLAIN_OUTSIDE, projector_width, vision_depth
from care_lens.lvlm.packing import Packing


class Mistral3Adapter(LlavaArchitectureAdapter):
    """TransformerLens's adapter with hook points in the tower, and attention of the decoder left to Hugging Face."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        native_attention(self.components["blocks"])
        self.components["vision_encoder"] = GeneralizedComponent(
            name="model.vision_tower",
            submodules={
                "ln_pre": GeneralizedComponent(name="ln_pre"),
                "blocks": TowerBlock(
                    "transformer.layers",
                    norms=("attention_norm", "ffn_norm"),
                    attn="attention",
                    attn_out="o_proj",
                    mlp="feed_forward",
                    mlp_parts={"gate": "gate_proj", "in": "up_proj", "out": "down_proj"},
                ),
            },
        )


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    side = about.config.vision_config.patch_size * about.config.spatial_merge_size
    images = []
    for (width, height), resized in zip(about.sizes, about.outputs["image_sizes"].tolist(), strict=True):
        rows, cols = resized[0] // side, resized[1] // side
        region = PictureRegion(0.0, 0.0, float(width), float(height))
        images.append(ImageLayout(rows * cols, (Tile(0, rows, cols, region, stride=cols + 1),)))
    return images


def _packings(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Packing]:
    """The order of the row is that of the images, and raster order in each: only its ends have to be told."""
    sizes = torch.as_tensor(kwargs["image_sizes"])
    patch = model.config.vision_config.patch_size
    sides = {"patches": patch, "merged": patch * model.config.spatial_merge_size}
    lengths = {key: (sizes // side).prod(-1).tolist() for key, side in sides.items()}
    return {key: Packing.of(torch.arange(sum(counts)).split(counts)) for key, counts in lengths.items()}


MISTRAL3 = Family(
    name="mistral3",
    architectures=("Mistral3ForConditionalGeneration",),
    language=NATIVE_DECODER,
    vision=replace(
        ENCODER,
        blocks="vision_encoder.blocks",
        own_pattern=False,
        packing="patches",
        plain=PlainTower(
            blocks="model.vision_tower.transformer.layers",
            points={
                **BLOCK,
                "hook_attn_out": ("attention", "out"),
                "attn.hook_z": ("attention.o_proj", "in"),
                "mlp.hook_post": ("feed_forward.down_proj", "in"),
                "hook_mlp_out": ("feed_forward", "out"),
            },
            mid_norm="ffn_norm",
            mlp="feed_forward",
            attn="attention",
            out={"hook_attn_out": "attention.o_proj", "hook_mlp_out": "feed_forward.down_proj"},
        ),
        absent={
            "attn.hook_pattern": "the tower attends over the patches of all images in one row, so that a pattern is not one "
            "image's; use attn.hook_z"
        },
    ),
    outside={
        "vision.hook_embed": "vision_encoder.ln_pre.hook_in",
        "projector.hook_in": "vision_projector.hook_in",
        "projector.hook_out": "vision_projector.hook_out",
    },
    outside_packing={
        "vision.hook_embed": "patches",
        "projector.hook_in": "patches",
        "projector.hook_out": "merged",
    },
    packings=_packings,
    tower_module="model.vision_tower",
    vision_depth=vision_depth,
    projector_width=projector_width,
    layout=_layout,
    extra_inputs=("image_sizes",),
    plain_outside={**PLAIN_OUTSIDE, "vision.hook_embed": ("model.vision_tower.ln_pre", "in")},
    adapters={"Mistral3ForConditionalGeneration": Mistral3Adapter},
    notes={
        "vision.hook_embed": "patches before the tower's first norm; the tower has no CLS token and adds no positions",
    },
)
"""The Mistral 3 family."""
