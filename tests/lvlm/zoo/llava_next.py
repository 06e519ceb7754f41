"""LLaVA-NeXT, with Granite's decoder too, and LLaVA-OneVision: pictures in an overview and crops."""

import torch

from zoo.specimen import Specimen
from zoo.tiny import TEMPLATE, make_tokenizer

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "patch_size": 8}


def pinpoints(side: int) -> list[list[int]]:
    return [[side * rows, side * cols] for rows, cols in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


def _ready(model, processor):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("eager")
    return model.eval(), processor


def make_llava_next(granite: bool = False):
    """Tiles of 16 pixels, 2 x 2 patches. CLIP's tower, the third of 4 layers of which is read, and a Llama; or as in Granite
    Vision SigLIP's tower, of which three states are read, and a decoder that scales its branches."""
    from transformers import (
        CLIPVisionConfig,
        GraniteConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
        SiglipVisionConfig,
    )

    tokenizer = make_tokenizer()
    scales = {"residual_multiplier": 0.4, "attention_multiplier": 0.3, "embedding_multiplier": 3.0}
    text = GraniteConfig(**scales, vocab_size=len(tokenizer), **_TEXT) if granite else None
    tower = SiglipVisionConfig if granite else CLIPVisionConfig
    strategy = "full" if granite else "default"
    config = LlavaNextConfig(
        vision_config=tower(num_hidden_layers=4, image_size=16, **_VISION),
        text_config=text or LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints(16),
        vision_feature_layer=[-4, 2, -2] if granite else -2,
        vision_feature_select_strategy=strategy,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints(16)
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=0 if granite else 1,
        chat_template=TEMPLATE,
    )
    return _ready(LlavaNextForConditionalGeneration(config), processor)


def make_llava_onevision():
    """SigLIP's tower, read at its last layer; tiles of 20 pixels whose 2 x 2 patches show 16, resampled above 2 tiles."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
        SiglipVisionConfig,
    )

    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(num_hidden_layers=3, image_size=20, vision_use_head=False, **_VISION),
        text_config=Qwen2Config(vocab_size=len(tokenizer), **_TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints(20),
        vision_aspect_ratio="anyres_max_2",
    )
    images = LlavaOnevisionImageProcessor(size={"height": 20, "width": 20}, image_grid_pinpoints=pinpoints(20))
    processor = LlavaOnevisionProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=TEMPLATE,
    )
    return _ready(LlavaOnevisionForConditionalGeneration(config), processor)


_DECODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}


def _specimen(name, make, text: str, vision: str, **more) -> Specimen:
    return Specimen(
        name=name,
        make=make,
        language_layers="model.language_model.layers",
        vision_layers="model.vision_tower.encoder.layers",
        language=_DECODER,
        vision={**_DECODER, "attn.hook_z": ("self_attn.out_proj", "in"), "mlp.hook_post": ("mlp.fc2", "in")},
        outside={
            "vision.hook_embed": ("model.vision_tower.embeddings", "out"),
            "projector.hook_in": ("model.multi_modal_projector", "in"),
            "projector.hook_out": ("model.multi_modal_projector", "out"),
        },
        mid="post_attention_layernorm",
        vision_mid="layer_norm2",
        language_eager=(f"transformers.models.{text}.modeling_{text}", "eager_attention_forward"),
        vision_eager=(f"transformers.models.{vision}.modeling_{vision}", "eager_attention_forward"),
        **more,
    )


_SCALES = ("residual_multiplier", "residual_multiplier")
SPECIMENS = [
    _specimen("llava-next", make_llava_next, "llama", "clip"),
    _specimen("llava-onevision", make_llava_onevision, "qwen2", "siglip"),
    _specimen(
        "llava-next-granite", lambda: make_llava_next(granite=True), "granite", "siglip", language_scales=_SCALES
    ),
]
