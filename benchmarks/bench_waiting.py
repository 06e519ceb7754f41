"""What it costs that OpenMP's threads spin while they wait. `python benchmarks/bench_waiting.py [--short]`.

Answers of the bundled model to 56 pictured and wrapped requests, in a process with one and with two threads, with OMP_WAIT_POLICY as the system
has it and PASSIVE (what `care-lens` sets), alone on the machine and beside processes that keep a core busy. Printed are wall and processor
seconds, and their ratio to one thread of the same round. A figure holds for the machine's number of cores, which is printed.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

log = logging.getLogger("bench_waiting")
WORK = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
from care_lens import organism
lvlm = organism.load()
rows = organism.examples("typographic", "test", n=28) + organism.examples("wrapper", "test", n=28)
lvlm.generate(lvlm.prepare(rows[:4]), max_new_tokens=4)
wall, cpu = time.monotonic(), time.process_time()
for _ in range(int(sys.argv[2])):
    lvlm.generate(lvlm.prepare(rows), max_new_tokens=16)
print(json.dumps({"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}))
"""


def measured(threads: int, policy: str | None, rounds: int) -> dict[str, float]:
    """Wall and processor seconds of a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    command = [sys.executable, "-W", "ignore", "-c", WORK, str(threads), str(rounds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


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
            one = measured(1, None, 1 if options.short else 3)
            for threads, policy in ((1, None), (2, None), (2, "PASSIVE")):
                found = one if threads == 1 else measured(threads, policy, 1 if options.short else 3)
                ratios = tuple(found[what] / one[what] for what in ("wall", "cpu"))
                log.info(
                    "%d busy beside it, %d threads, %-8s wall %6.1f s (x %.2f), processor %6.1f s (x %.2f)",
                    busy, threads, policy or "default", found["wall"], ratios[0], found["cpu"], ratios[1],
                )  # fmt: skip
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
