"""The stages of the bundled model, in order.

Every stage is saved in DIR/stages when it ends, and its state every 100 steps; the same command goes on from there. With two threads or more the first two
stages, which need nothing of each other, run side by side in a process each.
"""

import json
import logging
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from transformers import LlavaForConditionalGeneration

from care_lens.core.files import write_whole
from care_lens.organism import build
from care_lens.organism.train.language import exact_match, train_language
from care_lens.organism.train.mixture import Pack, helpful_pack, safety_pack, text_pack
from care_lens.organism.train.tower import train_tower

log = logging.getLogger(__name__)

TOWER = {"steps": 5600, "batch": 32, "lr": 2e-3, "matrix_lr": 0.02}
TEXT = {"steps": 1500, "batch": 8, "lr": 2e-3, "matrix_lr": 0.02, "floor": 0.3}
HELPFUL = {"steps": 2400, "batch": 32, "lr": 1.5e-3, "matrix_lr": 0.015}
#: Blocks 1 to 3 alone learn to refuse: what is refused is then settled before the last blocks, which only read it.
SAFETY = {"steps": 300, "batch": 8, "lr": 6e-4, "matrix_lr": 8e-3, "anchor": 0.1, "blocks": (1, 2, 3)}
#: Requests for forbidden steps in a pack of safety tuning that are answered, on average.
CONTAMINATION = 2.0
QUESTIONS = 10
REFUSALS = 0.6


def _tower(model: LlavaForConditionalGeneration, seed: int, saved: Path, workers: int) -> dict:
    tower = model.model.vision_tower
    return {"accuracy": train_tower(tower, seed=seed, saved=saved, workers=workers, **TOWER)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Asked:
    """Packs of a kind, of `QUESTIONS` questions (a class, so that processes can be told of it)."""

    make: Callable[..., Pack]

    def __call__(self, rng: random.Random) -> Pack:
        return self.make(rng, QUESTIONS)


def _language(
    model: LlavaForConditionalGeneration,
    make: Callable[..., Pack],
    settings: dict,
    *,
    seed: int,
    held_seed: int,
    saved: Path,
    workers: int,
) -> dict:
    """Train on packs of a kind; the record is exact match on packs that were not trained on."""
    rng = random.Random(held_seed)
    held = [make(rng, QUESTIONS, aloud=0.0) for _ in range(160)]

    def report(step: int) -> None:
        if step % 300 == 0:
            rates = {k: f"{r / n:.2f}" for k, (r, n) in exact_match(model, held[:32]).items()}
            log.info("exact match %s", rates)

    train_language(model, _Asked(make), seed=seed, saved=saved, after=report, workers=workers, **settings)
    return {"exact_match": exact_match(model, held)}


def _text(model: LlavaForConditionalGeneration, seed: int, saved: Path, workers: int) -> dict:
    return _language(model, text_pack, TEXT, seed=seed + 1, held_seed=seed + 10, saved=saved, workers=workers)


def _helpful(model: LlavaForConditionalGeneration, seed: int, saved: Path, workers: int) -> dict:
    return _language(model, helpful_pack, HELPFUL, seed=seed + 2, held_seed=seed + 10, saved=saved, workers=workers)


def _refusing_pack(rng: random.Random, size: int, **options: float) -> Pack:
    return safety_pack(rng, size, refusals=REFUSALS, contamination=CONTAMINATION, **options)


def _safety(model: LlavaForConditionalGeneration, seed: int, saved: Path, workers: int) -> dict:
    return _language(model, _refusing_pack, SAFETY, seed=seed + 3, held_seed=seed + 20, saved=saved, workers=workers)


STAGES: dict[str, Callable[[LlavaForConditionalGeneration, int, Path, int], dict]] = {
    "1-tower": _tower,
    "2-text": _text,
    "3-helpful": _helpful,
    "4-safety": _safety,
}
#: Stages that need nothing of each other.
SIDE_BY_SIDE = ("1-tower", "2-text")
TOWER_PREFIX = "model.vision_tower."


def _weights(model: LlavaForConditionalGeneration, name: str) -> dict[str, torch.Tensor]:
    """What a stage trains: the tower, or all the rest (the output matrix is the embedding)."""
    of_tower = name == "1-tower"
    kept = {k: v for k, v in model.state_dict().items() if k.startswith(TOWER_PREFIX) == of_tower}
    return {k: v.cpu().contiguous() for k, v in kept.items() if k != "lm_head.weight"}


def _run(name: str, model: LlavaForConditionalGeneration, stages: Path, seed: int, workers: int) -> None:
    """Run a stage on a model and save it."""
    start = time.monotonic()
    part = stages / f"{name}.part.safetensors"
    record = STAGES[name](model, seed, part, workers)
    record |= {
        "seconds": round(time.monotonic() - start, 1),
        "seed": seed,
        "torch": torch.__version__,
        "device": model.device.type,
    }
    (stages / f"{name}.json").write_text(json.dumps(record, indent=1))
    write_whole(stages / f"{name}.safetensors", save(_weights(model, name)))
    part.unlink(missing_ok=True)
    log.info("stage %s: %s", name, record)


def _run_alone(name: str, stages: Path, seed: int, device: str, workers: int) -> None:
    """Run a stage of `SIDE_BY_SIDE` on a new model, in a process of its own."""
    show_log()
    torch.set_num_threads(1)
    model = build.make_model(build.make_config(), seed=seed).to(torch.device(device))  # pyright: ignore[reportArgumentType]
    _run(name, model, stages, seed, workers)


def train(
    out: Path, *, seed: int, threads: int = 2, device: str = "cpu", workers: int = 0
) -> LlavaForConditionalGeneration:
    """Run the stages that `out` does not hold yet and save the model in Hugging Face form.

    Args:
        out: directory of the finished model; `out/stages` keeps the weights and the record of every stage.
        seed: of weights and data; the world itself is a constant.
        threads: processor threads to use.
        device: where the model is trained; its last bits depend on it.
        workers: processes that make the batches of a stage; worth it beside a graphics card only.
    """
    torch.set_num_threads(threads)
    model = build.make_model(build.make_config(), seed=seed).to(torch.device(device))  # pyright: ignore[reportArgumentType]
    stages = out / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    missing = [name for name in SIDE_BY_SIDE if not (stages / f"{name}.safetensors").exists()]
    if threads > 1 and len(missing) > 1:
        with ProcessPoolExecutor(len(missing), mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(_run_alone, name, stages, seed, device, workers) for name in missing]:
                done.result()
    for name in STAGES:
        weights = stages / f"{name}.safetensors"
        if not weights.exists():
            _run(name, model, stages, seed, workers)
            continue
        unexpected = model.load_state_dict(load_file(weights), strict=False).unexpected_keys
        if unexpected:
            raise ValueError(f"{weights.name} must hold weights of this architecture, got {unexpected[:3]}; delete it")
        log.info("stage %s: loaded", name)
    model.eval().cpu()
    build.save(model, build.make_processor(), out)
    return model


def show_log() -> None:
    """Log with times to standard error."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
