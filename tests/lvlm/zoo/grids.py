"""Tiny models whose towers pack the patches of all images in one row: Qwen2-VL, Qwen2.5-VL, Qwen3-VL and GLM-4V.

Patches of 4 px, merged 2 x 2: one token covers 8 x 8 px. Orders are found by walking over the merge blocks.
"""

from functools import partial

import torch

from zoo.specimen import Specimen
from zoo.tiny import WORDS

PATCH, MERGE, WINDOW = 4, 2, 2

_QWEN = {
    "special": "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|> <unk>",
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "turn": ("<|im_start|>", "<|im_end|>\n", "<|im_start|>assistant\n"),
    "pad": "<|endoftext|>",
    "eos": "<|im_end|>",
}
_GLM = {
    "special": "<|endoftext|> [gMASK] <sop> <|user|> <|assistant|> <|begin_of_image|> <|end_of_image|> <|image|> "
    "<|begin_of_video|> <|end_of_video|> <|video|> <unk>",
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
    "turn": ("[gMASK]<sop><|user|>", "", "<|assistant|>\n"),
    "pad": "<|endoftext|>",
    "eos": "<|endoftext|>",
}


def _tokenizer(texts):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = texts["special"].split()
    vocab = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=texts["pad"],
        eos_token=texts["eos"],
        unk_token="<unk>",
        additional_special_tokens=special,
    )


def _template(texts):
    start, end, answer = texts["turn"]
    role = "{{ m.role }}\n" if texts is _QWEN else "\n"
    return (
        f"{{% for m in messages %}}{start}{role}{{% for c in m.content %}}{{% if c.type == 'image' %}}{texts['image']}"
        f"{{% else %}}{{{{ c.text }}}}{{% endif %}}{{% endfor %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{answer}{{% endif %}}"
    )


def _processor(texts, processor, images, videos):
    grid = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    return processor(
        image_processor=images(size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64}, **grid),
        tokenizer=_tokenizer(texts),
        video_processor=videos(**grid),
        chat_template=_template(texts),
    )


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_VISION = {"depth": 3, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}


def _finish(model, processor):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("eager")
    return model.eval(), processor


def _make_qwen(family, text=None, vision=None):
    import transformers as hf

    texts = _QWEN
    videos = hf.Qwen3VLVideoProcessor if family == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    processor = _processor(texts, getattr(hf, f"{family}Processor"), hf.Qwen2VLImageProcessor, videos)
    ids = {
        f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image_pad|>",
            "video": "<|video_pad|>",
            "vision_start": "<|vision_start|>",
            "vision_end": "<|vision_end|>",
        }.items()
    }
    words = {"vocab_size": len(processor.tokenizer), "bos_token_id": 0, "eos_token_id": 2}
    config = getattr(hf, f"{family}Config")(
        text_config={**_TEXT, "rope_parameters": dict(_ROPE), **words, **(text or {})},
        vision_config={**_VISION, **(vision or {})},
        **ids,
    )
    torch.manual_seed(0)
    return _finish(getattr(hf, f"{family}ForConditionalGeneration")(config), processor)


def make_glm():
    """A random GLM-4V and its processor."""
    import transformers as hf

    processor = _processor(_GLM, hf.Glm4vProcessor, hf.Glm4vImageProcessor, hf.Glm4vVideoProcessor)
    token = processor.tokenizer.convert_tokens_to_ids
    rope = {**_ROPE, "partial_rotary_factor": 0.5}
    text = {**_TEXT, "hidden_size": 64, "rope_parameters": rope, "vocab_size": len(processor.tokenizer)}
    config = hf.Glm4vConfig(
        text_config={**text, "eos_token_id": 0},
        vision_config={
            **_VISION,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 40,
            "image_size": 32,
        },
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
    )
    torch.manual_seed(0)
    return _finish(hf.Glm4vForConditionalGeneration(config), processor)


make_qwen2 = partial(_make_qwen, "Qwen2VL", vision={"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2})
make_qwen2_5 = partial(
    _make_qwen,
    "Qwen2_5_VL",
    vision={
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "window_size": WINDOW * MERGE * PATCH,
        "fullatt_block_indexes": [1],
    },
)
make_qwen3 = partial(
    _make_qwen,
    "Qwen3VL",
    text={"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_interleaved": True}},
    vision={
        "hidden_size": 32,
        "intermediate_size": 40,
        "out_hidden_size": 32,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    },
)


def _walk(inputs, *, merged, windows):
    """For each image the rows of its patches (or merged tokens) in raster order, by a walk in the tower's own order."""
    rows_of, place = [], 0
    for _, high, wide in inputs.extra["image_grid_thw"].tolist():
        high, wide = high // MERGE, wide // MERGE
        side = WINDOW if windows else max(high, wide)
        found = {}
        for top in range(0, high, side):
            for left in range(0, wide, side):
                for row in range(top, min(top + side, high)):
                    for col in range(left, min(left + side, wide)):
                        inner = [(row, col)]
                        if not merged:
                            inner = [(row * MERGE + y, col * MERGE + x) for y in range(MERGE) for x in range(MERGE)]
                        for spot in inner:
                            found[spot] = place
                            place += 1
        rows_of.append(torch.tensor([found[spot] for spot in sorted(found)]))
    return rows_of


def _orders(*, windows=False, merged_in=False):
    return {
        "vision": partial(_walk, merged=False, windows=windows),
        "vision.hook_embed": partial(_walk, merged=False, windows=False),
        "projector.hook_in": partial(_walk, merged=merged_in, windows=windows),
        "projector.hook_out": partial(_walk, merged=True, windows=windows),
    }


_LANGUAGE = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}


def _vision(last):
    return {
        "hook_resid_pre": ("", "in"),
        "attn.hook_z": ("attn.proj", "in"),
        "hook_attn_out": ("attn", "out"),
        "mlp.hook_post": (last, "in"),
        "hook_mlp_out": ("mlp", "out"),
        "hook_resid_post": ("", "out"),
    }


def specimen(name, make, last, **changes):
    """The specimen of one of these families.

    Args:
        name: Of the family; also of its folder in transformers.
        make: Makes model and processor.
        last: The last linear map of a vision MLP.
        **changes: Other fields.
    """
    settings = {
        "language_layers": "model.language_model.layers",
        "vision_layers": "model.visual.blocks",
        "language": _LANGUAGE,
        "vision": _vision(last),
        "outside": {
            "vision.hook_embed": ("model.visual.patch_embed", "out"),
            "projector.hook_in": ("model.visual.merger", "in"),
            "projector.hook_out": ("model.visual.merger", "out"),
        },
        "mid": "post_attention_layernorm",
        "vision_mid": "norm2",
        "language_eager": (f"transformers.models.{name}.modeling_{name}", "eager_attention_forward"),
        "orders": _orders(),
    }
    return Specimen(name=name, make=make, **{**settings, **changes})


GLM_POST_NORMS = {
    **_LANGUAGE,
    "hook_attn_out": ("post_self_attn_layernorm", "out"),
    "hook_mlp_out": ("post_mlp_layernorm", "out"),
}
WINDOW_ORDERS = _orders(windows=True)
MERGED_ORDERS = _orders(merged_in=True)
