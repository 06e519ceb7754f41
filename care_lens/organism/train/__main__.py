"""Rebuild the bundled model: `python -m care_lens.organism.train --out DIR [--seed 0]`.

Every stage is saved in DIR/stages when it ends; the same command resumes after the last finished one.
"""

import argparse
import json
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from transformers import LlavaForConditionalGeneration

from care_lens.organism import build
from care_lens.organism.train.language import exact_match, train_language
from care_lens.organism.train.mixture import helpful_pack, safety_pack
from care_lens.organism.train.tower import train_tower

log = logging.getLogger("care_lens.organism.train")

TOWER = {"steps": 3800, "batch": 32, "lr": 2e-3, "matrix_lr": 0.02}
HELPFUL = {"steps": 1900, "batch": 8, "lr": 2e-3, "matrix_lr": 0.02}
SAFETY = {"steps": 120, "batch": 8, "lr": 3e-4, "matrix_lr": 1e-3}
QUESTIONS = 10
REFUSALS = 0.6


def _tower(model: LlavaForConditionalGeneration, seed: int) -> dict:
    return {"accuracy": train_tower(model.model.vision_tower, seed=seed, **TOWER)}


def _helpful(model: LlavaForConditionalGeneration, seed: int) -> dict:
    rng = random.Random(seed + 10)
    held = [helpful_pack(rng, QUESTIONS, aloud=0.0) for _ in range(160)]

    def report(step: int) -> None:
        if step % 200 == 0:
            rates = {k: f"{r / n:.2f}" for k, (r, n) in exact_match(model, held[:48]).items()}
            log.info("exact match %s", rates)

    train_language(model, lambda r: helpful_pack(r, QUESTIONS), seed=seed + 1, after=report, **HELPFUL)
    return {"exact_match": exact_match(model, held)}


def _safety(model: LlavaForConditionalGeneration, seed: int) -> dict:
    rng = random.Random(seed + 20)
    held = [safety_pack(rng, QUESTIONS, refusals=REFUSALS, aloud=0.0) for _ in range(160)]
    train_language(model, lambda r: safety_pack(r, QUESTIONS, refusals=REFUSALS), seed=seed + 2, **SAFETY)
    return {"exact_match": exact_match(model, held)}


STAGES: dict[str, Callable[[LlavaForConditionalGeneration, int], dict]] = {
    "1-tower": _tower,
    "2-helpful": _helpful,
    "3-safety": _safety,
}


def train(out: Path, *, seed: int) -> LlavaForConditionalGeneration:
    """Run the stages that `out` does not hold yet and save the model in Hugging Face form.

    Args:
        out: directory of the finished model; `out/stages` keeps the weights and the record of every stage.
        seed: of weights and data; the world itself is a constant.
    """
    model = build.make_model(build.make_config(), seed=seed)
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    for name, run in STAGES.items():
        weights = stages / f"{name}.safetensors"
        if weights.exists():
            load_model(model, weights)
            log.info("stage %s: loaded", name)
            continue
        start = time.monotonic()
        record = run(model, seed)
        record |= {"seconds": round(time.monotonic() - start, 1), "seed": seed, "torch": torch.__version__}
        (stages / f"{name}.json").write_text(json.dumps(record, indent=1))
        save_model(model, str(weights))
        log.info("stage %s: %s", name, record)
    model.eval()
    build.save(model, build.make_processor(), out)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m care_lens.organism.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(options.threads)
    train(options.out, seed=options.seed)
