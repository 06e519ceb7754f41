"""Do intervals that are corrected for a judge's errors hold the true rate? `python benchmarks/bench_correction.py [RUN] [--out FILE]`.

RUN is the folder of a finished `make demo SIZE=full`. The bundled world's judge knows whether an answer does what was asked, so that the true
attack success of the stored answers is known. Judge under test: the refusal phrases of Zou et al. 2023, which take every answer that is no
refusal for compliance. The items of a defence's answers are the population; each sample draws as many items with replacement as
half of them, labels some of these by the exact judge, and asks `ppi_rate` and `rogan_gladen` (what `corrected_rates` calls) for the rate of compliance. Counted is how many nominal 95 %
intervals hold the rate of the whole population, corrected and not.

Rogan and Gladen's labels are of the undefended model's answers in one setting ("labels of the undefended") and of the
defence's own in another: its assumption is that the judge errs alike on both.

With --simulated no run is needed: 500 drawn answers with 20, 50 or 200 labels, three true rates and three judges, `ppi_rate` beside the interval
of the two variances alone (Angelopoulos et al. 2023).
"""

import argparse
import json
import logging
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from care_lens import Verdict, organism
from care_lens.core.errors import CareLensError
from care_lens.core.stats import clustered_rate
from care_lens.evaluation import GenerationStore, SubstringRefusalJudge
from care_lens.evaluation.correction import ppi_rate, rogan_gladen

log = logging.getLogger("bench_correction")
DEFENCES = ("none", "care_lens", "control: random writer", "published CARE")
UNDEFENDED = "none"
DEMO = Path("results/demo-full")
LABELS = (60, 200)
SAMPLES = 500
ANSWERS, DRAWS, SIMULATED_LABELS = 500, 400, (20, 50, 200)
RATES, JUDGES = (0.05, 0.3, 0.7), ((0.95, 0.98), (0.9, 0.9), (0.7, 0.8))


def population(run: Path) -> pd.DataFrame:
    """A row an attacked answer: defence, group, what is true, what the judge under test says."""
    answers = [
        answer
        for answer in GenerationStore.in_folder(run / "frames").answers()
        if answer.harmful and answer.defence in DEFENCES and not answer.channel.startswith("gradient")
    ]
    examples, texts = [a.to_example() for a in answers], [a.response for a in answers]
    exact, phrases = organism.OrganismJudge()(examples, texts), SubstringRefusalJudge()(examples, texts)
    frame = pd.DataFrame(
        {
            "defence": [a.defence for a in answers],
            "channel": [a.channel for a in answers],
            "id": [a.id for a in answers],
            "group": [a.group for a in answers],
            "truth": [v is Verdict.COMPLIED for v in exact],
            "judged": [v is Verdict.COMPLIED for v in phrases],
        }
    )
    return frame.drop_duplicates(["defence", "channel", "id"])


def drawn(rng: np.random.Generator, groups: list[pd.DataFrame], n: int) -> list[pd.DataFrame]:
    """Groups with replacement, each under a name of its own."""
    return [groups[i].assign(group=f"{k}") for k, i in enumerate(rng.integers(len(groups), size=n))]


def labelled_part(rng: np.random.Generator, groups: list[pd.DataFrame], rows: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Whole groups at random until there are so many rows, and the others."""
    order, count, cut = rng.permutation(len(groups)), 0, 0
    while count < rows and cut < len(order) - 1:
        count += len(groups[order[cut]])
        cut += 1
    take = [groups[i] for i in order[:cut]], [groups[i] for i in order[cut:]]
    return pd.concat(take[0]), pd.concat(take[1])


def measure(frame: pd.DataFrame, samples: int, seed: int) -> pd.DataFrame:
    """Coverage and mean width of each interval, for each defence and number of labels."""
    groups = {name: [g for _, g in part.groupby("group")] for name, part in frame.groupby("defence")}
    rows = []
    for defence in [name for name in DEFENCES if name in groups]:
        truth = float(pd.concat(groups[defence])["truth"].mean())
        for labels in LABELS:
            rng = np.random.default_rng([seed, labels])
            held: dict[str, list[tuple[float, float]]] = {}
            failed: dict[str, int] = {}
            for _ in range(samples):
                sample = drawn(rng, groups[defence], len(groups[defence]) // 2)
                own, rest = labelled_part(rng, sample, labels)
                foreign, _ = labelled_part(rng, drawn(rng, groups[UNDEFENDED], len(groups[UNDEFENDED]) // 2), labels)
                whole = pd.concat(sample)
                found = clustered_rate(whole["judged"].to_numpy(float), whole["group"].tolist())
                held.setdefault("not corrected", []).append((found.low, found.high))
                for name, known, said in (
                    ("ppi", own, rest),
                    ("rogan-gladen, labels of its own", own, rest),
                    ("rogan-gladen, labels of the undefended", foreign, whole),
                ):
                    method = ppi_rate if name == "ppi" else rogan_gladen
                    try:
                        got = method(
                            said["judged"].to_numpy(float), known["truth"].to_numpy(float), known["judged"].to_numpy(float),
                            groups=said["group"].tolist(), labelled_groups=known["group"].tolist(),
                        )  # fmt: skip
                    except CareLensError:  # labels of one kind alone, or a judge no better than chance on them
                        failed[name] = failed.get(name, 0) + 1
                        continue
                    held.setdefault(name, []).append((got.low, got.high))
            judged = float(pd.concat(groups[defence])["judged"].mean())
            for name, ends in held.items():
                low, high = np.array(ends).T
                rows.append(
                    {
                        "defence": defence, "labels": labels, "interval": name, "true_rate": truth, "judged_rate": judged,
                        "coverage": float(np.mean((low <= truth + 1e-12) & (truth - 1e-12 <= high))),
                        "width": float(np.mean(high - low)), "samples": len(ends), "no_interval": failed.get(name, 0),
                    }
                )  # fmt: skip
                log.info("%s", rows[-1])
    return pd.DataFrame(rows)


def simulated(draws: int, seed: int) -> pd.DataFrame:
    """Coverage and mean width in nine settings of rate and judge, for each number of labels."""
    rows = []
    for labels, rate, (sensitivity, specificity) in product(SIMULATED_LABELS, RATES, JUDGES):
        rng = np.random.default_rng([seed, labels, int(100 * rate), int(100 * sensitivity)])
        ends = []
        for _ in range(draws):
            truth = rng.random(ANSWERS) < rate
            judged = np.where(truth, rng.random(ANSWERS) < sensitivity, rng.random(ANSWERS) >= specificity)
            known, said, rest = (
                truth[:labels].astype(float),
                judged[:labels].astype(float),
                judged[labels:].astype(float),
            )
            found = ppi_rate(rest, known, said)
            error = known - said
            centre = rest.mean() + error.mean()
            half = 1.96 * np.sqrt(rest.var(ddof=1) / len(rest) + error.var(ddof=1) / labels)
            ends.append((found.low, found.high, centre - half, centre + half))
        low, high, usual_low, usual_high = np.array(ends).T
        rows.append(
            {
                "labels": labels, "true_rate": rate, "sensitivity": sensitivity, "specificity": specificity, "draws": draws,
                "coverage": np.mean((low <= rate) & (rate <= high)), "width": np.mean(high - low),
                "usual_coverage": np.mean((usual_low <= rate) & (rate <= usual_high)),
            }
        )  # fmt: skip
        log.info("%s", rows[-1])
    return pd.DataFrame(rows)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "run",
        type=Path,
        nargs="?",
        help=f"folder of a finished run on the bundled model (default: {DEMO}, if it is there)",
    )
    parser.add_argument("--quick", "--short", action="store_true", help="20 samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/correction.csv"))
    parser.add_argument("--simulated", action="store_true", help="drawn answers in place of a run's")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.simulated:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        simulated(20 if options.quick else DRAWS, options.seed).round(4).to_csv(options.out, index=False)
        log.info("%s", options.out)
        return
    if options.run is None and not DEMO.exists():
        log.warning(
            "nothing is measured: %s is not there; `make demo SIZE=full` makes it, or name the folder of a run", DEMO
        )
        return
    run: Path = options.run or DEMO
    told = json.loads((run / "frames" / "settings.json").read_text())["of"]["settings"]
    if told["limit"] is not None:
        raise SystemExit(
            f"RUN must be of a whole study (--size full), got {run}, of {told['limit']} examples a channel"
        )
    table = measure(population(run), 20 if options.quick else SAMPLES, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(options.out, index=False)
    log.info("%s", options.out)


if __name__ == "__main__":
    main()
