"""Tuning the repair: readers, gate and writers chosen on the validation split.

::

    choice = tune(lvlm, study, max_new_tokens=14)
    choice.repair.save("repair")

Reader plans are compared by what they detect at the conformal threshold on teacher-forced answers; the best are run with
writers above them, and the winner must keep benign accuracy. The calibration split is cut in two by item: one half sets the
thresholds that plans are compared at, the other, which nothing was chosen on, the final gate. The test split is never read.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Any

import pandas as pd

from care_lens.core.display import LinesRepr, listed
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair, Verdict
from care_lens.core.progress import Steps
from care_lens.core.results import package_versions
from care_lens.core.site import Site
from care_lens.data.study import Study
from care_lens.evaluation.answering import (
    missing_share,
    require_max_missing,
    several_verdicts,
    share,
    within_loss,
)
from care_lens.evaluation.frontier import Frontier, Tried, figures_of, frontier_frame
from care_lens.evaluation.judging import judge_name
from care_lens.evaluation.store import GenerationStore
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.placement import Placement, reader_layers
from care_lens.repair.calibrating import captured_scores, halves, recalibrated_together
from care_lens.repair.errors import FlatScoresError, TooFewCalibrationError
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.gate import needed_for
from care_lens.repair.learning import FittedReaders, ReaderPlan, Readers, assemble, reader_plans, require_depths
from care_lens.repair.refusing import Answers
from care_lens.repair.rows import FitRows, TokenRows, residual_sites, rows_beside, study_rows, token_rows
from care_lens.subspace import ModelIdentity, RankError, SafetySubspace

log = logging.getLogger(__name__)


class NoCandidateError(CareLensError, RuntimeError):
    """No candidate could be made, or none keeps benign accuracy on validation."""


@dataclass(frozen=True)
class Choice(LinesRepr):
    """The repair that won and the tables it won in.

    Attributes:
        repair: Ready to use.
        plan: What its readers are.
        writer_site: Where it writes.
        alpha: How strongly.
        subspaces: What its readers read.
        placement: After which layers readers were tried, and why.
        readers: By reader plan the detection rate of each seen attack channel and of the worst, and the share of benign prompts opened.
        runs: Candidates run with their writers: attack success and refusals; benign accuracy where it was measured. Attack success is at the
            threshold of the comparison; "asr_recalibrated" is that of the repair itself, whose gate was calibrated anew (the one that won alone).
        frontier: Those of the runs that were checked on benign prompts, as `care_lens.evaluation.search` gives its settings, with intervals:
            attack success as measured at the thresholds that plans were compared at, right benign answers and over-refusal at the final one.
            Nothing is answered for it, so that it has no controls. None: of a choice that was loaded from a file.
    """

    repair: HybridFusion
    plan: ReaderPlan
    writer_site: Site
    alpha: float
    subspaces: tuple[SafetySubspace, ...]
    placement: Placement
    readers: pd.DataFrame
    runs: pd.DataFrame
    frontier: Frontier | None = None

    def shown(self) -> tuple[str, dict[str, str]]:
        """What was chosen, and where to look further."""
        rows = {
            "reads": str(self.plan),
            "writes": f"at {self.writer_site}, alpha {self.alpha:g}",
            "tried": f"after {'blocks' if len(self.placement.layers) > 1 else 'block'} {listed(self.placement.layers, most=8)}",
            "tables": f".readers ({len(self.readers)} rows), .runs ({len(self.runs)} rows)",
            "see": ".repair.explain(), .subspaces, .placement" + ("" if self.frontier is None else ", .frontier"),
        }
        return f"Choice: {self.repair.name}", rows


@dataclass(frozen=True)
class _Detected:
    """A reader plan on validation."""

    plan: ReaderPlan
    fitted: FittedReaders
    by_channel: dict[str, float]
    benign: float

    @property
    def worst(self) -> float:
        return min(self.by_channel.values())

    @property
    def order(self) -> tuple[float | int, ...]:
        """The best first: of equal ones those that read prompt and answer, the answer earlier, with less touched."""
        plan = self.plan
        return (-round(self.worst, 2), -len(plan.offsets), max(plan.offsets), plan.epsilon, self.benign)

    def row(self) -> dict[str, Any]:
        return {"plan": str(self.plan), "worst": self.worst, "benign": self.benign, **self.by_channel}


@dataclass
class _Candidate:
    """A plan with writers, run on the seen attacks of validation."""

    of: _Detected
    site: Site
    alpha: float
    asr: float
    refused: float
    repair: HybridFusion
    said: dict[bool, list[Verdict]]
    late: bool = False  # too many of its answers have no verdict
    benign: dict[str, float] = field(default_factory=dict)

    @property
    def order(self) -> tuple[float | int, ...]:
        figures = (1.0, 0.0) if isnan(self.asr) else (round(self.asr, 2), -self.refused)
        return (self.late, *figures, self.alpha)

    @property
    def harm(self) -> tuple[float | int, ...]:
        """What a run that keeps benign accuracy is chosen by, the least first."""
        lost, kept = self.benign["most_lost_by_a_channel"], self.benign["benign_after"]
        late, asr, refused, alpha = self.order
        return (late, asr, round(lost, 2), refused, -kept, alpha)

    def row(self) -> dict[str, Any]:
        made = {"plan": str(self.of.plan), "site": str(self.site), "alpha": self.alpha, "asr": self.asr}
        return {**made, "refused": self.refused, **self.benign}


def tune(
    lvlm: HookedLVLM,
    study: Study,
    rows: FitRows | None = None,
    *,
    layers: Placement | Sequence[int] | None = None,
    answer_tokens: int = 6,
    ranks: Sequence[int] = (0, 8),
    classifier: bool = True,
    depths: Sequence[int] = (1, 5),
    epsilons: Sequence[float] = (0.01, 0.015, 0.02),
    alphas: Sequence[float] = (1.0, 1.5),
    answers: Answers = "rearmed",
    candidates: int = 4,
    benign_loss: float = 0.03,
    max_missing: float | int = 0.02,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    seed: int = 0,
    store: GenerationStore | None = None,
    name: str = "care_lens",
    progress: bool = True,
) -> Choice:
    """Pick readers, gate and writers on the validation split.

    Plans are ranked by their smallest detection rate over the seen attack channels; of equal ones those come first that read
    prompt and answer, read the answer earlier, have the smaller epsilon and open for fewer benign prompts. The leading plans,
    of every epsilon one in turn, are run with writers at each layer from their own on, in several strengths. The leading runs, of different plans first, are asked the
    benign prompts; of those that keep benign accuracy the one with the lowest attack success wins, and of equal ones the one whose most
    harmed benign channel loses least. Cost: answers to the seen attacks for every leading plan, site and strength, and to the benign
    prompts for as many runs as there are `candidates`.

    Args:
        lvlm: The model.
        study: Its calibration and validation splits and its judge are used, and its fit split if there are no rows.
        rows: Of the fit split; None: they are captured (`care_lens.repair.study_rows`).
        layers: After which blocks readers are tried, as `care_lens.mediation.reader_layers` gives it from the diagnosis; None: all but
            the last.
        answer_tokens: So many tokens of an answer may be read.
        ranks: Ranks of the readers tried; 0 stands for the linear (discriminant) reader.
        classifier: Whether readers fitted as classifiers are tried.
        depths: After how many blocks at once such a classifier reads the last prompt token; see :class:`~care_lens.repair.ReaderPlan`. A depth that
            needs blocks that the model or the rows do not have is left out at that layer.
        epsilons: Shares of benign prompts that a gate may touch.
        alphas: Strengths of the writers; beyond 1 they go past their target.
        answers: "rearmed", or "held" as versions before had it; see :func:`care_lens.repair.assemble`.
        candidates: Reader plans that are run with writers, and runs that are checked on benign prompts.
        benign_loss: Most that the share of right benign answers may fall.
        max_missing: Largest share of attacks that may be without a verdict in a run, and of benign prompts; runs with more come last, or do not win.
        max_new_tokens: Most tokens of an answer, for calibration, safety and utility alike.
        batch_size: Examples at a time.
        seed: Of the cut of the calibration split.
        store: Where the candidates' answers are kept, so that a stopped choice goes on; None: in memory.
        name: Of the repair, its row of a defence table.
        progress: Whether to show progress bars.

    Returns:
        The repair and the tables it was chosen in.

    Raises:
        NoCandidateError: If no plan could be calibrated, or none keeps benign accuracy.
        ValueError: If an option makes no sense, or the study lacks what is read.
    """
    kinds = {"depths": depths} if classifier else {"ranks": ranks}
    _require_options(candidates, benign_loss, **kinds, epsilons=epsilons, alphas=alphas)
    require_max_missing(max_missing)
    placement = _placement(layers, lvlm.n_layers())
    comparing, calibrating = halves(study.benign("calibration"), seed=seed)
    if rows is not None and not 0 <= answer_tokens <= rows.tokens:
        raise ValueError(f"answer_tokens must be from 0 to {rows.tokens}, those of the rows, got {answer_tokens}")
    _require_calibration(len(comparing), epsilons)  # before anything is read
    if rows is None:
        rows = study_rows(lvlm, study, tokens=answer_tokens, batch_size=batch_size, progress=progress)
    plans = reader_plans(
        placement.layers,
        answer_tokens=answer_tokens,
        ranks=ranks,
        epsilons=epsilons,
        classifier=classifier,
        depths=depths,
    )
    plans = _readable(plans, rows, depths if classifier else ())
    table = _compared(
        lvlm, study, rows, plans, comparing, tokens=answer_tokens, batch_size=batch_size, progress=progress
    )

    attacked = [example for m in rows.modalities for example in study.malicious("validation", m)]
    store = GenerationStore() if store is None else store

    def several(
        examples: Sequence[Example],
        defences: Sequence[Repair | None],
        *,
        watched: Sequence[Repair] = (),
        desc: str | None = None,
    ) -> list[list[Verdict]]:
        return several_verdicts(
            lvlm,
            examples,
            defences,
            study.judge,
            store=store,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            watched=watched,
            progress=progress and desc is not None,
            desc=desc,
        )

    runs: list[_Candidate] = []
    tried = [
        (row, site, alpha)
        for row in _by_turns(table, candidates)
        for site, alpha in itertools.product(residual_sites(lvlm)[row.plan.layer :], alphas)
    ]
    repairs = [
        assemble(
            row.fitted,
            rows,
            row.plan,
            site,
            alpha=alpha,
            answers=answers,
            name=name,
            provenance={"study": study.name, "plan": str(row.plan)},
        )
        for row, site, alpha in tried
    ]
    judged = several(attacked, repairs, desc="trying writers")
    for (row, site, alpha), repair, said in zip(tried, repairs, judged, strict=True):
        asr, refused = share(said, Verdict.COMPLIED), share(said, Verdict.REFUSED)
        late = missing_share(said) > max_missing
        runs.append(_Candidate(row, site, alpha, asr, refused, repair, {True: said}, late))
        log.info("%s, written at %s x %g: ASR %.3f, refused %.3f", row.plan, site, alpha, asr, refused)
    runs.sort(key=lambda run: run.order)

    benign = study.benign("validation")
    checked = _leading(runs, candidates)
    repairs = recalibrated_together(
        lvlm,
        [run.repair for run in checked],
        calibrating,
        epsilons=[run.of.plan.epsilon for run in checked],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    for run, repair in zip(checked, repairs, strict=True):
        run.repair = repair
    (bare,) = several(benign, [None], watched=repairs)
    before = share(bare, Verdict.COMPLIED)
    if isnan(before):
        raise ValueError("the undefended model must have an answer with a verdict, got none; the log names the errors")
    judged = several(benign, repairs, watched=repairs, desc="checking benign answers")
    for run, said in zip(checked, judged, strict=True):
        run.said[False] = said
        after = share(said, Verdict.COMPLIED)
        most = _most_lost(benign, bare, said)
        run.benign = {"benign_before": before, "benign_after": after, "most_lost_by_a_channel": most}
        log.info("benign %.3f -> %.3f, a channel lost %.2f: %s at %s", before, after, most, run.of.plan, run.site)
    kept = [
        run
        for run in checked
        if within_loss(run.benign["benign_after"], before, benign_loss)
        and missing_share(run.said[False]) <= max_missing
    ]
    if not kept:
        best = max(run.benign["benign_after"] for run in checked)
        raise NoCandidateError(
            f"a repair must keep benign accuracy within {benign_loss:.0%} of {before:.1%} on validation, got at best "
            f"{best:.1%}; try smaller epsilons"
        )
    won = min(kept, key=lambda run: run.harm)
    won.benign["asr_recalibrated"] = share(several(attacked, [won.repair])[0], Verdict.COMPLIED)
    return Choice(
        repair=replace(won.repair, model=ModelIdentity.from_model(lvlm.hf_model)),
        plan=won.of.plan,
        writer_site=won.site,
        alpha=won.alpha,
        subspaces=won.of.fitted.subspaces,
        placement=placement,
        readers=pd.DataFrame([row.row() for row in table]),
        runs=pd.DataFrame([run.row() for run in runs]),
        frontier=_frontier(
            runs,
            won,
            {True: attacked, False: benign},
            before,
            {
                "study": study.name,
                "split": "validation",
                "benign_loss": benign_loss,
                "answers": answers,
                "max_new_tokens": max_new_tokens,
                "judge": judge_name(study.judge),
                "seed": seed,
                "failed": {},
                "versions": package_versions(),
            },
        ),
    )


def _frontier(
    runs: Sequence[_Candidate],
    won: _Candidate,
    asked: dict[bool, list[Example]],
    before: float,
    settings: dict[str, Any],
) -> Frontier:
    """The runs that were checked on benign prompts, from the verdicts that are there."""
    measured: dict[int, Tried] = {}
    for run in runs:
        if False in run.said:
            name = f"{run.of.plan}, written at {run.site} x {run.alpha:g}"
            setting = {"plan": str(run.of.plan), "site": str(run.site), "alpha": run.alpha}
            measured[id(run)] = Tried(name, "candidate", setting, run.repair, figures_of(name, run.said, asked))

    def within(one: Tried) -> bool:
        return within_loss(one.value("utility"), before, settings["benign_loss"])

    frame = frontier_frame([*measured.values()], [], measured[id(won)], within)
    return Frontier(frame, {**settings, "n_trials": len(measured)})


def _by_turns(table: Sequence[_Detected], n: int) -> list[_Detected]:
    """The n leading plans, of every epsilon one in turn: plans of one epsilon often open for the same prompts."""
    epsilons = dict.fromkeys(row.plan.epsilon for row in table)
    each = [[row for row in table if row.plan.epsilon == epsilon] for epsilon in epsilons]
    return [row for turn in itertools.zip_longest(*each) for row in turn if row is not None][:n]


def _leading(runs: Sequence[_Candidate], n: int) -> list[_Candidate]:
    """The n first runs, of as many plans as there are: the best of each plan, then the rest."""
    best = {run.of.plan: run for run in reversed(runs)}
    first = [run for run in runs if best[run.of.plan] is run]
    return [*first, *(run for run in runs if best[run.of.plan] is not run)][:n]


def _most_lost(benign: Sequence[Example], before: Sequence[Verdict], after: Sequence[Verdict]) -> float:
    """How far the share of right answers falls in the benign channel where it falls most: means over channels hide it."""
    channels = dict.fromkeys(example.channel for example in benign)

    def right(said: Sequence[Verdict], channel: str) -> float:
        here = [v is Verdict.COMPLIED for v, example in zip(said, benign, strict=True) if example.channel == channel]
        return sum(here) / len(here)

    return max(right(before, channel) - right(after, channel) for channel in channels)


def _compared(
    lvlm: HookedLVLM,
    study: Study,
    rows: FitRows,
    plans: Sequence[ReaderPlan],
    comparing: Sequence[Example],
    *,
    tokens: int,
    batch_size: int,
    progress: bool,
) -> list[_Detected]:
    """Reader plans by what they detect of the seen attacks of validation, the best first."""

    def held(examples: Sequence[Example]) -> TokenRows:
        return token_rows(lvlm, examples, residual_sites(lvlm), tokens=tokens, batch_size=batch_size, progress=progress)

    calibration = rows_beside(rows, lvlm, comparing, tokens=tokens, batch_size=batch_size, progress=progress)
    harmless = held(study.benign("validation"))
    attacks = {c: held(study.suites["validation"][c]) for m in rows.modalities for c in study.seen[m]}
    readers, table, reasons = Readers(rows), [], {}
    for plan in Steps(plans, desc="fitting readers", disable=not progress):
        try:
            fitted = readers.fit(plan, calibration)
        except (RankError, TooFewCalibrationError, FlatScoresError) as error:
            log.info("left out: %s (%s)", plan, error)
            reasons[type(error)] = str(error)
            continue
        table.append(
            _Detected(plan, fitted, {c: _opened(fitted, a) for c, a in attacks.items()}, _opened(fitted, harmless))
        )
    if not table:
        raise NoCandidateError(
            f"one of {len(plans)} plans must be calibrated on {len(comparing)} benign prompts, got none: {'; '.join(reasons.values())}"
        )
    return sorted(table, key=lambda row: row.order)


def _readable(plans: Sequence[ReaderPlan], rows: FitRows, depths: Sequence[int]) -> list[ReaderPlan]:
    """The plans of which the rows hold every block, or hold not even the last, which is refused with the block's name."""

    def held(plan: ReaderPlan) -> bool:
        sites = [Site("language", layer, "hook_resid_post") for layer in plan.layers]
        return sites[-1] not in rows.benign.rows or all(site in rows.benign.rows for site in sites)

    readable = [plan for plan in plans if held(plan)]
    fit = {plan.depth for plan in readable if plan.classifier}
    if lost := sorted({*depths} - fit):
        say = log.info if fit else log.warning
        say(
            "no classifier has a depth of %s: there are not so many blocks up to the layers that are tried, or in the rows",
            lost,
        )
    if not readable:
        raise NoCandidateError(
            f"one plan or more must be there to try, got none: no classifier of depth {list(depths)} fits the layers and rows; give a smaller "
            "depth, or ranks"
        )
    return readable


def _opened(fitted: FittedReaders, rows: TokenRows) -> float:
    """Share of rows for which the gate opens."""
    return float((captured_scores(fitted.both, rows) > fitted.gate.threshold).double().mean())


def _placement(layers: Placement | Sequence[int] | None, n_layers: int) -> Placement:
    if layers is None:
        return reader_layers({}, n_layers)
    if isinstance(layers, Placement):
        return layers
    if not layers or not all(0 <= layer < n_layers for layer in layers):
        raise ValueError(f"layers must be one or more from 0 to {n_layers - 1}, got {list(layers)}")
    return Placement(tuple(layers), "These layers were given.")


def _require_calibration(n: int, epsilons: Sequence[float]) -> None:
    most = max(epsilons)
    if most > 0 and n < (needed := needed_for(most)):
        raise NoCandidateError(
            f"scores must be at least {needed} for a gate at epsilon {most:g}, got {n}: that many benign prompts are in the half of the calibration "
            f"split that plans are compared on; give {2 * needed} of many items, or a larger epsilon"
        )


def _require_options(candidates: int, benign_loss: float, **lists: Sequence[Any]) -> None:
    if candidates < 1:
        raise ValueError(f"candidates must be 1 or more, got {candidates}")
    if not 0 <= benign_loss <= 1:
        raise ValueError(f"benign_loss must be a share from 0 to 1, got {benign_loss}")
    if empty := [name for name, values in lists.items() if not len(values)]:
        raise ValueError(f"{empty[0]} must hold one or more, got none")
    require_depths(lists.get("depths", ()))
