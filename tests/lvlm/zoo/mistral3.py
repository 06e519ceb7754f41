"""Mistral 3, with a Mistral decoder and with a Ministral 3 one."""

import torch

from zoo.specimen import Specimen
from zoo.words import random_weights, template, word_tokenizer

PATCH, MERGE, LONGEST = 4, 2, 48
_DECODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}
_ENCODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("attention.o_proj", "in"),
    "hook_attn_out": ("attention", "out"),
    "mlp.hook_post": ("feed_forward.down_proj", "in"),
    "hook_mlp_out": ("feed_forward", "out"),
    "hook_resid_post": ("", "out"),
}


def make_mistral3(text: str = "mistral", **settings):
    from transformers import (
        AutoConfig,
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    tokenizer = word_tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]"])
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if text == "ministral3":  # queries are scaled up beyond the 8th position
        rope = rope | {"llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 8}
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=LONGEST,
            patch_size=PATCH,
        ),
        text_config=AutoConfig.for_model(text, rope_parameters=rope, **sizes),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=MERGE,
        **settings,
    )
    processor = PixtralProcessor(
        image_processor=PixtralImageProcessor(
            size={"longest_edge": LONGEST}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        chat_template=template("[IMG]", "[INST]", "[/INST]"),
    )
    return random_weights(Mistral3ForConditionalGeneration(config)), processor


def _rows(inputs, side: int) -> list[torch.Tensor]:
    counts = [(h // side) * (w // side) for h, w in inputs.extra["image_sizes"].tolist()]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [torch.arange(start, start + n) for start, n in zip(starts, counts, strict=True)]


def _patches(inputs) -> list[torch.Tensor]:
    return _rows(inputs, PATCH)


def _merged(inputs) -> list[torch.Tensor]:
    return _rows(inputs, PATCH * MERGE)


def _specimen(text: str) -> Specimen:
    return Specimen(
        name=f"mistral3-{text}",
        make=lambda: make_mistral3(text),
        language_layers="model.language_model.layers",
        vision_layers="model.vision_tower.transformer.layers",
        language=_DECODER,
        vision=_ENCODER,
        outside={
            "vision.hook_embed": ("model.vision_tower.ln_pre", "in"),
            "projector.hook_in": ("model.multi_modal_projector", "in"),
            "projector.hook_out": ("model.multi_modal_projector", "out"),
        },
        mid="post_attention_layernorm",
        vision_mid="ffn_norm",
        language_eager=(f"transformers.models.{text}.modeling_{text}", "eager_attention_forward"),
        orders={
            "vision": _patches,
            "vision.hook_embed": _patches,
            "projector.hook_in": _patches,
            "projector.hook_out": _merged,
        },
    )


SPECIMENS = [_specimen("mistral"), _specimen("ministral3")]
