"""Llama 4 with layers of experts and one without."""

import torch

from zoo.specimen import Specimen
from zoo.words import random_weights, template, word_tokenizer

PATCH, SIDE, TILES = 4, 16, 6
_DECODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("feed_forward.down_proj", "in"),
    "hook_mlp_out": ("feed_forward", "out"),
    "hook_resid_post": ("", "out"),
}
_ENCODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.fc2", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}


def make_llama4():
    from transformers import (
        Llama4Config,
        Llama4ForConditionalGeneration,
        Llama4ImageProcessor,
        Llama4Processor,
        Llama4TextConfig,
        Llama4VisionConfig,
    )

    image = ["<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"]
    image += ["<|tile_x_separator|>", "<|tile_y_separator|>"]
    tokenizer = word_tokenizer([*image, "<|header_start|>", "<|eot|>"])
    config = Llama4Config(
        vision_config=Llama4VisionConfig(
            hidden_size=24,
            intermediate_size=96,  # what the adapter reads: four patches side by side
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=PATCH,
            projector_input_dim=28,
            projector_output_dim=28,
            vision_output_dim=28,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        text_config=Llama4TextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=40,
            intermediate_size_mlp=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=3,
            moe_layers=[0, 2],
            no_rope_layer_interval=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    # Normalised pixels are bfloat16, which Hugging Face's float32 model does not take.
    images = Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=TILES, do_normalize=False)
    processor = Llama4Processor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        chat_template=template("<|image|>", "<|header_start|>", "<|eot|>"),
    )
    return random_weights(Llama4ForConditionalGeneration(config)), processor


def _rows(n: int, length: int) -> list[torch.Tensor]:
    return [torch.arange(i * length, (i + 1) * length) for i in range(n)]


def _tokens(inputs) -> list[torch.Tensor]:
    return _rows(len(inputs.pixel_values), (SIDE // PATCH // 2) ** 2)


SPECIMENS = [
    Specimen(
        name="llama4",
        make=make_llama4,
        language_layers="language_model.model.layers",
        vision_layers="vision_model.model.layers",
        language=_DECODER,
        vision=_ENCODER,
        outside={
            "vision.hook_embed": ("vision_model.layernorm_pre", "in"),
            "projector.hook_in": ("multi_modal_projector", "in"),
            "projector.hook_out": ("multi_modal_projector", "out"),
        },
        mid="post_attention_layernorm",
        vision_mid="post_attention_layernorm",
        language_eager=("transformers.models.llama4.modeling_llama4", "eager_attention_forward"),
        vision_eager=("transformers.models.llama4.modeling_llama4", "vision_eager_attention_forward"),
        orders={
            "": lambda inputs: _rows(*inputs.input_ids.shape),
            "vision.hook_embed": lambda inputs: _rows(len(inputs.pixel_values), (SIDE // PATCH) ** 2 + 1),
            "projector.hook_in": _tokens,
            "projector.hook_out": _tokens,
        },
    )
]
