"""Step 4: defences by channels on the test split, on which nothing is fitted or chosen."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from care_lens.core.examples import Example
from care_lens.core.identity import repair_fingerprint
from care_lens.core.outcome import Repair
from care_lens.core.stats import cluster_bootstrap
from care_lens.data.study import Modality, Study
from care_lens.defences import NoRefusalDirectionError, PublishedCARE, RefusalDirection
from care_lens.evaluation import DefenceTable, GenerationStore, evaluate, generate_all
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.choose import Choice, recalibrated
from care_lens.pipeline.gradient import ADAPTIVE, adaptive_suite, gradient_suites
from care_lens.pipeline.resume import Stage
from care_lens.pipeline.rivals import (
    best_direction,
    best_published,
    difference_of_means,
    published_care,
    refusal_direction,
)
from care_lens.pipeline.saved import UNDEFENDED
from care_lens.pipeline.settings import RIVALS, RunSettings
from care_lens.repair import (
    FitRows,
    HybridFusion,
    Readers,
    assemble,
    random_control,
    writer_rows,
)
from care_lens.repair.calibrating import halves
from care_lens.repair.opening import which_open
from care_lens.repair.rows import MODALITIES, rows_beside

log = logging.getLogger(__name__)


RANDOM, SHUFFLED = "control: random writer", "control: shuffled labels"


@dataclass(frozen=True)
class Proof:
    """What step 4 measured.

    Attributes:
        table: defences by channels; its settings name the defences that could not be made ("left_out").
        random: the random-writer control, one row a draw, on the seen attack channels.
        adaptive: the gradient attack that sees the repair, on the repair and on the undefended model; None if there is none.
    """

    table: DefenceTable
    random: DefenceTable
    adaptive: DefenceTable | None

    @property
    def opened(self) -> Mapping[str, float]:
        """Share of benign test prompts for which a gate opens: value, ci_low, ci_high, n."""
        return self.table.settings["opened"]

    @property
    def tuned(self) -> Mapping[str, Mapping[str, object]]:
        """Settings of the rivals, chosen on validation, and what they reached there."""
        return self.table.settings.get("tuned", {})

    @property
    def left_out(self) -> Mapping[str, str]:
        """Defences that could not be made, and why."""
        return self.table.settings.get("left_out", {})


def search_store(directory: Path, study: Study) -> GenerationStore:
    """Where answers of candidates are kept, on validation; those of the test split are apart.

    Args:
        directory: of the run.
        study: some twelve candidates are asked its validation split.
    """
    return GenerationStore.in_folder(
        directory, "search", expected=12 * sum(map(len, study.suites["validation"].values()))
    )


def random_writers(choice: Choice, rows: FitRows, settings: RunSettings) -> dict[str, HybridFusion]:
    """The chosen repair with random writers of equal rank and edit norm, several draws; norms are matched at the tokens each writer edits."""
    met = writer_rows(choice.repair, rows)
    draws = {}
    for seed in range(settings.random_seeds):
        name = RANDOM if seed == 0 else f"{RANDOM} {seed}"
        draws[name] = replace(random_control(choice.repair, met, seed=settings.seed + seed), name=name)
    return draws


def shuffled_control(
    lvlm: HookedLVLM, study: Study, choice: Choice, rows: FitRows, settings: RunSettings
) -> HybridFusion:
    """The chosen plan with readers fitted on shuffled labels, its gate calibrated as the repair's."""
    comparing, calibrating = halves(study.benign("calibration"), seed=settings.seed)
    held = rows_beside(
        rows, lvlm, comparing, tokens=settings.answer_tokens, batch_size=settings.batch_size, progress=False
    )
    shuffled = assemble(
        Readers(rows, shuffle_seed=settings.seed).fit(choice.plan, held),
        rows,
        choice.plan,
        choice.writer_site,
        alpha=choice.alpha,
        name=SHUFFLED,
        provenance={"control": "readers fitted on shuffled labels, gate recalibrated"},
    )
    return recalibrated(lvlm, shuffled, calibrating, settings, epsilon=choice.plan.epsilon)


def opening_rate(
    lvlm: HookedLVLM, study: Study, repair: HybridFusion, settings: RunSettings, *, store: GenerationStore
) -> dict[str, float]:
    """Share of benign test prompts for which a gate opens and something is edited, with an interval by item: what the nominal bound came to.

    What was seen while the undefended model answered them is taken; a run that goes on looks again at those answers in the same way
    (`care_lens.repair.opening`). A score above the threshold where there is nothing to edit does not count.

    Args:
        lvlm: the model.
        study: its benign test prompts are read.
        repair: a gated repair.
        settings: of the run.
        store: has the undefended answers to them; prompts without one are left out.
    """
    benign = [replace(e, channel=c) for c, some in study.channels("test", harmful=False).items() for e in some]
    known = store.opened_for(repair, benign)
    if any(one is None for one in known):
        answers = generate_all(
            lvlm,
            benign,
            store=store,
            defence_name=UNDEFENDED,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=False,
        )
        there = [i for i, answer in enumerate(answers) if answer.token_ids]
        known = [None] * len(benign)
        for start in range(0, len(there), settings.batch_size):
            batch = there[start : start + settings.batch_size]
            inputs = lvlm.prepare([benign[i] for i in batch])
            (found,) = which_open([repair], lvlm, inputs, [answers[i].token_ids for i in batch])
            for i, one in zip(batch, found.tolist(), strict=True):
                known[i] = one
    told = [(float(one), e.group) for one, e in zip(known, benign, strict=True) if one is not None]
    opened, groups = np.array([one for one, _ in told]), [group for _, group in told]
    ci = cluster_bootstrap(opened, groups, n_boot=settings.n_boot, seed=settings.seed)
    return {"value": ci.estimate, "ci_low": ci.low, "ci_high": ci.high, "n": len(told)}


def kept_direction(lvlm: HookedLVLM, study: Study, settings: RunSettings, stage: Stage) -> RefusalDirection | str:
    """The refusal direction, or why there is none; fitted once in a run."""
    name, absent = "refusal_direction", "no_refusal_direction"
    if not (stage.directory / f"{absent}.json").exists():
        try:
            return stage.defence(name, lambda: refusal_direction(lvlm, study, settings), load=RefusalDirection.load)
        except NoRefusalDirectionError as error:
            why = str(error)
            return stage.record(absent, lambda: why)
    return stage.record(absent, str)


def kept_published(lvlm: HookedLVLM, study: Study, settings: RunSettings, stage: Stage) -> PublishedCARE:
    """Published CARE on every block; fitted once in a run."""
    modalities: list[Modality] = [m for m in MODALITIES if study.malicious("fit", m)]
    return stage.defence(
        "published_care", lambda: published_care(lvlm, study, settings, modalities), load=PublishedCARE.load
    )


def kept_shuffled(
    lvlm: HookedLVLM, study: Study, choice: Choice, rows: FitRows, settings: RunSettings, stage: Stage
) -> HybridFusion:
    """The control of shuffled labels for the chosen repair; fitted once in a run."""
    return stage.defence(
        f"shuffled.{repair_fingerprint(choice.repair)[:8]}",
        lambda: shuffled_control(lvlm, study, choice, rows, settings),
        load=HybridFusion.load,
    )


def prove(
    lvlm: HookedLVLM,
    study: Study,
    choice: Choice,
    rows: FitRows,
    settings: RunSettings,
    stage: Stage,
) -> Proof:
    """Run every defence, its controls and baselines on every channel of the test split.

    Rivals are tuned on validation here; of the test split only answers are taken. Answers, attacks, what is fitted here and the tables
    resume; of a table that is not finished the intervals and the fidelity are computed again.

    Args:
        lvlm: the model.
        study: its example sets.
        choice: the repair that won on validation.
        rows: activations of the fit split.
        settings: of the run.
        stage: where answers and tables are kept.
    """
    # Undefended, the repair, two controls, three rivals.
    store = GenerationStore.in_folder(stage.directory, expected=7 * sum(map(len, study.suites["test"].values())))
    searched = search_store(stage.directory, study)
    key = repair_fingerprint(choice.repair)[:8]

    def table(
        suites: Mapping[str, Sequence[Example]], defences: Mapping[str, Repair | None], *, fidelity: bool | int
    ) -> DefenceTable:
        return evaluate(
            lvlm,
            suites,
            defences,
            judge=study.judge,
            store=store,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
            fidelity=fidelity,
            n_boot=settings.n_boot,
            seed=settings.seed,
            progress=False,
        )

    draws = random_writers(choice, rows, settings)

    def everything() -> DefenceTable:
        left_out: dict[str, str] = {}
        defences: dict[str, Repair | None] = {UNDEFENDED: None}
        tuned: list[tuple[Repair, dict[str, object]]] = []
        left_out |= {
            rival: "the settings of this run leave it out, as smaller sizes do"
            for rival in RIVALS
            if rival not in settings.rivals
        }
        if "refusal direction" in settings.rivals:
            direction = kept_direction(lvlm, study, settings, stage)
            if isinstance(direction, str):
                left_out["refusal direction"] = direction
            else:
                tuned.append(best_direction(lvlm, study, direction, settings, rows.modalities, store=searched))
        if "difference of means" in settings.rivals:
            tuned.append(difference_of_means(lvlm, study, rows, settings, store=searched))
        if "published CARE" in settings.rivals:
            published = kept_published(lvlm, study, settings, stage)
            tuned.append(best_published(lvlm, study, published, settings, rows.modalities, store=searched))
        shuffled = kept_shuffled(lvlm, study, choice, rows, settings, stage)
        for defence in (*(rival for rival, _ in tuned), choice.repair, draws[RANDOM], shuffled):
            defences[defence.name] = defence
        suites: dict[str, Sequence[Example]] = {c: list(e) for c, e in study.suites["test"].items()}
        found = table(
            {**suites, **gradient_suites(lvlm, study, settings, directory=stage.directory)},
            defences,
            fidelity=settings.fidelity,
        )
        opened = stage.record(
            f"opened.{key}",
            lambda: opening_rate(lvlm, study, choice.repair, settings, store=store),
        )
        about = {rival.name: chosen for rival, chosen in tuned}
        return replace(found, settings={**found.settings, "left_out": left_out, "opened": opened, "tuned": about})

    def several_draws() -> DefenceTable:
        seen = {c: list(study.suites["test"][c]) for m in rows.modalities for c in study.seen[m]}
        return table(seen, draws, fidelity=False)

    def attack_repair() -> DefenceTable:
        found = adaptive_suite(lvlm, study, choice.repair, settings, directory=stage.directory, store=searched)
        return table({ADAPTIVE: found}, {UNDEFENDED: None, choice.repair.name: choice.repair}, fidelity=False)

    return Proof(
        table=stage.result(DefenceTable, f"defences.{key}", everything),
        random=stage.result(DefenceTable, f"random.{key}", several_draws),
        adaptive=stage.result(DefenceTable, f"adaptive.{key}", attack_repair)
        if study.gradient and settings.pgd_examples
        else None,
    )
