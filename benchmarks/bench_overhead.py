"""What HookedLVLM costs: its time beside the bare bridge's and plain Hugging Face's, in one run.

A random LLaVA with a SigLIP tower is made in memory three times over. The three are timed in turn, round
after round, so that a busy machine slows all of them alike; ratios are of the medians. One line of JSON a
case goes to the log. ``--families`` does the same with the tiny models of the tests, a line a family: they are so
small that Python, not arithmetic, is timed, and the ratios are the worst there can be. ``--large`` takes the sizes of
LLaVA-1.5-7B (576 image tokens) in bfloat16, which needs a GPU of 60 GB, since there are three models.

Run with ``python benchmarks/bench_overhead.py [--rounds 15] [--threads 1] [--families | --large] [--device cpu]``.
"""

import argparse
import importlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import trange
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM, LVLMInputs

logger = logging.getLogger("bench_overhead")

NEW = 8
"""Tokens of an answer."""

WORDS = [f"w{i}" for i in range(200)]
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image> "
    "{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
)


SMALL: dict[str, Any] = {
    "side": 64,
    "patch": 8,
    "vision": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "text": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8},
    "dtype": torch.float32,
}
"""8 language layers of width 256 and 64 image tokens."""

LARGE: dict[str, Any] = {
    "side": 336,
    "patch": 14,
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "dtype": torch.bfloat16,
}
"""The sizes of LLaVA-1.5-7B, but for its vocabulary."""


def make(size: dict[str, Any], device: str, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random model of a size on a device, and its processor."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<image>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    side, patch = size["side"], size["patch"]
    vision = SiglipVisionConfig(**size["vision"], image_size=side, patch_size=patch, vision_use_head=False)
    text = LlamaConfig(
        vocab_size=len(vocab),
        **size["text"],
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(size["dtype"])
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(usual)
    model.set_attn_implementation("eager")
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": side, "width": side}),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE,
    )
    return model, processor


def in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, timed in turn after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in trange(rounds + 1, desc="rounds"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(
    make_one: Callable[[], tuple[Any, Any]], examples: list[Example], rounds: int
) -> dict[str, dict[str, float]]:
    """Times in ms, and ratios to plain Hugging Face, of forward passes and of generation."""
    plain, _ = make_one()
    bare = HookedLVLM.from_hf(*make_one())
    bare.close()
    lvlm = HookedLVLM.from_hf(*make_one())
    inputs: LVLMInputs = lvlm.prepare(examples)
    rest = {name: value for name, value in inputs.model_kwargs().items() if name != "input_ids"}
    some = lvlm.sites(component="hook_mlp_out")
    edit = [(site, lambda activation, hook: activation * 1.0) for site in some]
    pad = lvlm.tokenizer.pad_token_id
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": pad}
    with torch.no_grad():
        medians = in_turn(
            {
                "hf": lambda: plain(input_ids=inputs.input_ids, **rest).logits,
                "bridge": lambda: bare.bridge(inputs.input_ids, **rest),
                "lvlm": lambda: lvlm(inputs),
                "lvlm, hooks on every MLP": lambda: lvlm.run_with_hooks(inputs, fwd_hooks=edit),
                "lvlm, cache of every MLP": lambda: lvlm.run_with_cache(inputs, sites=some),
                "lvlm, cache of everything": lambda: lvlm.run_with_cache(inputs, sites=None),
                "hf generate": lambda: plain.generate(**inputs.generate_kwargs(), **options),
                "bridge generate": lambda: bare.hf_model.generate(**inputs.generate_kwargs(), **options),
                "lvlm generate": lambda: lvlm.generate(inputs, max_new_tokens=NEW, min_new_tokens=NEW),
            },
            rounds,
        )
    base = {name: medians["hf generate" if "generate" in name else "hf"] for name in medians}
    return {name: {"ms": round(ms, 2), "ratio": round(ms / base[name], 3)} for name, ms in medians.items()}


def _placed(make_one: Callable[[], tuple[Any, Any]], device: str) -> tuple[Any, Any]:
    model, processor = make_one()
    return model.to(device), processor


def pictures(n: int, side: int) -> list[Image.Image]:
    """Noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, side, side, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def families() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """The tiny models of the tests, by family."""
    folder = Path(__file__).parents[1] / "tests" / "lvlm"
    sys.path.insert(0, str(folder))
    names = sorted(path.stem for path in (folder / "zoo").glob("*.py") if path.stem != "__init__")
    found = [one for name in names for one in getattr(importlib.import_module(f"zoo.{name}"), "SPECIMENS", [])]
    return {specimen.name: specimen.make for specimen in found}


def main() -> None:
    """Measure small and larger batches, or every family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--families", action="store_true", help="the tests' tiny models of every family instead")
    which.add_argument("--large", action="store_true", help="the sizes of LLaVA-1.5-7B in bfloat16 instead")
    parser.add_argument("--device", default="cpu", help="where the models are: cpu, cuda")
    parser.add_argument("--short", action="store_true", help="one round")
    options = parser.parse_args()
    options.rounds = 1 if options.short else options.rounds
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    if options.families:
        for family, make_one in families().items():
            rows = measure(
                partial(_placed, make_one, options.device),
                [Example("what is in the picture", image=picture) for picture in pictures(2, 56)],
                options.rounds,
            )
            shown = {name: row["ratio"] for name, row in rows.items()}
            shown["lvlm over bridge"] = round(rows["lvlm"]["ms"] / rows["bridge"]["ms"], 3)
            shown["lvlm over bridge, generate"] = round(rows["lvlm generate"]["ms"] / rows["bridge generate"]["ms"], 3)
            logger.info(json.dumps({"family": family, **shown}))
        return
    prompt = " ".join(WORDS[:32])
    size = LARGE if options.large else SMALL
    for batch_size in (1, 8):
        asked = [Example(prompt, image=picture) for picture in pictures(batch_size, size["side"])]
        rows = measure(partial(make, size, options.device), asked, options.rounds)
        for name, row in rows.items():
            logger.info(json.dumps({"batch": batch_size, "case": name, **row}))


if __name__ == "__main__":
    main()
