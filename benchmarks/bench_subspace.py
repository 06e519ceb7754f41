"""What a safety subspace costs: time and memory of our solvers beside the published recipe and SciPy, in one
run.

Everything starts from the same float32 rows and ends at the top k directions, in float64, with both
covariances shrunk by 0.1:

- published: covariances, ``inv(sqrtm(C_b + 1e-6 I))``, whitened C_m, full ``eigh``, columns normalised (a
  plain implementation of the recipe of Fu et al. 2026; unshrunk, as there);
- scipy: covariances and ``scipy.linalg.eigh`` on the d x d pencil, top k only;
- dual, dense and iterative: ``SafetySubspace.fit`` with that solver, all of it, from the float32 rows to the tensors;
- bare eigenproblem: a symmetric matrix of order N_b + N_m that is already there, top k only; and all of it.

Each runs in a process of its own, so that peak memory (above that of the rows) is its own. One line of JSON a
case goes to the log. ``speedup`` is the published recipe's processor time over the case's, which a busy
machine disturbs less than wall time; ``cosine`` is the smallest principal cosine to SciPy's subspace. On a machine that
others use too, take --threads 1: several threads that wait for a core spin, which counts as processor time. The
variable OPENBLAS_CORETYPE is unset in the processes measured, because a kernel chosen for another processor would be
timed instead; nothing else of the environment is changed but the number of threads.

Run with ``python benchmarks/bench_subspace.py [--quick] [--threads 2]``; the full size takes some minutes.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

logger = logging.getLogger("bench_subspace")

FULL = {"width": 3584, "count": 720, "rank": 64}
QUICK = {"width": 512, "count": 100, "rank": 16}
WEIGHT = 0.1
ROUNDS = {"published": 1, "scipy": 1}
CASES = ("published", "scipy", "dense", "iterative", "dual", "bare eigenproblem", "bare eigenproblem, all")


def rows_of(width: int, count: int, rank: int) -> tuple[Any, Any]:
    """Benign and malicious float32 rows with a decaying spectrum; the malicious ones wider along ``rank``
    axes."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).float() ** -0.5
    benign, malicious = (torch.randn(count, width, generator=generator) for _ in range(2))
    wider = torch.randperm(width, generator=generator)[:rank]
    malicious[:, wider] *= torch.linspace(4, 12, rank)
    return benign * scale, malicious * scale + 0.01


def solve(case: str, benign: Any, malicious: Any, rank: int) -> Any:
    """The [d, k] directions that a case finds."""
    import numpy as np
    from scipy.linalg import eigh, inv, sqrtm

    from care_lens.subspace import SafetySubspace

    if case in ("dual", "dense", "iterative"):
        fitted = SafetySubspace.fit(benign, malicious, rank=rank, contrast="covariance", shrinkage=WEIGHT, solver=case)
        return fitted.read.double().numpy()
    covariances = [np.cov(rows.double().numpy(), rowvar=False, bias=True) for rows in (benign, malicious)]
    order, eye = len(covariances[0]), np.eye(len(covariances[0]))
    if case == "published":
        whitening = inv(np.real(sqrtm(covariances[0] + 1e-6 * eye)))
        _, vectors = eigh(whitening @ covariances[1] @ whitening)
        directions = whitening @ vectors[:, ::-1][:, :rank]
        return directions / np.linalg.norm(directions, axis=0)
    shrunk = [(1 - WEIGHT) * c + WEIGHT * np.trace(c) / order * eye for c in covariances]
    return eigh(shrunk[1], shrunk[0], subset_by_index=[order - rank, order - 1])[1]


def bare(benign: Any, malicious: Any, rank: int, *, everything: bool = False) -> Callable[[], Any]:
    """The top of a symmetric eigenproblem of order N_b + N_m, or all of it, whose matrix is made beforehand."""
    import numpy as np
    from scipy.linalg import eigh

    rows = np.concatenate([benign.numpy(), malicious.numpy()]).astype(np.float64)
    gram = rows @ rows.T
    if everything:
        return lambda: eigh(gram, check_finite=False)
    return lambda: eigh(gram, subset_by_index=[len(gram) - rank, len(gram) - 1], check_finite=False)


def measure(case: str, size: dict[str, int]) -> tuple[dict[str, Any], Any]:
    """Median seconds and peak MB of a case, and what it found; runs in a process of its own."""
    rank = size["rank"]
    prepare: Callable[..., Callable[[], Any]] = partial(partial, solve, case)
    if case.startswith("bare"):
        prepare = partial(bare, everything=case.endswith("all"))
    prepare(*rows_of(64, 16, 2), 2)()
    run = prepare(*rows_of(**size), rank)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor, found = [], [], None
    for _ in range(ROUNDS.get(case, 3)):
        start = time.perf_counter(), time.process_time()
        found = run()
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    row = {
        "case": case,
        "seconds": round(statistics.median(wall), 3),
        "cpu_seconds": round(statistics.median(processor), 3),
        "peak_mb": round(peak),
    }
    return row, found


def smallest_cosine(first: Any, second: Any) -> float:
    """Of the principal angles between two column spans."""
    import numpy as np

    overlap = np.linalg.qr(first)[0].T @ np.linalg.qr(second)[0]
    return float(np.linalg.svd(overlap, compute_uv=False).min())


def main() -> None:
    """Measure every case and log the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", "--short", action="store_true", help="small sizes, seconds in all")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.pop("OPENBLAS_CORETYPE", None)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    size = QUICK if options.quick else FULL
    logger.info(json.dumps({**size, "threads": options.threads, "shrinkage": WEIGHT}))
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for case in CASES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows[case], found[case] = pool.apply(measure, (case, size))
    for case, row in rows.items():
        row["speedup"] = round(rows["published"]["cpu_seconds"] / row["cpu_seconds"], 1)
        if case in ("dense", "dual", "iterative"):
            row["cosine"] = 1 - float(f"{1 - smallest_cosine(found[case], found['scipy']):.1e}")
        logger.info(json.dumps(row))
    for case in CASES[-2:]:
        ratio = rows["dual"]["cpu_seconds"] / rows[case]["cpu_seconds"]
        logger.info(json.dumps({f"dual over {case}": round(ratio, 2)}))


if __name__ == "__main__":
    main()
