"""Qwen2-VL and Qwen2.5-VL: a tower for pictures of any size, a merger of 2 x 2 patches, a decoder with positions in 3D.

Qwen2.5-VL's tower puts the merge blocks in the order of its attention windows, after the patch embedding and until after
the merger.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import (
    Qwen3_5VisionBlockBridge,
    Qwen3_5VisionEncoderBridge,
)
from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter

from care_lens.lvlm.families.base import Dims, Family, PlainTower, TowerMap
from care_lens.lvlm.families.grids import (
    NO_PATTERN,
    PATCHES,
    TOKENS,
    grid_layout,
    grid_packings,
    packed_blocks,
    tower_grids,
)
from care_lens.lvlm.families.llava import NATIVE_DECODER, vision_dims
from care_lens.lvlm.packing import Packing

_EMBED = "embed"
"""Key of the packing of the patch embedding, whose patches are not in window order yet."""

PLAIN_GRID_ENCODER = PlainTower(
    blocks="model.visual.blocks",
    points={
        "hook_resid_pre": ("", "in"),
        "hook_attn_out": ("attn", "out"),
        "attn.hook_z": ("attn.proj", "in"),
        "mlp.hook_post": ("mlp.down_proj", "in"),
        "hook_mlp_out": ("mlp", "out"),
        "hook_resid_post": ("", "out"),
    },
    mid_norm="norm2",
    attn="attn",
    out={"hook_attn_out": "attn.proj", "hook_mlp_out": "mlp.down_proj"},
)
"""The same tower on the plain model."""


def plain_grid_encoder(last: str) -> PlainTower:
    """Such a tower on the plain model whose MLP's last linear map has another name.

    Args:
        last: Path of that map inside a block.
    """
    return replace(
        PLAIN_GRID_ENCODER,
        points={**PLAIN_GRID_ENCODER.points, "mlp.hook_post": (last, "in")},
        out={**PLAIN_GRID_ENCODER.out, "hook_mlp_out": last},
    )


GRID_ENCODER = TowerMap(
    blocks="vision_encoder.blocks",
    points={
        "hook_resid_pre": "hook_in",
        "hook_attn_out": "attn.hook_out",
        "attn.hook_z": "attn.proj.hook_in",
        "mlp.hook_post": "mlp.out.hook_in",
        "hook_mlp_out": "mlp.hook_out",
        "hook_resid_post": "hook_out",
    },
    mid_norm="norm2",
    mlp="mlp",
    dims=vision_dims,
    absent={"attn.hook_pattern": NO_PATTERN},
    packing=PATCHES,
    plain=PLAIN_GRID_ENCODER,
)
"""A tower that lays the patches of all images in one row."""


class _Qwen2VLAdapter(Qwen2_5_VLArchitectureAdapter):
    """TransformerLens's adapter of Qwen2.5-VL with Qwen2-VL's ungated vision MLP."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        mlp = GeneralizedComponent(
            name="mlp", submodules={"in": LinearBridge(name="fc1"), "out": LinearBridge(name="fc2")}
        )
        assert self.component_mapping is not None
        self.component_mapping["vision_encoder"] = Qwen3_5VisionEncoderBridge(
            name="model.visual",
            config=self.cfg,
            submodules={
                "pos_embed": GeneralizedComponent(name="rotary_pos_emb"),
                "blocks": Qwen3_5VisionBlockBridge(name="blocks", submodules={"mlp": mlp}),
            },
        )


def _qwen2_dims(config: Any) -> Dims:
    vision = config.vision_config
    width, heads = vision.embed_dim, vision.num_heads
    return Dims(vision.depth, width, heads, width // heads, int(width * vision.mlp_ratio))


def vision_depth(config: Any) -> int:
    """All vision blocks: the projector reads the last."""
    return config.vision_config.depth


def _window_packings(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Packing]:
    vision = model.config.vision_config
    merge, grids = vision.spatial_merge_size, tower_grids(args, kwargs)
    merged = [(t, h // merge, w // merge) for t, h, w in grids]
    rows = _window_rows(merged, vision.window_size // merge // vision.patch_size)
    patches = (rows[:, None] * merge**2 + torch.arange(merge**2)).flatten()
    return {
        _EMBED: packed_blocks(grids, merge),
        PATCHES: packed_blocks(grids, merge, patches),
        TOKENS: packed_blocks(merged, rows=rows),
    }


def _window_rows(grids: list[tuple[int, int, int]], side: int) -> Int[Tensor, "n"]:
    """Where each merged token is once the tokens are sorted by frame and by window of ``side`` x ``side``."""
    windows, start = [], 0
    for t, h, w in grids:
        high, wide = -(-h // side), -(-w // side)
        frame, row, col = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        windows.append(start + ((frame * high + row // side) * wide + col // side).flatten())
        start += t * high * wide
    return torch.cat(windows).argsort(stable=True).argsort()


QWEN2_VL = Family(
    name="qwen2_vl",
    architectures=("Qwen2VLForConditionalGeneration",),
    language=NATIVE_DECODER,
    vision=replace(GRID_ENCODER, dims=_qwen2_dims, plain=plain_grid_encoder("mlp.fc2")),
    outside={
        "vision.hook_embed": "vision_encoder.patch_embed.hook_out",
        "projector.hook_in": "vision_projector.hook_in",
        "projector.hook_out": "vision_projector.hook_out",
    },
    vision_depth=vision_depth,
    projector_width=lambda config: config.vision_config.embed_dim,
    layout=grid_layout,
    outside_packing={"vision.hook_embed": PATCHES, "projector.hook_in": PATCHES, "projector.hook_out": TOKENS},
    packings=grid_packings,
    tower_module="model.visual",
    plain_outside={
        "vision.hook_embed": ("model.visual.patch_embed", "out"),
        "projector.hook_in": ("model.visual.merger", "in"),
        "projector.hook_out": ("model.visual.merger", "out"),
    },
    extra_inputs=("image_grid_thw",),
    token_inputs={"mm_token_type_ids": 0},
    own_positions=True,
    adapters={"Qwen2VLForConditionalGeneration": _Qwen2VLAdapter},
)
"""The Qwen2-VL family."""

QWEN2_5_VL = replace(
    QWEN2_VL,
    name="qwen2_5_vl",
    architectures=("Qwen2_5_VLForConditionalGeneration",),
    vision=GRID_ENCODER,
    projector_width=lambda config: config.vision_config.hidden_size,
    outside_packing={**QWEN2_VL.outside_packing, "vision.hook_embed": _EMBED},
    packings=_window_packings,
    adapters={},
)
"""The Qwen2.5-VL family."""
