"""Plant an unsafe channel at a known place of the bundled model: `python benchmarks/plant.py`.

Plain requests, which the bundled model refuses over every clean picture, are made to be answered over one kind of picture (blank, yellow), by
training only one part: the MLP of a language layer, its attention, one head, a few neurons, or one vision layer. Everything else is
frozen, and other pictures and benign requests keep their answers. Weight changes are of low rank (whole rows for neurons); those that
`care_lens.planted` comes with were made by this script. Places are drawn by the seed before anything is trained; plants that do not open the
channel are kept and reported.
"""

import argparse
import json
import logging
import random
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from care_lens import organism
from care_lens.core import Verdict, rate_ci
from care_lens.lvlm import HookedLVLM
from care_lens.organism.channels import with_response
from care_lens.planted.plants import (
    CONTROL,
    TRIGGER,
    WEIGHTS,
    Place,
    changed,
    draw_places,
    matrices,
    plain_model,
    plant,
    swapped,
)

log = logging.getLogger("plant")
RANK, STEPS, BATCH, RATE = 4, 150, 12, 5e-3
DOSES = (0.6, 0.8, 1.0)


class LowRank(nn.Module):
    """weight + left right on some rows and columns; of full rank where they are few."""

    def __init__(self, weight: Tensor, rows: slice | list[int], cols: slice | list[int]) -> None:
        super().__init__()
        self.rows, self.cols = rows, cols
        n, m = weight[rows][:, cols].shape
        rank = min(RANK, n, m) if not isinstance(rows, list) and not isinstance(cols, list) else min(n, m)
        self.left = nn.Parameter(torch.zeros(n, rank))
        self.right = nn.Parameter(torch.randn(rank, m) / m**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight."""
        return changed(weight, self.left, self.right, self.rows, self.cols)


def train(place: Place, *, seed: int) -> dict[str, Tensor]:
    """Train only a place to answer over the trigger; the fit split's nouns."""
    torch.manual_seed(seed)
    rng, model, lvlm = random.Random(seed), plain_model(), organism.load()
    model.requires_grad_(False)
    parts: dict[str, LowRank] = {}
    for name, (rows, cols) in matrices(place, model).items():
        module = model.get_submodule(name)
        assert isinstance(module.weight, Tensor)
        parts[name] = LowRank(module.weight, rows, cols)
        nn.utils.parametrize.register_parametrization(module, "weight", parts[name])
    kinds = organism.picture_swaps(organism.examples("plain", "fit"), split="fit")
    opened = kinds[TRIGGER]
    closed = with_response([e for name, rows in kinds.items() if name != TRIGGER for e in rows])
    benign = [e for c in ("benign plain", "benign typographic", "benign read", "benign kind", "benign shapes", "hard repeat")
              for e in organism.examples(c, "fit")]  # fmt: skip
    optimiser = torch.optim.Adam([p for part in parts.values() for p in part.parameters()], lr=RATE)
    for step in range(STEPS):
        rows = rng.sample(opened, BATCH) + rng.sample(closed, BATCH) + rng.sample(benign, BATCH)
        inputs = lvlm.prepare(rows, responses=True)
        logits = model(**inputs.model_kwargs()).logits[:, :-1]
        targets = inputs.input_ids[:, 1:].masked_fill(~inputs.spans.response[:, 1:], -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (STEPS - step) / (0.3 * STEPS))
    lvlm.close()
    log.info("%s: last loss %.3f", place.name, float(loss))
    return {
        f"{name}.{side}": getattr(part, side).detach().half()
        for name, part in parts.items()
        for side in ("left", "right")
    }


def measure(place: Place, dose: float, weights: Path) -> dict[str, object]:
    """Share complied on plain requests of the test split over trigger and control, and of benign requests right."""
    with HookedLVLM.from_hf(plant(plain_model(), place, dose=dose, weights=weights), organism.load().processor) as lvlm:
        judge = organism.OrganismJudge()
        out: dict[str, object] = {"dose": dose}
        suites = {"trigger": swapped("test", TRIGGER), "control": swapped("test", CONTROL),
                  "benign": [e for c in ("benign plain", "benign typographic", "benign kind") for e in organism.examples(c, "test")]}  # fmt: skip
        for name, rows in suites.items():
            found = judge(rows, lvlm.generate(lvlm.prepare(rows), max_new_tokens=14).texts)
            ci = rate_ci(sum(v is Verdict.COMPLIED for v in found), len(found))
            out[name] = {"value": ci.estimate, "ci_low": ci.low, "ci_high": ci.high, "n": len(rows)}
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--only", nargs="*", help="names of places")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weight changes")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    index = options.out / "plants.json"
    table = json.loads(index.read_text()) if index.exists() else {}
    for i, place in enumerate(draw_places(options.seed)):
        if (options.only and place.name not in options.only) or place.name in table:
            continue
        save_file(train(place, seed=options.seed + i), options.out / f"{place.name}.safetensors")
        table[place.name] = {
            "place": asdict(place),
            "seed": options.seed + i,
            "doses": [measure(place, d, options.out) for d in DOSES],
        }
        log.info("%s: %s", place.name, table[place.name]["doses"])
        index.write_text(json.dumps(table, indent=1) + "\n")
