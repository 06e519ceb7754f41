"""How much faster are answers in several processes than in one with as many threads? `python benchmarks/bench_workers.py [--short]`.

`care_lens.core.forked.in_workers(n)`, what `care-lens` takes on a CPU, against one process with n threads, n being the cores that this process may use. The
bundled model answers the validation prompts of `organism.DEMONSTRATED` (416 of at most 14 new tokens; 64 with --short) in batches of 128, three rounds, each round both in a new process, in turns.
Printed are wall seconds and their ratio, which holds for the machine's number of cores, and whether the answers are the same. Nothing else should run.
"""

import argparse
import logging
import os
import statistics

from own_process import measured

log = logging.getLogger("bench_workers")
WORK = """
import hashlib, json, sys, time, torch
workers, threads, n = map(int, sys.argv[1:])
torch.set_num_threads(threads)
from care_lens import organism
from care_lens.core.forked import in_workers
from care_lens.evaluation import GenerationStore, generate_all
suites = organism.study(only=organism.DEMONSTRATED).suites["validation"]
rows = [e for suite in suites.values() for e in suite][:n]
lvlm = organism.load()
lvlm.generate(lvlm.prepare(rows[:4]), max_new_tokens=4)
with in_workers(workers):
    begun = time.monotonic()
    answers = generate_all(lvlm, rows, store=GenerationStore(), max_new_tokens=14, batch_size=128, progress=False)
    wall = time.monotonic() - begun
said = [answer.response for answer in answers]
print(json.dumps({"wall": wall, "n": len(rows), "answers": hashlib.sha256(repr(said).encode()).hexdigest()}))
"""


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one round of 64 prompts")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    log.info("%d cores, load %.1f before", cores, os.getloadavg()[0])
    ratios = []
    for _ in range(1 if options.short else 3):
        several, one = (
            measured(WORK, *both, 64 if options.short else 416, policy="PASSIVE") for both in ((cores, 1), (1, cores))
        )
        ratios.append(one["wall"] / several["wall"])
        log.info(
            "%s answers: %d processes %.1f s, one process of %d threads %.1f s: %.2f times as fast, answers %s",
            one["n"], cores, several["wall"], cores, one["wall"], ratios[-1],
            "the same" if one["answers"] == several["answers"] else "differ",
        )  # fmt: skip
    log.info("median of %d rounds: %.2f times as fast", len(ratios), statistics.median(ratios))


if __name__ == "__main__":
    main()
