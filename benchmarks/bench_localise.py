"""Does the diagnosis find a channel that was planted? `python benchmarks/bench_localise.py [--short | --check]`.

For every plant of `care_lens.planted` and every dose the twins are plain requests of the fit split over a white and over a yellow blank picture. `localise`
ranks the attention and MLP outputs of both towers; `refine` the heads or neurons of the planted block. Beside it, what each figure alone would
have said: NIE, TIE, attribution (gradient, and integrated gradients), and separability by a linear probe. Chance: the mean rank of a random order. A plant has taken at a dose where it
opens the channel for half of the test requests or more; all are listed.

With --check nothing is measured anew (of each plant at the doses of the file): `planted.scorecard` is asked for the same plants and doses, and its ranks must be those of `measured/localise.csv`.
"""

import argparse
import logging
from pathlib import Path

import pandas as pd
import torch

from care_lens import organism, planted
from care_lens.core import PairedExamples
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import NothingToLocaliseError, attribute, refine
from care_lens.mediation.localise import HEADS, NEURONS
from care_lens.planted import METHODS, Place, rank_of
from care_lens.planted.localisers import ranking

log = logging.getLogger("bench_localise")
TOOK = 0.5
MEASURED = Path(__file__).parent / "measured" / "localise.csv"
COLUMNS = {
    "NIE alone": "NIE alone", "TIE alone": "TIE alone", "probe alone": "probe alone", "gradient alone": "gradient alone",
    "integrated alone": "integrated alone", "TransformerLens": "TransformerLens attribution patching",
}  # fmt: skip


def unit_ranks(lvlm: HookedLVLM, pairs: PairedExamples, place: Place) -> tuple[str, int]:
    """Of a head: its rank among the block's heads. Of neurons: how many of them are among as many first ones."""
    names = refine(lvlm, pairs, place.sites[0], outcome=organism.outcome(), progress=False).frame
    column = "head" if place.kind == "head" else "neuron"
    order = names[column].astype(int).tolist()
    if place.kind == "head":
        return "rank of the head", order.index(place.units[0]) + 1
    return f"of {len(place.units)} neurons first", len(set(order[: len(place.units)]) & set(place.units))


def units_attributed(lvlm: HookedLVLM, pairs: PairedExamples) -> dict[str, list[str]]:
    """Heads and neurons of the language tower, by what attribution alone estimates of NIE."""
    inner = [site for site in lvlm.sites(tower="language") if site.component in (HEADS, NEURONS)]
    return {
        method: attribute(
            lvlm, pairs, outcome=organism.outcome(), sites=inner, patches=(), method=method, n_boot=2, progress=False
        ).frame.sort_values("value", ascending=False)["mediator"].tolist()
        for method in ("gradient", "integrated")
    }  # fmt: skip


def units_by_attribution(names: list[str], place: Place) -> int:
    """As :func:`unit_ranks`, of attribution: among the units of the planted block."""
    component = HEADS if place.kind == "head" else NEURONS
    here = [name for name in names if name.startswith(f"blocks.{place.layer}.{component}")]
    order = [int(name.split("[")[1].rstrip("]")) for name in here]
    if place.kind == "head":
        return order.index(place.units[0]) + 1
    return len(set(order[: len(place.units)]) & set(place.units))


def measure(name: str, dose: float, n: int) -> dict[str, object]:
    """One plant at one dose."""
    with planted.load(name, dose=dose) as plant:
        row: dict[str, object] = {"plant": name, "dose": dose, "opened": plant.opened}
        lvlm, pairs, place = plant.lvlm, plant.pairs(n), plant.place
        every = planted.candidates(lvlm)
        try:
            found = ranking(lvlm, pairs)
        except NothingToLocaliseError as error:
            return {**row, "note": str(error)}
        frame = found.frame
        row |= {
            "rank": int(rank_of(frame["mediator"].tolist(), plant.sites, every)),
            "of": len(frame),
            "first": found.top()[0],
        }
        row["first in resamples"] = float(frame.iloc[0]["first"])
        for column, method in COLUMNS.items():
            row[column] = rank_of(METHODS[method](lvlm, pairs), plant.sites, every)
        row["chance"] = (len(frame) + 1) / (len(plant.sites) + 1)
        if place.units:
            row["units"], row["unit figure"] = unit_ranks(lvlm, pairs, place)
            for method, names in units_attributed(lvlm, pairs).items():
                row[f"units, {method}"] = units_by_attribution(names, place)
    return row


def differing(details: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """The rows of a scorecard whose rank, or share of requests opened, is not the measured one; methods that were not measured are left out."""
    column_of = {"localise": "rank", **{method: column for column, method in COLUMNS.items() if column in measured}}
    known = measured.set_index(["plant", "dose"])
    rows = []
    for row in details.loc[details["method"].isin(list(column_of))].to_dict("records"):
        if (row["plant"], row["dose"]) not in known.index:
            continue  # a dose that was not measured
        then = known.loc[(row["plant"], row["dose"])]
        if isinstance(then["note"], str) and row["method"] not in ("localise", "NIE alone", "TIE alone"):
            continue  # `localise` had no ranking of it, and the others were not asked
        was, opened = float(then[column_of[row["method"]]]), float(then["opened"])
        if not (row["rank"] == was or (pd.isna(row["rank"]) and pd.isna(was))) or row["opened"] != opened:
            rows.append(
                {
                    "method": row["method"],
                    "plant": row["plant"],
                    "dose": row["dose"],
                    "rank": row["rank"],
                    "measured": was,
                }
            )
    return pd.DataFrame(rows, columns=["method", "plant", "dose", "rank", "measured"])


def check(only: list[str] | None, short: bool) -> None:
    """The scorecard against what was measured, a plant at a time; SystemExit where a rank is another."""
    measured, wrong = pd.read_csv(MEASURED), []
    for name in only or planted.names():
        at = list(planted.doses(name))[-1:] if short else None
        details = planted.scorecard(plants=[name], at=at, n=24, n_boot=2, progress=False).details
        wrong.append(differing(details, measured))
        at_doses = set(zip(measured["plant"], measured["dose"], strict=True))
        compared = sum((row["plant"], row["dose"]) in at_doses for row in details.to_dict("records"))
        log.info("%s: %d ranks compared, %d differ", name, compared, len(wrong[-1]))
        if not compared:
            raise SystemExit(f"{name} must have been measured at one of its doses, got none in {MEASURED.name}")
    found = pd.concat(wrong)
    if len(found):
        raise SystemExit(f"the scorecard must give the measured ranks, got others:\n{found.to_string(index=False)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of plants")
    parser.add_argument("--short", action="store_true", help="full dose only, 8 pairs (with --check 24)")
    parser.add_argument("--check", action="store_true", help="compare the scorecard with what was measured")
    parser.add_argument("--out", type=Path, default=Path("results/localise"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(options.threads)
    if options.check:
        check(options.only, options.short)
        raise SystemExit
    rows = []
    for name in options.only or planted.names():
        known = list(planted.doses(name))
        for dose in known[-1:] if options.short else known:
            rows.append(measure(name, dose, 8 if options.short else 24))
            log.info("%s", rows[-1])
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "plants.csv", index=False)
    took = table[table["opened"] >= TOOK]
    log.warning("%s", table.to_string(index=False))
    for name in ("rank", *COLUMNS):
        log.warning(
            "%s",
            f"{name}: first in {int((took[name] == 1).sum())} of {len(took)} that took; mean rank {took[name].mean():.1f}, chance {took['chance'].mean():.1f}",
        )
