"""InternVL, with a Qwen2 decoder."""

from zoo.specimen import Specimen
from zoo.words import random_weights, template, word_tokenizer

PATCH, SIDE, TILES = 4, 16, 6
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
    "attn.hook_z": ("attention.projection_layer", "in"),
    "hook_attn_out": ("attention", "out"),
    "mlp.hook_post": ("mlp.fc2", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}


def make_internvl(text: str = "qwen2", *, vision=None, **settings):
    from transformers import (
        AutoConfig,
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        InternVLVisionConfig,
    )

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = [*names.values(), "<|im_start|>", "<|im_end|>"]
    tokenizer = word_tokenizer(special, extra_special_tokens=names)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
            **(vision or {}),
        ),
        text_config=AutoConfig.for_model(text, **sizes),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        **settings,
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=TILES),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=config.image_seq_length,
        chat_template=template("<IMG_CONTEXT>", "<|im_start|>", "<|im_end|>"),
    )
    return random_weights(InternVLForConditionalGeneration(config)), processor


SPECIMENS = [
    Specimen(
        name="internvl",
        make=make_internvl,
        language_layers="model.language_model.layers",
        vision_layers="model.vision_tower.encoder.layer",
        language=_DECODER,
        vision=_ENCODER,
        outside={
            "vision.hook_embed": ("model.vision_tower.embeddings", "out"),
            "projector.hook_in": ("model.multi_modal_projector", "in"),
            "projector.hook_out": ("model.multi_modal_projector", "out"),
        },
        mid="post_attention_layernorm",
        vision_mid="layernorm_after",
        language_eager=("transformers.models.qwen2.modeling_qwen2", "eager_attention_forward"),
        vision_eager=("transformers.models.internvl.modeling_internvl", "eager_attention_forward"),
        vision_scales=("lambda_1", "lambda_2"),
    )
]
