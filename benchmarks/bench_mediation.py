"""What a mediation sweep costs beside TransformerLens's activation patching, in one run.

The sweep is residual stream, attention output and MLP output of every layer at every position, on pairs of the bundled
model, in both directions (the safe run given the unsafe twin's activation, and the other way about). TransformerLens's
``get_act_patch_block_every`` runs a whole forward pass for each layer and position, of all pairs of one direction at
once; care_lens is given the same pairs, positions, metric and threads, and as its ``batch_size`` the same number of rows.
Both are timed in turn, round after round, by the clock and by the processor time of this process, which a busy machine
distorts less; the outcomes they find are compared cell by cell.

Two sets of pairs: those that differ in their pictures, so that nearly every position is changed by nearly every patch,
and those of the typographic channel, which differ in one word after the picture, so that patches before it change nothing.
The bound is the share of a forward pass's multiply-adds that a patch leaves to be done, from the sizes of the model:
layers above the patch, positions from it on, and of the last layer keys and values alone.

Run with ``TQDM_DISABLE=1 python benchmarks/bench_mediation.py [--pairs 8] [--rounds 3] [--threads 1] [--set NAME]``.
"""

import argparse
import json
import logging
import statistics
import time
from typing import Any

import numpy as np
import torch
from transformer_lens.patching import get_act_patch_block_every

from care_lens import organism
from care_lens.core import PairedExamples
from care_lens.lvlm import HookedLVLM, Replay
from care_lens.mediation import mediate

logger = logging.getLogger("bench_mediation")

COMPONENTS = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")


@torch.no_grad()
def theirs(lvlm: HookedLVLM, pairs: PairedExamples) -> np.ndarray:
    """[direction, component, layer, position, pair] outcomes by TransformerLens."""
    twins = lvlm.prepare([*pairs.safe, *pairs.unsafe])
    n = len(pairs)
    sides = [twins.rows(range(n)), twins.rows(range(n, 2 * n))]
    outcome, found = organism.outcome(), []
    for run, donor in (sides, sides[::-1]):
        _, cache = lvlm.bind(donor).run_with_cache(donor.input_ids)
        found.append(
            get_act_patch_block_every(
                lvlm.bind(run),
                run.input_ids,
                cache,
                lambda logits, run=run: outcome(logits, run),
                reduce="none",
            ).values
        )
    return torch.stack(found).double().cpu().numpy()


def ours(lvlm: HookedLVLM, pairs: PairedExamples, batch_size: int) -> np.ndarray:
    """The same by mediation; the tokens of longer rows' first positions are missing in shorter ones."""
    sites = [site for component in COMPONENTS for site in lvlm.sites(tower="language", component=component)]
    result = mediate(
        lvlm,
        pairs,
        outcome=organism.outcome(),
        sites=sites,
        positions=("each",),
        batch_size=batch_size,
        progress=False,
        n_boot=100,
    )
    spans = lvlm.prepare([*pairs.safe, *pairs.unsafe]).spans
    padding = spans.padding.sum(dim=1).tolist()
    out = np.full((2, len(COMPONENTS), lvlm.n_layers(), spans.padding.shape[1], len(pairs)), np.nan)
    details = result.details
    at = (
        details["component"].map(COMPONENTS.index).to_numpy(),
        details["layer"].to_numpy(dtype=int),
        details["position"].astype(int).to_numpy() + np.asarray(padding)[details["pair"].to_numpy()],
        details["pair"].to_numpy(),
    )
    for side, column in enumerate(("safe_patched", "unsafe_patched")):
        out[(side, *at)] = details[column].to_numpy()
    return out


def bound(lvlm: HookedLVLM, pairs: PairedExamples) -> dict[str, float]:
    """Multiply-adds of a whole forward pass of one row, and the shares that remain of it for an average cell."""
    config = lvlm.hf_model.config
    inputs = lvlm.prepare([*pairs.safe, *pairs.unsafe])
    pos = inputs.input_ids.shape[1]
    text, vision = lvlm.family.language.dims(config), lvlm.family.vision.dims(config)
    patches = inputs.spans.grids[0][0].rows * inputs.spans.grids[0][0].cols + 1

    def layer(queries: float, keys: float, width: int, mlp: int, matrices: int) -> float:
        return queries * (2 * width**2 + matrices * width * mlp) + keys * 2 * width**2 + 2 * queries * pos * width

    block = layer(pos, pos, text.width, text.d_mlp, 3)
    tower = vision.layers * layer(patches, patches, vision.width, vision.d_mlp, 2)
    head = text.width * config.text_config.vocab_size
    whole = text.layers * block + tower + pos * head
    layers = np.arange(text.layers)
    above = {"hook_resid_pre": text.layers - layers, "hook_attn_out": text.layers - 1 - layers}
    above["hook_mlp_out"] = above["hook_attn_out"]
    n_layers = float(np.mean(list(above.values())))
    suffix = float(np.mean(np.arange(1, pos + 1))) / pos
    last = float(np.mean([np.minimum(count, 1) for count in above.values()]))
    keys_only = 3 * text.width**2 / (4 * text.width**2 + 3 * text.width * text.d_mlp)
    return {
        "layers above, of the whole": n_layers * block / whole,
        "and positions after": n_layers * suffix * block / whole,
        "and of the last layer keys and values": (n_layers - last * (1 - keys_only)) * suffix * block / whole,
    }


def where_it_goes(lvlm: HookedLVLM, pairs: PairedExamples, batch_size: int) -> dict[str, float]:
    """Seconds of one sweep in replayed blocks and logits, and in keeping the untouched pass; and the whole."""
    spent = {"replayed passes": 0.0, "keeping the untouched pass": 0.0, "reading activations": 0.0}

    def timed(name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return run

    kept = Replay.logits, Replay.of, Replay.read
    Replay.logits = timed("replayed passes", kept[0])
    Replay.of = timed("keeping the untouched pass", kept[1])
    Replay.read = timed("reading activations", kept[2])
    start = time.perf_counter()
    try:
        ours(lvlm, pairs, batch_size)
    finally:
        Replay.logits, Replay.of, Replay.read = kept
    total = time.perf_counter() - start
    spent["the rest (twins, keys of patches, statistics)"] = total - sum(spent.values())
    return {"all": total, **spent}


def main() -> None:
    """Time both on both sets of pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", choices=["pictures", "word"], help="one set of pairs; both if left out")
    parser.add_argument("--short", action="store_true", help="one round of two pairs")
    options = parser.parse_args()
    if options.short:
        options.pairs, options.rounds = 2, 1
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    lvlm = organism.load()
    sets = {
        "pictures": organism.picture_pairs("fit", n=options.pairs),
        "word": organism.pairs("typographic", "fit", n=options.pairs),
    }
    for name, pairs in sets.items():
        if options.set not in (None, name):
            continue
        times: dict[str, list[float]] = {"care_lens": [], "TransformerLens": []}
        spent: dict[str, list[float]] = {"care_lens": [], "TransformerLens": []}
        found: dict[str, np.ndarray] = {}
        for _ in range(options.rounds):
            for who, run in (
                ("care_lens", lambda pairs=pairs: ours(lvlm, pairs, options.pairs)),
                ("TransformerLens", lambda pairs=pairs: theirs(lvlm, pairs)),
            ):
                start, busy = time.perf_counter(), time.process_time()
                found[who] = run()
                times[who].append(time.perf_counter() - start)
                spent[who].append(time.process_time() - busy)
        medians = {who: statistics.median(values) for who, values in times.items()}
        processor = {who: statistics.median(values) for who, values in spent.items()}
        mine, other = found["care_lens"], found["TransformerLens"]
        both = np.isfinite(mine)
        cells = int(np.prod(other.shape[:4]))
        logger.info(
            json.dumps(
                {
                    "pairs": name,
                    "n": len(pairs),
                    "cells": cells,
                    "threads": options.threads,
                    "rounds": options.rounds,
                    "seconds": {who: round(value, 2) for who, value in medians.items()},
                    "ms a cell": {who: round(1000 * value / cells, 2) for who, value in medians.items()},
                    "ratio": round(medians["TransformerLens"] / medians["care_lens"], 2),
                    "processor seconds": {who: round(value, 2) for who, value in processor.items()},
                    "ratio of processor seconds": round(processor["TransformerLens"] / processor["care_lens"], 2),
                    "ratios of the rounds": [
                        round(b / a, 2) for a, b in zip(times["care_lens"], times["TransformerLens"], strict=True)
                    ],
                    "largest difference": float(np.abs(mine - other)[both].max()),
                    "largest relative difference": float(
                        (np.abs(mine - other) / np.maximum(1.0, np.abs(other)))[both].max()
                    ),
                    "outcomes compared": int(both.sum()),
                    "multiply-adds left": {key: round(value, 3) for key, value in bound(lvlm, pairs).items()},
                    "seconds by part": {
                        key: round(value, 2) for key, value in where_it_goes(lvlm, pairs, options.pairs).items()
                    },
                }
            )
        )


if __name__ == "__main__":
    main()
