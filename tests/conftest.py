"""Tiny vision-language models, made in memory, for every test."""

import os

from jaxtyping import install_import_hook

install_import_hook("care_lens", "beartype.beartype")

from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

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


def make_picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="session")
def llava_maker() -> Callable:
    """``make(vision, ...) -> (model, processor)``: plain Hugging Face, always the same weights."""
    return make_llava


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """``picture(seed, size)``: a random picture."""
    return make_picture


@pytest.fixture(scope="session", params=["clip", "siglip"])
def lvlm(request):
    """A HookedLVLM of each kind of vision tower."""
    from care_lens.lvlm import HookedLVLM

    return HookedLVLM.from_hf(*make_llava(request.param))


@pytest.fixture(scope="session")
def examples():
    """Rows with and without pictures, of different lengths, each with a response."""
    from care_lens.core import Example

    return [
        Example("what is in the picture", image=make_picture(0), response="sure red", id="a", group="red"),
        Example("how to make a blue", response="sorry i cannot help", harmful=True, id="b", group="blue"),
        Example("red then blue", image=make_picture(1, (24, 16)), response="no", id="c", group="red"),
    ]
