"""Qwen3-VL: Qwen2-VL's scheme with learned positions, and with DeepStack.

DeepStack: mergers of their own read some earlier vision blocks, and the language model adds what they make to the residual
stream at image tokens, behind each of its first blocks.
"""

from dataclasses import replace

from care_lens.lvlm.families.qwen2_vl import GRID_ENCODER, QWEN2_5_VL, QWEN2_VL, plain_grid_encoder

_SIDE_PATH = (
    "DeepStack's own mergers also carry the picture, from the vision blocks in "
    "config.vision_config.deepstack_visual_indexes to the first language blocks; this site is not on their path"
)

QWEN3_VL = replace(
    QWEN2_VL,
    name="qwen3_vl",
    architectures=("Qwen3VLForConditionalGeneration",),
    vision=replace(
        GRID_ENCODER,
        points={**GRID_ENCODER.points, "mlp.hook_post": "mlp.linear_fc2.hook_in"},
        plain=plain_grid_encoder("mlp.linear_fc2"),
    ),
    projector_width=QWEN2_5_VL.projector_width,
    adapters={},
    notes={
        "vision.hook_embed": "before the learned positions are added; vision.blocks.0.hook_resid_pre has them",
        "projector.hook_in": _SIDE_PATH,
        "projector.hook_out": _SIDE_PATH,
        "language.hook_resid_post": "in the first layers (as many as deepstack_visual_indexes), before DeepStack adds its "
        "visual features at image tokens",
        "language.hook_resid_pre": "in the layers after those, with DeepStack's visual features of the layer before",
    },
)
"""The Qwen3-VL family."""
