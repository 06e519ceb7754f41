"""A tiny LLaVA, its tokenizer and its processor, made in memory."""

import torch

TEXT = "what is in the picture how to make a user assistant yes no sorry sure i cannot help red blue first then"
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocab = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


def make_llava(vision: str = "clip", *, feature_layer=-2, dtype=torch.float32, seed: int = 0, **text):
    """A random LLaVA and its processor: 4 vision layers, 3 language layers, 16 px images of 2 x 2 patches."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipVisionConfig,
    )

    tokenizer = make_tokenizer()
    tower = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision](
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    strategy = "default" if vision == "clip" else "full"
    settings = {
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
    config = LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(vocab_size=len(tokenizer), **{**settings, **text}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        image_seq_length=4,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.pad_token_id = 0
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1 if vision == "clip" else 0,
        chat_template=TEMPLATE,
    )
    model.set_attn_implementation("eager")
    return model.to(dtype).eval(), processor
