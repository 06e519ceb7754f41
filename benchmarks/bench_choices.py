"""Which contrast, reference, tokens, site and rank give subspaces that are stable and that matter? `python benchmarks/bench_choices.py`.

On the bundled model, for every combination: the smallest principal cosine between the subspaces of two halves of the fit items (stable);
how much more of the malicious than of the benign energy of held-out items it holds (ratio of the validation split); and what projecting it out
does on the validation split, always and at all tokens (causal): the change of the unsafe margin, in nats, on attacks, beside a random
subspace with the same rank and edit norm, and the KL divergence of the next token on benign prompts. Intervals: bootstrap by item. Nothing is chosen
here; the table says what there was to choose from.
"""

import argparse
import itertools
import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from care_lens import SafetySubspace, organism
from care_lens.capture import Activations, capture
from care_lens.core import Example, Site, cluster_bootstrap
from care_lens.data.study import Split
from care_lens.lvlm import HookedLVLM
from care_lens.repair import Correction, HybridFusion
from care_lens.subspace import edit_norm_ratio, random_like

log = logging.getLogger("bench_choices")
ATTACKS = ("typographic", "wrapper", "spelled")
BENIGN = ("benign plain", "benign typographic", "benign spelled", "hard wrapper", "hard read", "hard over forbidden")
TOKENS = ("last", "text", "text:attributed", "image", "image:attributed")
CAUSAL_BATCH = 64


def examples(split: Split, channels: tuple[str, ...], per_item: int = 1) -> list[Example]:
    """Examples of several channels."""
    return [e for c in channels for e in organism.examples(c, split, per_item=per_item)]


def taken(held: Activations, site: Site, tokens: str) -> Activations:
    """Those examples that have such tokens."""
    return held.subset(held.has(site, tokens))


def halves(held: Activations, site: Site, tokens: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of two halves of the items."""
    here = taken(held, site, tokens)
    kinds = sorted(set(here.groups))
    first = torch.tensor([group in kinds[::2] for group in here.groups])
    rows = here.rows(site, tokens)
    return rows[first], rows[~first]


@torch.no_grad()
def causal(lvlm: HookedLVLM, rows: list[Example], subspace: SafetySubspace | None, alpha: float = 1.0) -> torch.Tensor:
    """Logits of the first answer token, with the subspace projected out."""
    parts = [rows[start : start + CAUSAL_BATCH] for start in range(0, len(rows), CAUSAL_BATCH)]
    repair: AbstractContextManager[object] = nullcontext()
    if subspace is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fusion = HybridFusion(textual=(Correction.care(subspace, alpha=alpha),), name="probe")
        repair = fusion.on(lvlm)
    with repair:
        return torch.cat([lvlm(lvlm.prepare(part), logits_to_keep=1)[:, -1] for part in parts])


def margin(logits: torch.Tensor) -> np.ndarray:
    """Unsafe margin of last-position logits."""
    outcome, p = organism.outcome(), logits.log_softmax(-1)
    comply, refuse = (p[:, list(ids)].logsumexp(-1) for ids in (outcome.comply, outcome.refuse))
    return (comply - refuse).cpu().numpy()


def figure(name: str, values: np.ndarray, groups: list[str]) -> dict[str, float]:
    """A mean with its interval."""
    ci = cluster_bootstrap(values, groups, n_boot=500)
    return {name: ci.estimate, f"{name} low": ci.low, f"{name} high": ci.high}


def main(out: Path, layers: list[int], ranks: list[int]) -> pd.DataFrame:
    """Measure every combination."""
    lvlm = organism.load()
    sites = [Site("language", layer, c) for layer in layers for c in ("hook_mlp_out", "hook_resid_post")]
    sets = {
        "malicious": examples("fit", ATTACKS, 2),
        "ordinary answers": examples("fit", BENIGN),
        "refusals": examples("fit", ("plain",), 3),
    }
    held = {name: capture(lvlm, rows, sites, positions=TOKENS, progress=False) for name, rows in sets.items()}
    later = {"malicious": examples("validation", ATTACKS), "ordinary answers": examples("validation", BENIGN),
             "refusals": examples("validation", ("plain",), 2)}  # fmt: skip
    test = {name: capture(lvlm, rows, sites, positions=TOKENS, progress=False) for name, rows in later.items()}
    attacks, benign = later["malicious"], later["ordinary answers"]
    before, calm = causal(lvlm, attacks, None), causal(lvlm, benign, None).log_softmax(-1)
    groups = [e.group for e in attacks]
    out.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, object]] = []
    for contrast, reference, tokens, site, rank in itertools.product(
        ("covariance", "second_moment", "mean"), ("ordinary answers", "refusals"), TOKENS, sites, ranks
    ):
        if contrast == "mean" and rank > 1:
            continue
        b, m = (taken(held[name], site, tokens).rows(site, tokens) for name in (reference, "malicious"))
        options = {"rank": rank, "contrast": contrast, "projection": "orthogonal", "site": site, "modality": "textual"}
        subspace = SafetySubspace.fit(b, m, **options)
        parts = zip(halves(held[reference], site, tokens), halves(held["malicious"], site, tokens), strict=True)
        one, two = (SafetySubspace.fit(x, y, **options) for x, y in parts)
        cosine = float(torch.linalg.svdvals(one.basis.T @ two.basis).min())
        new_b, new_m = (taken(test[name], site, tokens).rows(site, tokens) for name in (reference, "malicious"))
        held_out = subspace.energy(new_m).mean() / subspace.energy(new_b).mean()
        random = random_like(subspace, seed=0)
        after = causal(lvlm, attacks, subspace)
        control = causal(lvlm, attacks, random, alpha=edit_norm_ratio(subspace, random, m))
        kl = (calm.exp() * (calm - causal(lvlm, benign, subspace).log_softmax(-1))).sum(-1).clamp(min=0)
        table.append({
            "contrast": contrast, "reference": reference, "tokens": tokens, "site": str(site), "rank": rank, "stable cosine": cosine,
            "held-out energy ratio": float(held_out), **figure("margin change", margin(after) - margin(before), groups),
            **figure("random", margin(control) - margin(before), groups), "benign KL": float(kl.mean()), "n": len(attacks),
        })  # fmt: skip
        log.info("%s", table[-1])
        pd.DataFrame(table).to_csv(out / "choices.csv", index=False)
    return pd.DataFrame(table).sort_values("margin change")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/choices"))
    parser.add_argument("--short", action="store_true", help="one layer and rank")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO if options.short else logging.WARNING, format="%(message)s", force=True)
    torch.set_num_threads(options.threads)
    frame = main(options.out, [6] if options.short else [4, 6], [4] if options.short else [1, 4])
    log.warning("%s", frame.head(20).round(2).to_string(index=False))
    figures = ["stable cosine", "held-out energy ratio", "margin change", "random", "benign KL"]
    means = frame.pivot_table(index=["contrast", "reference", "tokens"], values=figures)[figures]
    log.warning("%s", means.round(2))
