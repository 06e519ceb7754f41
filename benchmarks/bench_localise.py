"""Does the diagnosis find a channel that was planted? `python benchmarks/bench_localise.py [--short]`.

For every plant of `plant.py` and every dose the twins are plain requests of the fit split over a white and over a yellow blank picture. `localise`
ranks the attention and MLP outputs of both towers; `refine` the heads or neurons of the planted block. Beside it, what each figure alone would
have said: NIE, TIE, attribution (gradient, and integrated gradients), and separability by a linear probe. Chance: the mean rank of a random order. A plant has taken at a dose where it
opens the channel for half of the test requests or more; all are listed.
"""

import argparse
import json
import logging
from pathlib import Path

import pandas as pd
import torch
from plant import CONTROL, HERE, TRIGGER, Place, plain_model, plant, swapped

from care_lens import organism
from care_lens.capture import capture
from care_lens.core import PairedExamples
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import NothingToLocalise, attribute, localise, refine, separability
from care_lens.mediation.localise import HEADS, NEURONS, candidates

log = logging.getLogger("bench_localise")
TOOK = 0.5


def planted_sites(place: Place) -> list[str]:
    """The sites that count as the place."""
    if place.kind == "vision":
        return [f"vision.blocks.{place.layer}.{c}" for c in ("hook_attn_out", "hook_mlp_out")]
    component = "hook_attn_out" if place.kind in ("attention", "head") else "hook_mlp_out"
    return [f"blocks.{place.layer}.{component}"]


def rank_of(names: list[str], wanted: list[str]) -> int:
    """The best rank, from 1, of any of the wanted."""
    return min(names.index(name) + 1 for name in wanted if name in names)


def unit_ranks(lvlm: HookedLVLM, pairs: PairedExamples, place: Place) -> tuple[str, int]:
    """Of a head: its rank among the block's heads. Of neurons: how many of them are among as many first ones."""
    names = refine(lvlm, pairs, planted_sites(place)[0], outcome=organism.outcome(), progress=False).frame
    column = "head" if place.kind == "head" else "neuron"
    order = names[column].astype(int).tolist()
    if place.kind == "head":
        return "rank of the head", order.index(place.units[0]) + 1
    return f"of {len(place.units)} neurons first", len(set(order[: len(place.units)]) & set(place.units))


def by_probe(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """Candidates by the probe's AUC, then by class scatter: what separability alone says."""
    sites = candidates(lvlm)
    held = [capture(lvlm, rows, sites, select=("all",), progress=False) for rows in (pairs.safe, pairs.unsafe)]
    frame = separability(*held, n_boot=10).to_dataframe()
    wide = frame.pivot_table(index=["tower", "layer", "component"], columns="metric", values="value", sort=False)
    wide = wide.sort_values([c for c in wide.columns if c in ("probe_auc", "silhouette")][::-1], ascending=False)
    return [("vision." if t == "vision" else "") + f"blocks.{layer}.{c}" for t, layer, c in wide.index]


def by_attribution(lvlm: HookedLVLM, pairs: PairedExamples) -> dict[str, list[str]]:
    """Candidates, and the heads and neurons of the language tower, by what attribution alone estimates of NIE."""
    inner = [site for site in lvlm.sites() if site.component in (HEADS, NEURONS)]
    found: dict[str, list[str]] = {}
    for method in ("gradient", "integrated"):
        frame = attribute(
            lvlm, pairs, outcome=organism.outcome(), sites=[*candidates(lvlm), *inner], patches=(), method=method,
            n_boot=2, progress=False,
        ).frame.sort_values("value", ascending=False)  # fmt: skip
        found[method] = frame[frame["kind"] == "site"]["mediator"].tolist()
        units = frame[frame["kind"].isin(["head", "neuron"])]
        found[f"{method} units"] = units["mediator"].tolist()
    return found


def units_by_attribution(names: list[str], place: Place) -> int:
    """As :func:`unit_ranks`, of attribution: among the units of the planted block."""
    component = HEADS if place.kind == "head" else NEURONS
    here = [name for name in names if name.startswith(f"blocks.{place.layer}.{component}")]
    order = [int(name.split("[")[1].rstrip("]")) for name in here]
    if place.kind == "head":
        return order.index(place.units[0]) + 1
    return len(set(order[: len(place.units)]) & set(place.units))


def measure(place: Place, dose: dict, n: int) -> dict[str, object]:
    """One plant at one dose."""
    model = plant(plain_model(), place, dose=dose["dose"])
    row: dict[str, object] = {"plant": place.name, "dose": dose["dose"], "opened": dose["trigger"]["value"]}
    with HookedLVLM.from_hf(model, organism.load().processor) as lvlm:
        pairs = PairedExamples(safe=tuple(swapped("fit", CONTROL)[:n]), unsafe=tuple(swapped("fit", TRIGGER)[:n]))
        wanted = planted_sites(place)
        try:
            found = localise(lvlm, pairs, outcome=organism.outcome(), progress=False)
        except NothingToLocalise as error:
            return {**row, "note": str(error)}
        frame = found.frame
        row |= {"rank": rank_of(frame["mediator"].tolist(), wanted), "of": len(frame), "first": found.top()[0]}
        row["first in resamples"] = float(frame.iloc[0]["first"])
        for name, column in (("NIE alone", "sufficient"), ("TIE alone", "necessary")):
            row[name] = rank_of(frame.sort_values(column, ascending=False)["mediator"].tolist(), wanted)
        row["probe alone"] = rank_of(by_probe(lvlm, pairs), wanted)
        estimated = by_attribution(lvlm, pairs)
        row["gradient alone"] = rank_of(estimated["gradient"], wanted)
        row["integrated alone"] = rank_of(estimated["integrated"], wanted)
        row["chance"] = (len(frame) + 1) / (len(wanted) + 1)
        if place.units:
            row["units"], row["unit figure"] = unit_ranks(lvlm, pairs, place)
            for method in ("gradient", "integrated"):
                row[f"units, {method}"] = units_by_attribution(estimated[f"{method} units"], place)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of plants")
    parser.add_argument("--short", action="store_true", help="full dose only, 8 pairs")
    parser.add_argument("--out", type=Path, default=Path("results/localise"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(options.threads)
    rows = []
    for entry in json.loads((HERE / "plants.json").read_text()).values():
        place = Place(**{**entry["place"], "units": tuple(entry["place"]["units"])})
        if options.only and place.name not in options.only:
            continue
        for dose in entry["doses"][-1:] if options.short else entry["doses"]:
            rows.append(measure(place, dose, 8 if options.short else 24))
            log.info("%s", rows[-1])
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "plants.csv", index=False)
    took = table[table["opened"] >= TOOK]
    log.warning("%s", table.to_string(index=False))
    for name in ("rank", "NIE alone", "TIE alone", "gradient alone", "integrated alone", "probe alone"):
        log.warning(
            "%s",
            f"{name}: first in {int((took[name] == 1).sum())} of {len(took)} that took; mean rank {took[name].mean():.1f}, chance {took['chance'].mean():.1f}",
        )
