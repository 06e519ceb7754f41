"""LLaVA: a CLIP or SigLIP tower, a two-layer projector and a decoder, joined by image placeholders.

The projector reads the hidden states of one vision layer, ``config.vision_feature_layer`` (several,
concatenated, if it is a list); vision layers above the highest of them compute nothing that anything reads.
Transformers records those hidden states inside the wrapped layer, before TransformerLens's hook point, whose
edits are therefore lost at the layer that is read: care_lens makes its own ``hook_resid_post`` where they are
recorded.
"""

from collections.abc import Sequence
from typing import Any

from care_lens.lvlm.families.base import (
    Dims,
    Family,
    ImageLayout,
    Pictured,
    PictureRegion,
    PlainTower,
    Side,
    Tile,
    TowerMap,
    common_dims,
)

_DECODER = {
    "hook_resid_pre": "hook_in",
    "hook_attn_out": "attn.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
    "hook_mlp_out": "mlp.hook_out",
}


def text_dims(config: Any) -> Dims:
    """Sizes of the language tower."""
    return common_dims(config.text_config)


def vision_dims(config: Any) -> Dims:
    """Sizes of the vision tower."""
    return common_dims(config.vision_config)


def vision_depth(config: Any) -> int:
    """Number of vision blocks up to the highest layer that the projector reads."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    states = config.vision_config.num_hidden_layers + 1
    return max(layer % states for layer in layers)


def class_tokens(config: Any) -> int:
    """One CLS token in CLIP's tower, none in SigLIP's."""
    return 1 if config.vision_config.model_type == "clip_vision_model" else 0


def projector_width(config: Any) -> int:
    """Width of the features, of all layers that are read."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    config = about.config
    height, width = about.outputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    rows, cols = height // patch, width // patch
    before = class_tokens(config) - (1 if config.vision_feature_select_strategy == "default" else 0)
    return [
        ImageLayout(
            rows * cols + before,
            (Tile(before, rows, cols, picture_region(about.processor.image_processor, *size)),),
        )
        for size in about.sizes
    ]


def picture_region(image_processor: Any, width: int, height: int) -> PictureRegion:
    """What a CLIP-like image processor keeps of a picture (it may pad, resize and centre crop).

    Args:
        image_processor: The image processor.
        width: Width of the picture in pixels.
        height: Its height.

    Returns:
        The region in the picture's pixels; it extends beyond the picture where the processor pads.
    """
    left, top, w, h = 0.0, 0.0, float(width), float(height)
    if getattr(image_processor, "do_pad", False):
        side = max(w, h)
        left, top, w, h = (w - side) / 2, (h - side) / 2, side, side
    resized = (w, h)
    if getattr(image_processor, "do_resize", False):
        size = image_processor.size
        if shortest := size.get("shortest_edge"):
            resized = (w * shortest / min(w, h), h * shortest / min(w, h))
        else:
            resized = (float(size["width"]), float(size["height"]))
    if getattr(image_processor, "do_center_crop", False):
        crop = image_processor.crop_size
        kept_w, kept_h = crop["width"] / resized[0], crop["height"] / resized[1]
        left, top = left + w * (1 - kept_w) / 2, top + h * (1 - kept_h) / 2
        w, h = w * kept_w, h * kept_h
    return PictureRegion(left, top, w, h)


BLOCK: dict[str, tuple[str, Side]] = {
    "hook_resid_pre": ("", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}
"""Components of a decoder's block on the plain model."""

PLAIN_DECODER = PlainTower(
    blocks="model.language_model.layers",
    points=BLOCK,
    mid_norm="post_attention_layernorm",
    out={"hook_attn_out": "self_attn.o_proj", "hook_mlp_out": "mlp.down_proj"},
    final_norm="model.language_model.norm",
)
"""A decoder of the Llama kind on the plain model."""

PLAIN_ENCODER = PlainTower(
    blocks="model.vision_tower.encoder.layers",
    points={**BLOCK, "attn.hook_z": ("self_attn.out_proj", "in"), "mlp.hook_post": ("mlp.fc2", "in")},
    mid_norm="layer_norm2",
    out={"hook_attn_out": "self_attn.out_proj", "hook_mlp_out": "mlp.fc2"},
)
"""A CLIP or SigLIP tower on the plain model."""

DECODER = TowerMap(
    blocks="blocks",
    points={**_DECODER, "attn.hook_pattern": "attn.hook_pattern", "hook_resid_post": "hook_out"},
    mid_norm="ln2",
    mlp="mlp",
    dims=text_dims,
    plain=PLAIN_DECODER,
)
"""A decoder whose attention TransformerLens computes itself."""

NATIVE_DECODER = TowerMap(
    blocks="blocks",
    points={**_DECODER, "hook_resid_post": "hook_out"},
    mid_norm="ln2",
    mlp="mlp",
    dims=text_dims,
    own_pattern=True,
    plain=PLAIN_DECODER,
)
"""A decoder whose attention is left to Hugging Face."""

ENCODER = TowerMap(
    blocks="vision_encoder.encoder_layers",
    points=_DECODER,
    mid_norm="ln2",
    mlp="mlp",
    dims=vision_dims,
    own_resid_post=True,
    own_pattern=True,
    plain=PLAIN_ENCODER,
)
"""A CLIP or SigLIP tower, hidden states of which may be recorded at any layer."""

OUTSIDE = {
    "vision.hook_embed": "vision_encoder.embeddings.hook_out",
    "projector.hook_in": "vision_projector.hook_in",
    "projector.hook_out": "vision_projector.hook_out",
}

PLAIN_OUTSIDE: dict[str, tuple[str, Side]] = {
    "vision.hook_embed": ("model.vision_tower.embeddings", "out"),
    "projector.hook_in": ("model.multi_modal_projector", "in"),
    "projector.hook_out": ("model.multi_modal_projector", "out"),
}

LLAVA = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    language=DECODER,
    vision=ENCODER,
    outside=OUTSIDE,
    vision_depth=vision_depth,
    projector_width=projector_width,
    layout=_layout,
    class_tokens=class_tokens,
    batched=True,
    plain_outside=PLAIN_OUTSIDE,
)
"""The LLaVA family."""
