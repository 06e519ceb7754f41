"""LLaVA: a CLIP or SigLIP tower, a two-layer projector and a decoder, joined by image placeholders.

The projector reads the hidden states of one vision layer, ``config.vision_feature_layer`` (several,
concatenated, if it is a list); vision layers above the highest of them compute nothing that anything reads.
Transformers records those hidden states inside the wrapped layer, before TransformerLens's hook point, whose
edits are therefore lost at the layer that is read: care_lens makes its own ``hook_resid_post`` where they are
recorded.
"""

from typing import Any

from care_lens.lvlm.families.base import Family, PictureRegion, TowerMap

_DECODER = {
    "hook_resid_pre": "hook_in",
    "hook_attn_out": "attn.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "attn.hook_pattern": "attn.hook_pattern",
    "mlp.hook_post": "mlp.out.hook_in",
    "hook_mlp_out": "mlp.hook_out",
}


def _vision_depth(config: Any) -> int:
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    states = config.vision_config.num_hidden_layers + 1
    return max(layer % states for layer in layers)


def _class_tokens(config: Any) -> int:
    return 1 if config.vision_config.model_type == "clip_vision_model" else 0


def _projector_width(config: Any) -> int:
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _patch_grid(config: Any, height: int, width: int) -> tuple[int, int]:
    patch = config.vision_config.patch_size
    return height // patch, width // patch


def _image_tokens(config: Any, rows: int, cols: int) -> int:
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return rows * cols + _class_tokens(config) - dropped


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


LLAVA = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    language=TowerMap(
        blocks="blocks",
        points={**_DECODER, "hook_resid_post": "hook_out"},
        mid_norm="ln2",
        mlp="mlp",
    ),
    vision=TowerMap(
        blocks="vision_encoder.encoder_layers",
        points=_DECODER,
        mid_norm="ln2",
        mlp="mlp",
        own_resid_post=True,
        read_only={"attn.hook_pattern": "attention has used the pattern when it is read; edit attn.hook_z instead"},
    ),
    outside={
        "vision.hook_embed": "vision_encoder.embeddings.hook_out",
        "projector.hook_in": "vision_projector.hook_in",
        "projector.hook_out": "vision_projector.hook_out",
    },
    vision_depth=_vision_depth,
    class_tokens=_class_tokens,
    projector_width=_projector_width,
    patch_grid=_patch_grid,
    image_tokens=_image_tokens,
    picture_region=picture_region,
)
"""The LLaVA family."""
