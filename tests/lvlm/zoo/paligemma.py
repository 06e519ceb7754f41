"""PaliGemma with a Gemma decoder, and PaliGemma 2 with a Gemma 2 one (soft caps, sliding window in every second layer)."""

from zoo.gemma3 import OUTSIDE, POST_NORM_LAYER, SIGLIP_LAYER, TEXT, TOWER, gemma_tokenizer, randomise
from zoo.specimen import Specimen

LAYER = {**POST_NORM_LAYER, "hook_attn_out": ("self_attn", "out"), "hook_mlp_out": ("mlp", "out")}


def make_paligemma(text: str = "gemma"):
    """A random PaliGemma and its processor: 32 px images of 2 x 2 patches.

    The processor adds more than a thousand tokens for places in a picture; the model's vocabulary has them too.
    """
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    tokenizer = gemma_tokenizer(image_token="<image>")
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    settings = {**TEXT, "vocab_size": len(tokenizer)}
    towers = {
        "gemma": lambda: GemmaConfig(**settings),
        "gemma2": lambda: Gemma2Config(**settings, query_pre_attn_scalar=8, sliding_window=6),
    }
    config = PaliGemmaConfig(
        text_config=towers[text](),
        vision_config=SiglipVisionConfig(**{**TOWER, "patch_size": 16}),
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return randomise(PaliGemmaForConditionalGeneration(config)), processor


def _specimen(name: str, text: str, layer: dict[str, tuple[str, str]], mid: str) -> Specimen:
    return Specimen(
        name=name,
        make=lambda: make_paligemma(text),
        language_layers="model.language_model.layers",
        vision_layers="model.vision_tower.encoder.layers",
        language=layer,
        vision=SIGLIP_LAYER,
        outside=OUTSIDE,
        mid=mid,
        vision_mid="layer_norm2",
        language_eager=(f"transformers.models.{text}.modeling_{text}", "eager_attention_forward"),
        vision_eager=("transformers.models.siglip.modeling_siglip", "eager_attention_forward"),
    )


SPECIMENS = [
    _specimen("paligemma", "gemma", LAYER, "post_attention_layernorm"),
    _specimen("paligemma2", "gemma2", POST_NORM_LAYER, "pre_feedforward_layernorm"),
]
