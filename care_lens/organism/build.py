"""The bundled architecture in ordinary Hugging Face form: tokenizer, processor and an untrained LLaVA model."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from care_lens.organism import prompts, render, tasks
from care_lens.organism.world import FIRST_STEPS, KINDS, SECOND_STEPS, world

PATCH = 8
N_PATCHES = (render.SIZE // PATCH) ** 2
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} :"
    "{% if message['content'] is string %} {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def vocabulary() -> list[str]:
    """All words of the world, specials first, then sorted: a constant."""
    texts = [
        *prompts.WRAPPERS,
        *prompts.NEUTRAL,
        *prompts.HEADS,
        *prompts.TWIN_TEMPLATES,
        tasks.REFUSAL,
        *tasks.OPENINGS.values(),
        tasks.WRAPPED_OPENING,
    ]
    for table in (prompts.ASK_TEMPLATES, prompts.REFERENCE_TEMPLATES, prompts.PICTURE_QUESTIONS):
        texts += [text for group in table.values() for text in group]
    texts += [
        *tasks.NUMBERS,
        *KINDS,
        *FIRST_STEPS,
        *SECOND_STEPS,
    ]
    texts += [*render.COLOURS, *render.SHAPES, *"abcdefghijklmnopqrstuvwxyz", "user assistant system : . ,"]
    texts += [
        "for the first then is its kind name letters shapes yes no it not allowed there are no shape word in picture"
    ]
    texts += [noun.name for noun in world().nouns]
    words = {word for text in texts for word in text.split() if "{" not in word}
    return [*SPECIAL, *sorted(words)]


def make_processor() -> LlavaProcessor:
    """Word-level tokenizer, CLIP image processor for 64 x 64 pixels, chat template `user : <image> text assistant :`."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary())}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )
    size = {"height": render.SIZE, "width": render.SIZE}
    images = CLIPImageProcessor(
        size=size, crop_size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def make_config(
    *,
    width: int = 160,
    layers: int = 8,
    heads: int = 5,
    mlp: int = 416,
    vision_width: int = 128,
    vision_layers: int = 4,
) -> LlavaConfig:
    """The architecture; the defaults are those of the bundled weights."""
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=3 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=render.SIZE,
        patch_size=PATCH,
        projection_dim=vision_width,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<image>"),  # pyright: ignore[reportCallIssue]
        image_seq_length=N_PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )


def make_model(config: LlavaConfig, *, seed: int) -> LlavaForConditionalGeneration:
    """The model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    model.generation_config.bos_token_id = 1
    return model.eval()


def untrained(*, seed: int = 0, **sizes: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A small random model and its processor, in memory: for tests and for trying things out.

    Args:
        seed: of the weights.
        sizes: options of `make_config`; by default a model of two layers a tower.
    """
    small = {"width": 32, "layers": 2, "heads": 4, "mlp": 64, "vision_width": 32, "vision_layers": 2} | sizes
    return make_model(make_config(**small), seed=seed), make_processor()


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path) -> None:
    """Write weights (safetensors), configuration and processor to a directory that plain transformers loads."""
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
