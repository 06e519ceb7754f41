"""What it costs that OpenMP's threads spin while they wait, and that freed memory is given back: `python benchmarks/bench_waiting.py [--short]`.

Answers of the bundled model to 56 pictured and wrapped requests, in a process with one and with two threads, with OMP_WAIT_POLICY as the system
has it and PASSIVE (what `care-lens` sets), and with freed memory kept (`care_lens.core.memory`, what `care-lens` does), alone on the machine and
beside processes that keep a core busy. Printed are wall and processor seconds, and their ratio to one thread of the same round. Then the same of a logistic regression of 10,000 rows of width 160, as readers are fitted,
with one and with two threads of OpenBLAS, whose waiting no variable of OpenMP changes. A figure holds for the machine's number of cores, which is printed.
"""

import argparse
import logging
import os
import subprocess
import sys

from own_process import measured

log = logging.getLogger("bench_waiting")
WORK = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from care_lens import organism
from care_lens.core.memory import keep_freed_memory
if sys.argv[3] == "keep":
    assert keep_freed_memory()
lvlm = organism.load()
rows = organism.examples("typographic", "test", n=28) + organism.examples("wrapper", "test", n=28)
lvlm.generate(lvlm.prepare(rows[:4]), max_new_tokens=4)
wall, cpu = time.monotonic(), time.process_time()
for _ in range(int(sys.argv[2])):
    lvlm.generate(lvlm.prepare(rows), max_new_tokens=16)
print(json.dumps({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}))
"""

FIT = """
import json, sys, time, numpy as np
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
rng = np.random.default_rng(0)
labels = np.repeat([0, 1], [9500, 500])
rows = rng.standard_normal((10_000, 160)) @ rng.standard_normal((160, 160)) / 12 + labels[:, None] * rng.standard_normal(160) / 4
with threadpool_limits(int(sys.argv[1]), user_api="blas"):
    wall, cpu = time.monotonic(), time.process_time()
    for _ in range(5 * int(sys.argv[2])):
        LogisticRegression(C=0.1, max_iter=5000).fit(rows, labels)
print(json.dumps({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}))
"""

#: Threads, OpenMP's policy and whether freed memory is kept; the first is what the ratios are to.
VARIANTS = (
    (1, None, "default"),
    (1, None, "keep"),
    (2, None, "default"),
    (2, "PASSIVE", "default"),
    (2, "PASSIVE", "keep"),
)


def timed(threads: int, policy: str | None, rounds: int, memory: str = "default", work: str = WORK) -> dict[str, float]:
    """Wall and processor seconds of a process of its own."""
    return measured(work, threads, rounds, memory, policy=policy)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one round")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%d cores, load %.1f before", os.cpu_count(), os.getloadavg()[0])
    for busy in (0, 1):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            one = timed(1, None, 1 if options.short else 3)
            for threads, policy, memory in VARIANTS:
                rounds = 1 if options.short else 3
                found = one if (threads, memory) == (1, "default") else timed(threads, policy, rounds, memory)
                ratios = tuple(found[what] / one[what] for what in ("wall", "cpu"))
                log.info(
                    "%d busy beside it, %d threads, %-8s memory %-8s wall %6.1f s (x %.2f), processor %6.1f s (x %.2f)",
                    busy, threads, policy or "default", memory, found["wall"], ratios[0], found["cpu"], ratios[1],
                )  # fmt: skip
            one, two = (timed(threads, "PASSIVE", 1 if options.short else 3, work=FIT) for threads in (1, 2))
            log.info(
                "%d busy beside it, fit with two threads of OpenBLAS: wall %.1f s (x %.2f), processor %.1f s (x %.2f)",
                busy, two["wall"], two["wall"] / one["wall"], two["cpu"], two["cpu"] / one["cpu"],
            )  # fmt: skip
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
