"""The whole method on other seeds of the bundled world: `python benchmarks/organism_seeds.py DIR... [--device cuda]`.

Each DIR holds a model that `python -m care_lens.organism.train --out DIR --seed N` has made. On each the pipeline runs with README's settings: places are
ranked, a repair is learned, chosen on validation and proved on test, beside its rivals. Attack success and right answers of every row go to ``--csv``, a
column telling the seed (the folder's name); the choices of the repair are in the log. A run that is stopped goes on in ``--out``.
"""

import argparse
import logging
from pathlib import Path

import pandas as pd
import torch

from care_lens import organism
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline import RunSettings, run, write_report

log = logging.getLogger("organism_seeds")


def measured(directory: Path, out: Path, device: str | None) -> pd.DataFrame:
    """Attack success and right answers of every defence, further draws of the random writer and the attack that sees the repair included."""
    study = organism.study(per_item=3)  # as the command does
    lvlm = HookedLVLM.from_pretrained(str(directory), device_map=device)
    result = run(lvlm, study, out, model=f"bundled world, {directory.name}", settings=RunSettings())
    write_report(result, out)
    log.info("%s: %s at %s (%s)", directory.name, result.choice.plan, result.choice.writer_site, result.seconds)
    proof = result.proof
    tables = [proof.table, proof.random] + ([proof.adaptive] if proof.adaptive is not None else [])
    rows = pd.concat([table.to_dataframe() for table in tables])
    return rows.drop_duplicates(["defence", "channel", "metric"]).assign(seed=directory.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("results/organism_seeds"))
    parser.add_argument("--csv", type=Path, help="default: OUT/seeds.csv")
    parser.add_argument("--device", help="cpu (as it is) or cuda")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    torch.set_num_threads(options.threads)
    frames = [measured(d, options.out / d.name, options.device) for d in options.directories]
    path = options.csv or options.out / "seeds.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.concat(frames).to_csv(path, index=False)
    log.info("%s", path)
