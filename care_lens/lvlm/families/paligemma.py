"""PaliGemma: a SigLIP tower, a linear projector and a Gemma decoder (PaliGemma 2: a Gemma 2 one) that reads its prompt whole.

Image and prompt see each other in both directions, what is answered sees the past only: ``token_type_ids`` are 0 in the
prompt and 1 in the response, as in ``generate``. There is no chat template: the processor puts the images first, then the
beginning of sequence, the prompt and a newline.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge.generalized_components import BlockBridge, RMSNormalizationBridge
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured
from care_lens.lvlm.families.gemma3 import POST_NORM_DECODER, all_layers, square_layout, vision_width
from care_lens.lvlm.families.llava import DECODER, ENCODER, OUTSIDE, PLAIN_OUTSIDE

_ARCHITECTURE = "PaliGemmaForConditionalGeneration"


class _GemmaAdapter(LlavaArchitectureAdapter):
    """TransformerLens's adapter of LLaVA, told that Gemma's norms multiply with 1 + weight."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.rmsnorm_uses_offset = True


class _Gemma2Adapter(_GemmaAdapter):
    """The same with a norm before and after each branch."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        assert self.component_mapping is not None
        blocks = self.component_mapping["blocks"]
        norms = {
            "ln1_post": RMSNormalizationBridge(name="post_attention_layernorm", config=self.cfg),
            "ln2": RMSNormalizationBridge(name="pre_feedforward_layernorm", config=self.cfg),
            "ln2_post": RMSNormalizationBridge(name="post_feedforward_layernorm", config=self.cfg),
        }
        # Made anew, so that TransformerLens's own names of the branches mean the norms' outputs too.
        self.component_mapping["blocks"] = BlockBridge(
            "model.language_model.layers", submodules={**blocks.submodules, **norms}
        )


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    vision = about.config.vision_config
    return square_layout(about, vision.image_size // vision.patch_size, vision.patch_size)


def _prompt(processor: Any, text: str, images: int) -> str:
    """With images the processor itself adds the beginning of sequence and the newline; it refuses text alone."""
    return f"{processor.image_token * images}{text}" if images else f"{processor.tokenizer.bos_token}{text}\n"


def _variant(config: Any) -> Family:
    return PALIGEMMA2 if config.text_config.model_type == "gemma2" else PALIGEMMA


PALIGEMMA = Family(
    name="paligemma",
    architectures=(_ARCHITECTURE,),
    language=DECODER,
    vision=ENCODER,
    outside=OUTSIDE,
    vision_depth=all_layers,
    projector_width=vision_width,
    layout=_layout,
    prompt=_prompt,
    token_inputs={"token_type_ids": 1},
    first_position=1,
    needs_images=True,
    plain_outside=PLAIN_OUTSIDE,
    variant=_variant,
    adapters={_ARCHITECTURE: _GemmaAdapter},
)
"""The PaliGemma family."""

PALIGEMMA2 = replace(PALIGEMMA, name="paligemma2", language=POST_NORM_DECODER, adapters={_ARCHITECTURE: _Gemma2Adapter})
"""PaliGemma 2, which has the same architecture's name and another decoder."""
