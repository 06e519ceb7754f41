"""Llama 4: a tower with its class token last, an adapter that merges patches, a linear projector, and a decoder of experts.

A picture is resized onto a canvas of tiles, at its top left, and padded; where there are several tiles, the whole picture
follows as a last one. Tokens between tiles are no image tokens. The adapter after the tower is not a site: the projector's
input is its output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llama4_multimodal import Llama4MultimodalArchitectureAdapter

from care_lens.lvlm.families.base import Dims, Family, ImageLayout, Pictured, PictureRegion, Tile
from care_lens.lvlm.families.bridged import TowerBlock
from care_lens.lvlm.families.llava import BLOCK, ENCODER, NATIVE_DECODER, PLAIN_DECODER, PLAIN_ENCODER, text_dims
from care_lens.lvlm.packing import Packing


class Llama4Adapter(Llama4MultimodalArchitectureAdapter):
    """TransformerLens's adapter with hook points in the tower."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.components["vision_encoder"] = GeneralizedComponent(
            name="vision_model",
            submodules={
                "ln_pre": GeneralizedComponent(name="layernorm_pre"),
                "blocks": TowerBlock(
                    "model.layers",
                    norms=("input_layernorm", "post_attention_layernorm"),
                    attn="self_attn",
                    attn_out="o_proj",
                    mlp="mlp",
                    mlp_parts={"in": "fc1", "out": "fc2"},
                ),
                "ln_post": GeneralizedComponent(name="layernorm_post"),
                "adapter": GeneralizedComponent(name="vision_adapter"),
            },
        )


def _text_dims(config: Any) -> Dims:
    """Sizes of the language tower; the layers that have neurons are those without experts."""
    return text_dims(config)._replace(d_mlp=config.text_config.intermediate_size_mlp)


def _grid(config: Any) -> int:
    """Side of the square of tokens that a tile becomes."""
    tower = config.vision_config
    return int(tower.image_size // tower.patch_size * tower.pixel_shuffle_ratio)


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    side = _grid(about.config)
    images = []
    for width, height in about.sizes:
        (down, across), (w, h) = _tiling(about.processor.image_processor, width, height)
        regions = [PictureRegion(x * w, y * h, w, h) for y in range(down) for x in range(across)]
        if len(regions) > 1:
            regions.append(PictureRegion(0.0, 0.0, float(width), float(height)))
        tiles = tuple(Tile(i * side * side, side, side, region) for i, region in enumerate(regions))
        images.append(ImageLayout(len(tiles) * side * side, tiles))
    return images


def _tiling(processor: Any, width: int, height: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """Rows and columns of a picture's tiles, and a tile's width and height in its pixels, by the processor's own rules."""
    from transformers.image_utils import SizeDict
    from transformers.models.llama4.image_processing_llama4 import (
        find_supported_resolutions,
        get_best_fit,
        get_max_res_without_distortion,
    )

    tile = processor.size["height"]
    allowed = torch.tensor(find_supported_resolutions(processor.max_patches, SizeDict(height=tile, width=tile)))
    canvas = [int(side) for side in get_best_fit((height, width), allowed, processor.resize_to_max_canvas)]
    most = canvas
    if not processor.resize_to_max_canvas:  # smaller pictures grow to the size of a tile at most
        most = [min(max(side, tile), limit) for side, limit in zip((height, width), canvas, strict=True)]
    resized = [max(int(side), 1) for side in get_max_res_without_distortion((height, width), (most[0], most[1]))]
    return (canvas[0] // tile, canvas[1] // tile), (tile * width / resized[1], tile * height / resized[0])


def _packings(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Packing]:
    """The projector sees the tokens of all tiles in one row; embeddings come with an axis more. Their order is ours."""
    tiles = len(args[0] if args else kwargs["pixel_values"])
    tower = model.config.vision_config
    lengths = {"embedded": (tower.image_size // tower.patch_size) ** 2 + 1, "tokens": _grid(model.config) ** 2}
    return {key: Packing.of(torch.arange(tiles * length).split(length)) for key, length in lengths.items()}


_DECODER_POINTS = {
    **NATIVE_DECODER.points,
    "mlp.hook_post": "mlp.dense_out.hook_in",
}

LLAMA4 = Family(
    name="llama4",
    architectures=("Llama4ForConditionalGeneration",),
    language=replace(
        NATIVE_DECODER,
        points=_DECODER_POINTS,
        dims=_text_dims,
        absent={
            "mlp.hook_post": "a layer of experts has no one set of neurons (each token goes to experts of its own); use "
            "hook_mlp_out, or a layer without experts if the model has one"
        },
        plain=replace(
            PLAIN_DECODER,
            blocks="language_model.model.layers",
            points={
                **BLOCK,
                "mlp.hook_post": ("feed_forward.down_proj", "in"),
                "hook_mlp_out": ("feed_forward", "out"),
            },
            mlp="feed_forward",
            out={"hook_attn_out": "self_attn.o_proj"},
            final_norm="language_model.model.norm",
        ),
    ),
    vision=replace(
        ENCODER,
        blocks="vision_encoder.blocks",
        points={**ENCODER.points, "hook_resid_post": "hook_out"},
        own_resid_post=False,
        eager="vision_eager_attention_forward",
        plain=replace(
            PLAIN_ENCODER,
            blocks="vision_model.model.layers",
            points={**BLOCK, "mlp.hook_post": ("mlp.fc2", "in")},
            mid_norm="post_attention_layernorm",
            out={"hook_attn_out": "self_attn.o_proj", "hook_mlp_out": "mlp.fc2"},
        ),
    ),
    outside={
        "vision.hook_embed": "vision_encoder.ln_pre.hook_in",
        "projector.hook_in": "vision_projector.hook_in",
        "projector.hook_out": "vision_projector.hook_out",
    },
    outside_packing={"vision.hook_embed": "embedded", "projector.hook_in": "tokens", "projector.hook_out": "tokens"},
    packings=_packings,
    tower_module="vision_model",
    vision_depth=lambda config: config.vision_config.num_hidden_layers,
    projector_width=lambda config: config.vision_config.vision_output_dim,
    layout=_layout,
    # An image's placeholder in the text is <|image|>, its tokens are <|patch|>.
    image_ids=lambda processor: [processor.tokenizer.convert_tokens_to_ids(processor.img_patch_token)],
    closing_tokens=lambda config: 1,
    entries=lambda about: len(about.outputs["pixel_values"]),
    pixels_in_dtype=True,
    plain_outside={
        "vision.hook_embed": ("vision_model.layernorm_pre", "in"),
        "projector.hook_in": ("multi_modal_projector", "in"),
        "projector.hook_out": ("multi_modal_projector", "out"),
    },
    adapters={"Llama4ForConditionalGeneration": Llama4Adapter},
    notes={
        "vision.hook_embed": "patches with their positions, before the tower's first norm",
        "projector.hook_in": "the output of the adapter that merges patches",
    },
)
"""The Llama 4 family."""
