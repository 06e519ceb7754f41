"""Gemma3, with both kinds of attention layers, and images pooled from 4 x 4 patches to 2 x 2 tokens."""

import torch

from zoo.specimen import Specimen
from zoo.tiny import WORDS

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

POST_NORM_LAYER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("post_attention_layernorm", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("post_feedforward_layernorm", "out"),
    "hook_resid_post": ("", "out"),
}
SIGLIP_LAYER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.out_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.fc2", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}
OUTSIDE = {
    "vision.hook_embed": ("model.vision_tower.embeddings", "out"),
    "projector.hook_in": ("model.multi_modal_projector", "in"),
    "projector.hook_out": ("model.multi_modal_projector", "out"),
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def gemma_tokenizer(**named: str):
    """Words and Gemma's special tokens; newlines are tokens as they are in Gemma's own tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *named.values()]
    vocab = {
        word: i
        for i, word in enumerate([*special, *("\n" * n for n in range(1, 5)), *dict.fromkeys([*WORDS, "model"])])
    }
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" +"), "removed"), pre_tokenizers.Split(Regex("\n+"), "isolated")]
    )
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )


def randomise(model, std: float = 0.2):
    """The same random weights at every call, eager attention, evaluation mode."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("eager")
    return model.eval()


def make_gemma3(window: int = 6, **tower):
    """A random Gemma3 and its processor: 32 px images of 4 x 4 patches, 2 x 2 tokens each."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    tokenizer = gemma_tokenizer(
        boi_token="<start_of_image>", image_token="<image_soft_token>", eoi_token="<end_of_image>"
    )
    text = Gemma3TextConfig(
        **TEXT,
        vocab_size=len(tokenizer),
        query_pre_attn_scalar=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    vision = SiglipVisionConfig(**{**TOWER, **tower})
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
    )
    model = randomise(Gemma3ForConditionalGeneration(config))
    images = Gemma3ImageProcessor(size={"height": vision.image_size, "width": vision.image_size})
    processor = Gemma3Processor(images, tokenizer, chat_template=TEMPLATE, image_seq_length=4)
    return model, processor


SPECIMENS = [
    Specimen(
        name="gemma3",
        make=make_gemma3,
        language_layers="model.language_model.layers",
        vision_layers="model.vision_tower.encoder.layers",
        language=POST_NORM_LAYER,
        vision=SIGLIP_LAYER,
        outside=OUTSIDE,
        mid="pre_feedforward_layernorm",
        vision_mid="layer_norm2",
        language_eager=("transformers.models.gemma3.modeling_gemma3", "eager_attention_forward"),
        vision_eager=("transformers.models.siglip.modeling_siglip", "eager_attention_forward"),
    )
]
