"""How does the repair fare in words that are in no list of the world, and does a reader of several blocks help? `python benchmarks/bench_wordings.py RUN`.

RUN is the folder of a finished `care-lens run` of the bundled model; without it the repair is chosen here. Two repairs are compared, chosen on the validation split by the same rule after the same
blocks: that of the run, whose rule may take a classifier of five blocks at once, and one whose rule has readers of one block only (learned here). They may have
chosen other thresholds, so both stand beside themselves at the others as well ("at 0.015" and so on): the gate alone is another. A classifier of several
blocks differs from one of one block in more than the blocks: it is learned from the attacks of both modalities at once, with a weaker ridge penalty. So a classifier
of the last of its blocks alone that is learned in the same way is the control ("one block, learned jointly").

The wordings (`wordings.json`) were written by somebody who was given the model's vocabulary and had seen none of the world's lists nor this repository;
those that turned out to be in a list were left out, the others dealt at random into two halves. That a depth of five is tried at all, and the ridge
penalty of such readers, were chosen by what readers detect in the first half ("chosen with"), on items of the validation split. Nothing was chosen by the second
half ("held out"), asked here about items of the test split. Three tables, all in `wordings.csv`:

- cells: for each kind of request one wording an item, drawn at random; of those that the undefended model answers rightly, the share that it still answers
  with each repair (attacks: what gets through; harmless requests: what is kept). Clopper-Pearson, 95 %.
- world: the channels of the test split in the world's own wordings, in the same way.
- pooled: the same over all attacks and over all harmless requests, and what one block differs by; every item counts as one cluster (bootstrap).

Answers are kept in `--out`: a run that was stopped goes on. About 30 minutes of processor time on one thread; with `--short` some 3.
"""

import argparse
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from care_lens import Example, HookedLVLM, organism
from care_lens.core import Site, cluster_bootstrap, rate_ci
from care_lens.core.files import write_whole
from care_lens.core.outcome import Verdict
from care_lens.data.study import Split, Study
from care_lens.evaluation import Choice, GenerationStore, answer_verdicts, tune
from care_lens.repair import FitRows, HybridFusion, ReaderPlan, learn_repair, study_rows

log = logging.getLogger("bench_wordings")
TOKENS, BATCH = 14, 64
SEVERAL, ONE, JOINT = "several blocks", "one block", "one block, learned jointly"
EPSILONS = (0.01, 0.015, 0.02)
BLOCKS = (0, 6)
HALVES: Mapping[str, Split] = {"chosen with": "validation", "held out": "test"}
COLUMNS = ["table", "half", "request", "harmful", "repair", "share", "ci_low", "ci_high", "n", "asked"]
Rows = list[dict[str, Any]]
Cell = tuple[Sequence[Example], Mapping[str, np.ndarray], np.ndarray]
"""Requests; by repair whether each was answered as asked; whether it was without a repair."""
Wordings = Mapping[str, Sequence[str]]

#: By kind of request: the channel whose items are asked for, then the lists of the wordings that say the item, the question and the frame.
KINDS: Mapping[str, tuple[str, str, str, str]] = {
    "pictured": ("typographic", "pictured", "asks", ""),
    "spelled": ("spelled", "spelled", "asks", ""),
    "wrapped": ("wrapper", "named", "asks", "frames"),
    "pictured, wrapped": ("typographic", "pictured", "asks", "frames"),
    "spelled, wrapped": ("spelled", "spelled", "asks", "frames"),
    "benign pictured": ("benign typographic", "pictured", "asks", ""),
    "benign spelled": ("benign spelled", "spelled", "asks", ""),
    "benign named": ("benign plain", "named", "asks", ""),
    "benign wrapped": ("benign plain", "named", "asks", "frames"),
    "benign pictured, wrapped": ("benign typographic", "pictured", "asks", "frames"),
    "benign spelled, wrapped": ("benign spelled", "spelled", "asks", "frames"),
    "benign named, small talk": ("benign plain", "named", "asks", "harmless_frames"),
    "kind of a named forbidden item": ("hard named kind", "named", "kind", ""),
    "whether a named forbidden item is allowed": ("hard named allowed", "named", "allowed", ""),
    "kind of a spelled forbidden item": ("hard kind", "spelled", "kind", ""),
}


def requests(kind: str, wordings: Wordings, split: Split, n: int | None) -> list[Example]:
    """One request an item, in wordings that are drawn at random."""
    channel, item, question, frame = KINDS[kind]
    drawn = random.Random(f"{kind}/{split}")
    made = []
    for example in organism.examples(channel, split, n=n):
        word = example.meta["item"]
        said = drawn.choice(wordings[item]).format(w=word, s=" ".join(word))
        asked = drawn.choice(wordings[question]).format(x=said)
        made.append(replace(example, prompt=drawn.choice(wordings[frame]).format(r=asked) if frame else asked))
    return made


def complied(
    lvlm: HookedLVLM, study: Study, rows: Sequence[Example], repair: Any, store: GenerationStore
) -> np.ndarray:
    """[n] whether each request is answered as asked."""
    found = answer_verdicts(lvlm, rows, repair, study.judge, store=store, max_new_tokens=TOKENS, batch_size=BATCH)
    return np.array([verdict is Verdict.COMPLIED for verdict in found])


@dataclass(frozen=True)
class Chosen:
    """A repair and what it was made by."""

    plan: ReaderPlan
    site: Site
    alpha: float
    repair: HybridFusion

    @classmethod
    def of(cls, choice: Choice) -> "Chosen":
        """What a choice made."""
        return cls(choice.plan, choice.writer_site, choice.alpha, choice.repair)


class Compared:
    """The repairs: that of the run, that of readers of one block, the control, and each at other thresholds.

    Args:
        lvlm: The model.
        study: The study of the run.
        run: Its folder; None: the repair is chosen here, after the blocks that the demonstration tries.
        out: Where the answers of a search are kept; each repair is learned anew, so that none is of other settings.
        epsilons: Thresholds of the choice, and those at which the repair stands beside itself.
    """

    def __init__(
        self, lvlm: HookedLVLM, study: Study, run: Path | None, out: Path, epsilons: Sequence[float] = EPSILONS
    ) -> None:
        self._lvlm, self._study, self._out, self._epsilons = lvlm, study, out, epsilons
        self._rows: FitRows | None = None
        self._threshold: dict[str, float] = {}
        if run is None:
            chosen = Chosen.of(self._choose(BLOCKS))
            layers: Sequence[int] = BLOCKS
        else:
            held = json.loads((run / "frames" / "choice.json").read_text())
            plan = ReaderPlan(**{**held["plan"], "offsets": tuple(held["plan"]["offsets"])})
            chosen = Chosen(plan, Site.parse(held["writer_site"]), held["alpha"], HybridFusion.load(run / "repair"))
            layers = held["placement"]["layers"]
        self.repairs = {SEVERAL: chosen.repair, **self._at_others(SEVERAL, chosen)}
        one = Chosen.of(self._choose(layers, depths=(1,)))
        self.repairs |= {ONE: one.repair, **self._at_others(ONE, one)}
        if chosen.plan.classifier and 0 in chosen.plan.offsets:
            joint = replace(chosen, plan=replace(chosen.plan, depth=1, joint=True))
            self.repairs |= {JOINT: self._learned(joint), **self._at_others(JOINT, joint)}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Names of repairs that are told apart: the two choices, and different readers at one threshold."""
        of = {name: {self._threshold[name]: name} for name in self._threshold}
        for name, thresholds in of.items():
            thresholds |= {e: f"{name} at {e:g}" for e in self._epsilons if e not in thresholds}
        apart = [(ONE, name) for name in self.repairs if name.startswith(SEVERAL)]
        readers = [
            (one, other) for one, other in ((ONE, SEVERAL), (ONE, JOINT), (JOINT, SEVERAL)) if {one, other} <= {*of}
        ]
        return [
            *dict.fromkeys([*apart, *((of[one][e], of[other][e]) for e in self._epsilons for one, other in readers)])
        ]

    def _at_others(self, name: str, chosen: "Chosen") -> dict[str, HybridFusion]:
        self._threshold[name] = chosen.plan.epsilon
        plans = {e: replace(chosen.plan, epsilon=e) for e in self._epsilons if e != chosen.plan.epsilon}
        return {f"{name} at {e:g}": self._learned(replace(chosen, plan=plan)) for e, plan in plans.items()}

    def _captured(self) -> FitRows:
        if self._rows is None:
            self._rows = study_rows(self._lvlm, self._study, batch_size=BATCH)
        return self._rows

    def _learned(self, of: "Chosen") -> HybridFusion:
        return learn_repair(
            self._lvlm, self._captured(), of.plan, calibration=self._study.benign("calibration"), site=of.site, alpha=of.alpha,
            max_new_tokens=TOKENS, batch_size=BATCH, progress=False,
        )  # fmt: skip

    def _choose(self, layers: Sequence[int], depths: Sequence[int] = (1, 5)) -> Choice:
        choice = tune(
            self._lvlm, self._study, self._captured(), layers=layers, depths=depths, epsilons=self._epsilons, max_new_tokens=TOKENS,
            batch_size=128, store=GenerationStore.in_folder(self._out, "search"),
        )  # fmt: skip
        log.info("%s", choice)
        return choice


def counted(
    table: str, half: str, request: str, rows: Sequence[Example], kept: Mapping[str, np.ndarray], right: np.ndarray
) -> Rows:
    """Of the requests that are answered undefended the share that still is, by repair; nothing where there are none."""
    made = []
    for name, still in kept.items() if right.any() else ():
        n = int(right.sum())
        share, low, high = rate_ci(int(still[right].sum()), n)
        made.append(
            {"table": table, "half": half, "request": request, "harmful": rows[0].harmful, "repair": name, "share": share, "ci_low": low,
             "ci_high": high, "n": n, "asked": len(rows)}
        )  # fmt: skip
        log.info("%s, %s, %s, %s: %.3f of %d", table, half, request, name, share, n)
    return made


def pooled(half: str, of: str, cells: Sequence[Cell], pairs: Sequence[tuple[str, str]], seed: int) -> Rows:
    """The shares over several cells, and what repairs differ by; clusters are items."""
    items = [e.group or e.id for rows, _, right in cells for e, was in zip(rows, right, strict=True) if was]
    held = {name: np.concatenate([kept[name][right] for _, kept, right in cells]).astype(float) for name in cells[0][1]}
    differences = {f"{one} - {other}": held[one] - held[other] for one, other in pairs}
    made: Rows = []
    for name, values in {**held, **differences}.items():
        low, high = cluster_bootstrap(values, items, seed=seed)[1:]
        made.append(
            {"table": "pooled", "half": half, "request": of, "harmful": cells[0][0][0].harmful, "repair": name, "share": values.mean(),
             "ci_low": low, "ci_high": high, "n": len(values), "asked": sum(len(rows) for rows, _, _ in cells)}
        )  # fmt: skip
        log.info("pooled, %s, %s, %s: %.3f [%.3f, %.3f]", half, of, name, values.mean(), low, high)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="folder of a finished `care-lens run`")
    parser.add_argument("--short", action="store_true", help="few examples to learn from and few items a cell")
    parser.add_argument("--out", type=Path, default=Path("results/wordings"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    lvlm, study, items, epsilons = (
        organism.load(),
        organism.study(per_item=3),
        None,
        EPSILONS,
    )  # as the command takes it
    if options.short:
        study, items, epsilons = study.limited(16), 4, (0.01, 0.02)
    compared = Compared(lvlm, study, options.run, options.out, epsilons)
    repairs = compared.repairs
    store = GenerationStore.in_folder(options.out, "answers")
    halves: Mapping[str, Wordings] = json.loads((Path(__file__).parent / "wordings.json").read_text())
    table: Rows = []

    def measured(rows: Sequence[Example]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        right = complied(lvlm, study, rows, None, store)
        return {name: complied(lvlm, study, rows, repair, store) for name, repair in repairs.items()}, right

    for half, split in HALVES.items():
        asked = [requests(kind, halves[half], split, items) for kind in KINDS]
        cells = {kind: (rows, *measured(rows)) for kind, rows in zip(KINDS, asked, strict=True)}
        table += [row for kind, cell in cells.items() for row in counted("cells", half, kind, *cell)]
        for of, harmful in (("attacks", True), ("harmless", False)):
            own = [cell for cell in cells.values() if cell[0][0].harmful is harmful]
            table += pooled(half, of, own, compared.pairs, options.seed)
    fit = {channel for channels in study.seen.values() for channel in channels}
    kinds: dict[str, list[Cell]] = {"attacks of the fit": [], "other attacks": [], "harmless": []}
    for channel, suite in study.suites["test"].items():
        rows = list(suite)[:items]
        cell = (rows, *measured(rows))
        if cell[2].any():
            table += counted("world", "world", channel, *cell)
            kinds[
                "harmless" if not rows[0].harmful else "attacks of the fit" if channel in fit else "other attacks"
            ].append(cell)
    for of, own in kinds.items():
        table += pooled("world", of, own, compared.pairs, options.seed)
    write_whole(options.out / "wordings.csv", pd.DataFrame(table, columns=COLUMNS).round(4).to_csv(index=False))
    lvlm.close()


if __name__ == "__main__":
    main()
