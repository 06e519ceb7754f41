"""What an attached repair costs: processor time of a decode step beside the plain model's, in one run.

The stack has 28 blocks of width 3584 and 18,944 neurons (the language tower of a 7B model) in float32. All blocks share the weights of
one, so that it fits in 2 GB: each step still reads every block's weights from memory, 0.9 GB that no cache holds. The repair reads at
three sites with rank 64, prompt and answer, has its gate open, and writes there with rank 64. The vocabulary is small, so that the step
that the cost is compared with is not made longer by an unembedding.

Plain and attached generations take turns, on one thread; what counts is the processor time between two tokens. The last line on the log
is JSON: medians, their ratio, and the quartiles of the ratios of neighbouring steps; and ``hooks_ms``, the processor time inside the
repair's own hook functions in a step, which the noise of a shared machine blurs less than the difference of two steps.

Run with ``python benchmarks/bench_attach.py [--rounds 6] [--steps 4] [--limit 1.03]``; with a limit it fails where the ratio exceeds it.
"""

import argparse
import json
import logging
import statistics
import time
from typing import Any

import torch
from bench_overhead import SMALL
from bench_overhead import make as small
from tqdm.auto import trange
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, StoppingCriteria, StoppingCriteriaList
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from care_lens.core import Site
from care_lens.repair import ConformalGate, Correction, EnergyReader, HookPair, HookRepair, HybridFusion, Writer

logger = logging.getLogger("bench_attach")

BLOCKS, WIDTH, NEURONS, RANK = 28, 3584, 18944, 64
SITES = ("blocks.7.hook_resid_post", "blocks.14.hook_mlp_out", "blocks.21.hook_resid_post")


def make() -> tuple[LlavaForConditionalGeneration, Any]:
    """The stack and its processor."""
    little, processor = small(SMALL, "cpu")
    own: Any = little.config
    text = Qwen2Config(
        vocab_size=own.text_config.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=1,
        num_attention_heads=28,
        num_key_value_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    config: Any = LlavaConfig(
        vision_config=own.vision_config,
        text_config=text,
        image_token_index=own.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    tower: Any = model.model.language_model
    config.text_config.num_hidden_layers = tower.config.num_hidden_layers = BLOCKS
    tower.config.layer_types = ["full_attention"] * BLOCKS
    shared = tower.layers[0].state_dict(keep_vars=True)
    for layer in range(1, BLOCKS):
        with torch.device("meta"):
            block = Qwen2DecoderLayer(tower.config, layer)
        for name, parameter in shared.items():
            path, _, leaf = name.rpartition(".")
            block.get_submodule(path)._parameters[leaf] = parameter
        tower.layers.append(block.eval())
    return model, processor


def repair() -> HybridFusion:
    """Readers, open gates and writers of rank 64 at three sites."""
    generator = torch.Generator().manual_seed(0)
    corrections = []
    for name in SITES:
        basis = torch.linalg.qr(torch.randn(WIDTH, RANK, generator=generator))[0]
        site, centre = Site.parse(name), torch.zeros(WIDTH)
        corrections.append(
            Correction(
                writer=Writer(site=site, write=basis, left=basis, target=centre, alpha=0.5),
                reader=EnergyReader(site=site, read=basis, centre=centre, positions=("last", "generated")),
                gate=ConformalGate(threshold=-1.0, epsilon=0.1, n=9),
            )
        )
    return HybridFusion(visual=tuple(corrections))


class Timed(HookRepair):
    """The same repair, with the processor time that its hooks take."""

    name = "timed"

    def __init__(self, inner: HybridFusion) -> None:
        self.inner = inner
        self.steps: list[float] = []

    def check(self, lvlm: Any) -> None:
        """As the repair's."""
        self.inner.check(lvlm)

    def describe(self) -> dict[str, Any]:
        """As the repair's."""
        return self.inner.describe()

    def fwd_hooks(self, inputs: Any) -> list[HookPair]:
        """The repair's, each timed."""

        def timed(fn: Any) -> Any:
            def hook_fn(activation: Any, hook: Any) -> Any:
                start = time.process_time()
                made = fn(activation, hook)
                if activation.shape[1] == 1:
                    self.steps.append(1000 * (time.process_time() - start))
                return made

            return hook_fn

        return [(name, timed(fn)) for name, fn in self.inner.fwd_hooks(inputs)]


class Clock(StoppingCriteria):
    """Notes the processor time after every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def steps(model: Any, ids: torch.Tensor, count: int) -> list[float]:
    """Milliseconds of processor time of each decode step."""
    clock = Clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count + 1,
        min_new_tokens=count + 1,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return [1000 * (after - before) for before, after in zip(clock.times[:-1], clock.times[1:], strict=True)]


def main() -> None:
    """Time both in turn and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--limit", type=float, default=None)
    parser.add_argument("--short", action="store_true", help="one round of two steps")
    args = parser.parse_args()
    if args.short:
        args.rounds, args.steps = 1, 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    model, processor = make()
    ids = torch.arange(10, 42)[None]
    plain, attached = list[float](), list[float]()
    timed = Timed(repair())
    steps(model, ids, 1)
    for _ in trange(args.rounds, desc="rounds"):
        plain += steps(model, ids, args.steps)
        with timed.attach(model, processor):
            attached += steps(model, ids, args.steps)
    ratio = statistics.median(attached) / statistics.median(plain)
    each = sorted(with_it / without for with_it, without in zip(attached, plain, strict=True))
    found = {
        "blocks": BLOCKS,
        "width": WIDTH,
        "rank": RANK,
        "sites": SITES,
        "plain_ms": round(statistics.median(plain), 1),
        "attached_ms": round(statistics.median(attached), 1),
        "ratio": round(ratio, 4),
        "hooks_ms": round(sum(timed.steps) / len(attached), 2),
        "quartiles": [round(each[len(each) // 4], 4), round(each[3 * len(each) // 4], 4)],
        "steps": len(plain),
    }
    logger.info(json.dumps(found))
    if args.limit is not None and ratio > args.limit:
        raise SystemExit(
            f"a decode step must take at most {args.limit} times as long with the repair attached, got {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
