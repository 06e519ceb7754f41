"""Which findings of the CARE paper (Fu et al. 2026, arXiv:2603.27240) hold in the bundled world? `python benchmarks/bench_claims.py`.

Four of them are measured here, one table each, all in `claims.csv`; the other two (transfer to attacks that no fit saw, utility kept) are
columns of `bench_defences.py`.

- places: what each attention and MLP carries in pairs of requests (mean of the share of the total effect that it brings and of the
  share that its removal takes), by set of pairs.
- skipped: the paper's own scan. Blocks {l, l+1} are skipped, or the attention or the MLP of one block is replaced by its mean, and the
  share of attacks that still succeed, and of benign requests that are still answered rightly, is counted (validation split).
- separability: the paper's three measures and a cross-validated probe between attacks and benign requests, after every block, at the last
  prompt token (fit split).
- modalities: published CARE, as it is and without its faults, with the visual edit alone, the textual alone and both, on the test split;
  and ("told by") how well a classifier of the image tokens, the text tokens or the last token alone tells unseen attacks from benign requests.

Nothing is chosen here: blocks, rank and strength of published CARE are those that `bench_defences.py` chose most often on earlier weights of the bundled
world. On the present ones none of its twelve settings that keeps right answers stops an attack.
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from care_lens import Example, HookedLVLM, organism
from care_lens.capture import Activations, capture
from care_lens.core import Site, cluster_bootstrap
from care_lens.core.files import write_whole
from care_lens.core.memory import keep_freed_memory
from care_lens.data.study import Split, Study
from care_lens.defences import PublishedCARE
from care_lens.evaluation import evaluate
from care_lens.lens import separability
from care_lens.mediation import ablate, mediate, rank_places
from care_lens.subspace import classifier_direction

log = logging.getLogger("bench_claims")
TOKENS = 14
LAYERS, RANK, ALPHA = (4, 5, 6), 8, 4.5
COLUMNS = ["table", "of", "where", "measure", "value", "ci_low", "ci_high", "n"]
Rows = list[dict[str, object]]


def spread(study: Study, split: Split, *, harmful: bool, each: int) -> list[Example]:
    """Some examples of every benign channel, or of the attack channels of the fit."""
    seen = {channel for channels in study.seen.values() for channel in channels}
    suites = study.channels(split, harmful=harmful)
    return [e for channel, suite in suites.items() if not harmful or channel in seen for e in suite[:each]]


def places(lvlm: HookedLVLM, study: Study, n: int) -> Rows:
    """What attention and MLP outputs carry, by set of pairs."""
    rows: Rows = []
    for name, pairs in study.pairs.items():
        found = mediate(
            lvlm,
            pairs[:n],
            outcome=study.pair_outcomes.get(name, study.outcome),
            sites=[
                site for site in lvlm.sites(tower="language") if site.component in ("hook_attn_out", "hook_mlp_out")
            ],
            positions=("all",),
            batch_size=64,
            n_boot=200,
            progress=False,
        )
        for one in rank_places(found).to_dataframe().to_dict("records"):
            rows.append({"table": "places", "of": name, "where": one["mediator"], "measure": "carried", "value": one["score"],
                         "ci_low": one["ci_low"], "ci_high": one["ci_high"], "n": one["n"]})  # fmt: skip
    return rows


def skipped(lvlm: HookedLVLM, study: Study, each: int) -> Rows:
    """The paper's scan by skipping two blocks, and single components replaced by their means."""
    attacked = spread(study, "validation", harmful=True, each=3 * each)
    benign = spread(study, "validation", harmful=False, each=each)
    reference = spread(study, "fit", harmful=False, each=3)
    rows: Rows = []
    for of, examples in (("attacks", attacked), ("benign", benign)):
        common = {"judge": study.judge, "max_new_tokens": TOKENS, "batch_size": 128, "progress": False}
        parts = [
            ablate(lvlm, examples, components=("block",), mode="skip", window=2, **common),
            ablate(lvlm, examples, mode="mean", reference=reference, **common),
        ]
        for place, part in enumerate(parts):
            frame = part.to_dataframe()
            kept = pd.DataFrame(frame[(frame["metric"] == "complied") & (frame["effect"] == "share")])
            for one in kept.to_dict("records"):
                baseline = one["component"] == "none"
                if baseline and place:
                    continue
                where = "nothing" if baseline else f"{one['component']} {one['layer']}"
                rows.append({"table": "skipped", "of": of, "where": where, "measure": "complied", **_figures(one)})
    return rows


def apart(lvlm: HookedLVLM, study: Study, each: int) -> Rows:
    """Separability after every block."""
    sites = [Site("language", layer, "hook_resid_post") for layer in range(lvlm.n_layers())]
    held = [
        capture(lvlm, spread(study, "fit", harmful=harmful, each=n), sites, positions=("last",), progress=False)
        for harmful, n in ((False, each), (True, 6 * each))
    ]
    frame = separability(*held, n_permutations=100, n_boot=200).to_dataframe()
    return [
        {"table": "separability", "of": "last token", "where": f"block {one['layer']}", "measure": one["metric"], **_figures(one)}
        for one in frame.to_dict("records")
    ]  # fmt: skip


def one_modality(lvlm: HookedLVLM, study: Study, each: int) -> Rows:
    """Published CARE with one edit or both."""
    malicious = spread(study, "fit", harmful=True, each=10**6)
    shared = {"benign": spread(study, "fit", harmful=False, each=2 * each), "malicious": malicious, "refusals": [study.refusal],
              "layers": LAYERS, "rank": RANK, "alpha_visual": ALPHA, "alpha_textual": ALPHA, "progress": False}  # fmt: skip
    defences: dict[str, PublishedCARE | None] = {"undefended": None}
    for kind, fitted in (
        ("published CARE", PublishedCARE.fit(lvlm, **shared)),
        ("CARE, sound", PublishedCARE.sound(lvlm, **shared)),
    ):
        for name, visual, textual in (
            ("both", ALPHA, ALPHA),
            ("visual alone", ALPHA, 0.0),
            ("textual alone", 0.0, ALPHA),
        ):
            one = fitted.restricted(alpha_visual=visual, alpha_textual=textual)
            defences[f"{kind}, {name}"] = replace(one, name=f"{kind}, {name}")
    seen = [c for channels in study.seen.values() for c in channels]
    suites = {c: study.suites["test"][c][:each] for c in [*seen, *study.held_out()]}
    benign = [
        replace(e, id=f"{e.channel}/{e.id}", channel="benign")
        for e in spread(study, "test", harmful=False, each=max(2, each // 6))
    ]
    table = evaluate(lvlm, {**suites, "benign": benign}, defences, judge=study.judge, max_new_tokens=TOKENS, batch_size=128,
                     fidelity=False, n_boot=200, progress=False)  # fmt: skip
    frame = table.frame
    wanted = (frame["metric"] == "asr") | ((frame["metric"] == "accuracy") & (frame["channel"] == "benign"))
    frame = pd.DataFrame(frame[wanted])
    return [
        {"table": "modalities", "of": one["channel"], "where": one["defence"], "measure": one["metric"], **_figures(one)}
        for one in frame.to_dict("records")
    ]  # fmt: skip


def told_by(lvlm: HookedLVLM, study: Study, each: int) -> Rows:
    """How well classifiers of one kind of tokens tell unseen attacks from benign requests, all with pictures.

    Twice: attacks of the fit against all benign channels, where the same forbidden word may be pictured and asked about harmlessly; and pictured
    requests for steps alone, where nothing but the pictured item differs.
    """
    sites = [Site("language", layer, "hook_resid_post") for layer in range(lvlm.n_layers())]
    tokens = ("image", "text", "last")
    held: dict[tuple[str, bool], tuple[list[Example], Activations]] = {}
    for split in ("fit", "test"):
        for harmful in (False, True):
            found = [e for e in spread(study, split, harmful=harmful, each=each) if e.images]
            held[split, harmful] = found, capture(lvlm, found, sites, positions=tokens, progress=False)
    rows: Rows = []
    for name, channels in (
        ("all channels", None),
        ("pictured requests for steps", ("typographic", "benign typographic")),
    ):
        kept = {
            key: torch.tensor([channels is None or e.channel in channels for e in found])
            for key, (found, _) in held.items()
        }
        labels = np.repeat([0.0, 1.0], [int(kept["test", harmful].sum()) for harmful in (False, True)])
        groups = [
            e.group
            for harmful in (False, True)
            for e, keep in zip(held["test", harmful][0], kept["test", harmful].tolist(), strict=True)
            if keep
        ]
        for site in sites:
            for kind in tokens:
                at = {key: some.rows(site, kind)[kept[key]].float() for key, (_, some) in held.items()}
                direction = classifier_direction(at["fit", False], at["fit", True])
                score = (torch.cat([at["test", False], at["test", True]]) @ direction).double().numpy()
                ci = cluster_bootstrap(
                    {"score": score, "label": labels},
                    groups,
                    statistic=lambda a: roc_auc_score(a["label"], a["score"]),
                    bounds=(0, 1),
                    n_boot=500,
                )
                rows.append({"table": "told by", "of": f"{kind} tokens, {name}", "where": f"block {site.layer}", "measure": "auc",
                             "value": ci.estimate, "ci_low": ci.low, "ci_high": ci.high, "n": len(labels)})  # fmt: skip
    return rows


def _figures(row: dict[str, object]) -> dict[str, object]:
    return {name: row[name] for name in ("value", "ci_low", "ci_high", "n")}


#: The tables, how they are made, and how many pairs or examples a channel a short and a whole run take.
STEPS = {
    "places": (places, 4, 24),
    "skipped": (skipped, 1, 8),
    "separability": (apart, 2, 8),
    "told by": (told_by, 4, 40),
    "modalities": (one_modality, 3, 28),
}


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few examples; its figures are not to be quoted")
    parser.add_argument("--out", type=Path, default=Path("results/claims"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[*STEPS], default=[*STEPS], help="some of the tables")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    lvlm, study = organism.load(), organism.study()
    few = options.short
    rows: Rows = []
    for name in options.only:
        make, short, whole = STEPS[name]
        rows += make(lvlm, study, short if few else whole)
        log.warning("%s: done", name)
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(options.out / "claims.csv", pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    for name, part in frame.groupby("table", sort=False):
        log.warning("%s\n%s", name, part.round(2).head(60).to_string(index=False))
    lvlm.close()
    return frame


if __name__ == "__main__":
    main()
