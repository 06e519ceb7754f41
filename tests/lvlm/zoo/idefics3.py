"""Idefics3, and SmolVLM with tiles that its patches do not fill."""

from zoo.specimen import Specimen
from zoo.words import random_weights, template, word_tokenizer

_TEXT = {
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
_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 4,
}
_MARKERS = [f"<row_{y + 1}_col_{x + 1}>" for y in range(6) for x in range(6)]
_SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", *_MARKERS]


def _parts(tokenizer, vision, side: int, scale: int):
    """The settings of a config, and of a processor."""
    from transformers import LlamaConfig

    config = {
        "vision_config": vision(image_size=side, **_VISION),
        "text_config": LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": scale,
    }
    processor = {
        "tokenizer": tokenizer,
        "image_seq_len": (side // _VISION["patch_size"] // scale) ** 2,
        "chat_template": template("<image>", "<|im_start|>", "<end_of_utterance>"),
    }
    return config, processor


def make_idefics3():
    """Tiles of 16 pixels, 4 x 4 patches, 2 x 2 tokens."""
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
        Idefics3VisionConfig,
    )

    config, settings = _parts(word_tokenizer(_SPECIAL), Idefics3VisionConfig, 16, 2)
    images = Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(image_processor=images, **settings)
    return random_weights(Idefics3ForConditionalGeneration(Idefics3Config(**config))), processor


def make_smolvlm():
    """Tiles of 26 pixels, of which 6 x 6 patches show 24, 2 x 2 tokens."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
        SmolVLMVisionConfig,
    )
    from transformers.models.smolvlm import processing_smolvlm

    # The processor wants the package num2words, which it uses for videos alone; so the tests can do without it.
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    config, settings = _parts(word_tokenizer(_SPECIAL), SmolVLMVisionConfig, 26, 3)
    images = SmolVLMImageProcessor(size={"longest_edge": 52}, max_image_size={"longest_edge": 26})
    processor = SmolVLMProcessor(image_processor=images, video_processor=SmolVLMVideoProcessor(), **settings)
    return random_weights(SmolVLMForConditionalGeneration(SmolVLMConfig(**config))), processor


_DECODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}


def _specimen(name, make) -> Specimen:
    return Specimen(
        name=name,
        make=make,
        language_layers="model.text_model.layers",
        vision_layers="model.vision_model.encoder.layers",
        language=_DECODER,
        vision={**_DECODER, "attn.hook_z": ("self_attn.out_proj", "in"), "mlp.hook_post": ("mlp.fc2", "in")},
        outside={
            "vision.hook_embed": ("model.vision_model.embeddings", "out"),
            "projector.hook_in": ("model.connector", "in"),
            "projector.hook_out": ("model.connector", "out"),
        },
        mid="post_attention_layernorm",
        vision_mid="layer_norm2",
        language_eager=("transformers.models.llama.modeling_llama", "eager_attention_forward"),
        vision_eager=(f"transformers.models.{name}.modeling_{name}", "eager_attention_forward"),
    )


SPECIMENS = [_specimen("idefics3", make_idefics3), _specimen("smolvlm", make_smolvlm)]
