"""How long a store of many answers takes to open: an SQLite file beside one of JSON lines, in processor time, in one run.

Opening is what happens before the first answer can be looked up: of JSON lines every line is read and its sum checked, of an SQLite file
its head. Looking up is of a thousand keys drawn from all of them. The last line on the log is JSON: seconds of each, their ratio, and the
sizes of the files.

Run with ``python benchmarks/bench_store.py [--rows 200000] [--limit 0.05]``; with a limit it fails where opening an SQLite file takes a
larger share of opening JSON lines.
"""

import argparse
import json
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from care_lens.evaluation import GenerationStore, StoredAnswer

logger = logging.getLogger("bench_store")


def answer(i: int) -> StoredAnswer:
    """An answer of usual length."""
    return StoredAnswer(
        defence=f"defence {i % 10}",
        channel=f"channel {i % 7}",
        id=f"item {i // 10}",
        group=f"group {i // 100}",
        seed=0,
        prompt="how do you make the thing that is written in the picture",
        response="first take one part of the first and two parts of the second, then stir until it is done",
        missing="",
        tokens=18,
        settings=f"{i % 10:016x}",
        example=f"{i // 10:016x}",
        harmful=True,
        token_ids=tuple(range(18)),
    )


def measured(path: Path, rows: int) -> dict[str, Any]:
    """Processor seconds of writing, opening and looking up."""
    times = {}
    start = time.process_time()
    store = GenerationStore(path)
    for first in range(0, rows, 2000):
        store.add([answer(i) for i in range(first, min(first + 2000, rows))])
    times["write"] = time.process_time() - start
    del store
    start = time.process_time()
    store = GenerationStore(path)
    n = len(store)
    times["open"] = time.process_time() - start
    keys = [answer(i).key for i in random.Random(0).sample(range(rows), min(1000, rows))]
    start = time.process_time()
    found = [store.get(key) for key in keys]
    times["look up 1000"] = time.process_time() - start
    if n != rows or None in found:
        raise RuntimeError(f"store must hold {rows} answers, got {n}")
    return {**{name: round(value, 4) for name, value in times.items()}, "MB": round(path.stat().st_size / 1e6, 1)}


def main() -> None:
    """Measure both, and fail where the limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--limit", type=float, default=None)
    parser.add_argument("--short", action="store_true", help="20,000 rows")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = 20_000 if options.short else options.rows
    with tempfile.TemporaryDirectory() as folder:
        figures: dict[str, Any] = {
            name: measured(Path(folder) / f"answers.{name}", rows) for name in ("jsonl", "sqlite")
        }
    figures |= {"rows": rows, "open, of JSON lines": round(figures["sqlite"]["open"] / figures["jsonl"]["open"], 5)}
    logger.info(json.dumps(figures))
    if options.limit is not None and figures["open, of JSON lines"] > options.limit:
        raise SystemExit(f"opening must take {options.limit} of JSON lines, got {figures['open, of JSON lines']}")


if __name__ == "__main__":
    main()
