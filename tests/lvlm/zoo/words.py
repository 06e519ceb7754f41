"""A tokenizer of whole words with the special tokens of a family, and how a random model is filled."""

import torch

from zoo.tiny import WORDS


def word_tokenizer(special: list[str], **settings):
    """Words of the test prompts, with special tokens that need no spaces around them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *special, *dict.fromkeys(WORDS)])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special,
        **settings,
    )


def template(image: str, start: str = "", end: str = "") -> str:
    """A chat template that writes ``image`` for each image."""
    return (
        "{% for m in messages %}" + start + "{{ m.role }} {% for c in m.content %}"
        "{% if c.type == 'image' %}" + image + " {% else %}{{ c.text }} {% endif %}{% endfor %}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}" + start + "assistant{% endif %}"
    )


def random_weights(model, std: float = 0.2, seed: int = 0):
    """The model with random weights, the same at every call, in evaluation mode with eager attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("eager")
    return model.eval()
