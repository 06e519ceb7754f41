"""GLM-4V (GLM-4.1V): a tower for pictures of any size, blocks of patches merged by a convolution, a decoder with post-norms."""

from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.generalized_components.qwen3_5_vision_encoder import Qwen3_5VisionBlockBridge
from transformer_lens.model_bridge.supported_architectures.glm4v import Glm4vArchitectureAdapter

from care_lens.lvlm.families.base import Dims
from care_lens.lvlm.families.grids import PATCHES, TOKENS
from care_lens.lvlm.families.llava import BLOCK, NATIVE_DECODER, PLAIN_DECODER
from care_lens.lvlm.families.qwen2_vl import GRID_ENCODER, QWEN2_VL


class _Glm4vAdapter(Glm4vArchitectureAdapter):
    """TransformerLens's adapter with the vision tower opened up, and the language MLP left in one piece.

    TransformerLens splits the joint gate and up projection in two, which changes the last bits of the logits.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        mlp = GeneralizedComponent(
            name="mlp",
            submodules={
                "gate": LinearBridge(name="gate_proj"),
                "in": LinearBridge(name="up_proj"),
                "out": LinearBridge(name="down_proj"),
            },
        )
        assert self.component_mapping is not None
        self.component_mapping["blocks"].submodules["mlp"] = GeneralizedComponent(
            name="mlp", submodules={"out": LinearBridge(name="down_proj")}
        )
        self.component_mapping["vision_encoder"] = GeneralizedComponent(
            name="model.visual",
            config=self.cfg,
            submodules={
                "embeddings": GeneralizedComponent(name="embeddings"),
                "blocks": Qwen3_5VisionBlockBridge(name="blocks", submodules={"mlp": mlp}),
            },
        )


def _vision_dims(config: Any) -> Dims:
    vision = config.vision_config
    width, heads = vision.hidden_size, vision.num_heads
    # vision.intermediate_size is the width of the merger's MLP
    return Dims(vision.depth, width, heads, width // heads, vision.out_hidden_size)


GLM4V = replace(
    QWEN2_VL,
    name="glm4v",
    architectures=("Glm4vForConditionalGeneration",),
    language=replace(
        NATIVE_DECODER,
        points={**NATIVE_DECODER.points, "hook_attn_out": "ln1_post.hook_out", "hook_mlp_out": "ln2_post.hook_out"},
        mlp="ln2_post",
        plain=replace(
            PLAIN_DECODER,
            points={
                **BLOCK,
                "hook_attn_out": ("post_self_attn_layernorm", "out"),
                "hook_mlp_out": ("post_mlp_layernorm", "out"),
            },
            mlp="post_mlp_layernorm",
            out={},
        ),
    ),
    vision=replace(GRID_ENCODER, dims=_vision_dims),
    outside={**QWEN2_VL.outside, "vision.hook_embed": "vision_encoder.embeddings.hook_out"},
    plain_outside={**QWEN2_VL.plain_outside, "vision.hook_embed": ("model.visual.embeddings", "out")},
    projector_width=lambda config: config.vision_config.out_hidden_size,
    outside_packing={"vision.hook_embed": PATCHES, "projector.hook_in": TOKENS, "projector.hook_out": TOKENS},
    adapters={"Glm4vForConditionalGeneration": _Glm4vAdapter},
    notes={"projector.hook_in": "after the tower's convolution has merged blocks of patches: one entry a token"},
)
"""The GLM-4V family."""
