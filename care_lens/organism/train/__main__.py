"""Rebuild the bundled model: `python -m care_lens.organism.train --out DIR [--seed 0]`."""

import argparse
from pathlib import Path

from care_lens.organism.train.recipe import show_log, train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m care_lens.organism.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches, for a graphics card")
    options = parser.parse_args()
    show_log()
    train(options.out, seed=options.seed, threads=options.threads, device=options.device, workers=options.workers)
