"""Step 4: defences by channels on the test split, which nothing before has read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from care_lens.attacks import pgd, random_noise
from care_lens.baselines import NoRefusalDirection, RefusalDirection
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair, Verdict
from care_lens.core.site import Site
from care_lens.data.study import Study
from care_lens.evaluation import DefenceTable, GenerationStore, evaluate
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.choose import Choice, Readers, answer_verdicts, assemble, recalibrated, share
from care_lens.pipeline.learn import FitRows, residual_sites, token_rows
from care_lens.pipeline.resume import Stage
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import ConformalGate, HybridFusion, random_control

log = logging.getLogger(__name__)

NONE = "none"
#: Over how many benign standard deviations of the score the attacker's copy of a gate opens.
ATTACK_WIDTH = 4.0
CAA = "difference of means (CAA)"
RANDOM, SHUFFLED = "control: random writer", "control: shuffled labels"
CLEAN, NOISE, PGD, ADAPTIVE = "gradient: clean", "gradient: noise", "gradient: PGD", "gradient: PGD, adaptive"


@dataclass(frozen=True)
class Proof:
    """What step 4 measured.

    Attributes:
        table: defences by channels.
        adaptive: the gradient attack that sees the repair, on the repair; None if no gradient attack was run.
        left_out: defences that could not be made, and why.
    """

    table: DefenceTable
    adaptive: DefenceTable | None
    left_out: Mapping[str, str]


def controls(
    lvlm: HookedLVLM, study: Study, choice: Choice, rows: FitRows, settings: RunSettings
) -> dict[str, HybridFusion]:
    """The chosen repair with random writers of equal rank and edit norm, and refitted on shuffled labels.

    Args:
        lvlm: the model.
        study: its calibration split sets the gate of the refitted control.
        choice: the repair that won.
        rows: of the fit split.
        settings: of the run.
    """
    met = torch.cat([rows.complied(choice.writer_site, offset) for offset in choice.plan.offsets])
    random = random_control(choice.repair, {choice.writer_site: met}, seed=settings.seed)
    benign = study.benign("calibration")
    held = token_rows(lvlm, benign, residual_sites(lvlm), tokens=settings.answer_tokens, batch_size=settings.batch_size)
    shuffled = assemble(
        Readers(rows, shuffle_seed=settings.seed).fit(choice.plan, held),
        rows,
        choice.plan,
        choice.writer_site,
        alpha=choice.alpha,
        name=SHUFFLED,
        provenance={"control": "readers fitted on shuffled labels, gate recalibrated"},
    )
    return {
        RANDOM: replace(random, name=RANDOM),
        SHUFFLED: recalibrated(lvlm, shuffled, benign, settings, epsilon=choice.plan.epsilon),
    }


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """n examples taken at even distances, so that every channel has its share."""
    return [examples[i * len(examples) // n] for i in range(min(n, len(examples)))] if n else []


def refusal_direction(lvlm: HookedLVLM, study: Study, settings: RunSettings) -> RefusalDirection:
    """The baseline of Arditi et al. as a defence: plain requests against harmless ones, selected on validation.

    Raises:
        NoRefusalDirection: if no candidate passes its filters.
    """
    return RefusalDirection.fit(
        lvlm,
        harmful=study.refused("fit")[:128],
        harmless=spread(study.benign("fit"), 128),
        harmful_validation=study.refused("validation")[:32],
        harmless_validation=spread(study.benign("validation"), 32),
        refusal_tokens=study.outcome.refuse,
        batch_size=settings.batch_size,
        progress=False,
    )


def difference_of_means(lvlm: HookedLVLM, study: Study, rows: FitRows, settings: RunSettings) -> RefusalDirection:
    """CAA: c (mean of refused - mean of complied requests) added at the input of one block, everywhere and always.

    Block and c are those with the largest sum of attacks stopped and benign prompts answered rightly on validation.

    Args:
        lvlm: the model.
        study: its validation split is used.
        rows: of the fit split; last prompt tokens.
        settings: of the run.
    """
    attacked = [e for m in rows.modalities for e in study.malicious("validation", m)]
    benign = spread(study.benign("validation"), 64)
    found: list[tuple[float, RefusalDirection]] = []
    for layer in range(1, lvlm.n_layers()):
        site = Site("language", layer - 1, "hook_resid_post")
        direction = rows.refused.at(site, 0).mean(0) - rows.complied(site, 0).mean(0)
        one = pd.DataFrame([{"layer": layer, "position": -1, "kept": True}])
        for c in (0.5, 1.0):
            steering = RefusalDirection(
                direction=direction, layer=layer, position=-1, candidates=one, coefficient=c, name=CAA
            )
            stopped = 1 - share(answer_verdicts(lvlm, attacked, steering, settings, study.judge), Verdict.COMPLIED)
            kept = share(answer_verdicts(lvlm, benign, steering, settings, study.judge), Verdict.COMPLIED)
            found.append((stopped + kept, steering))
    return max(found, key=lambda pair: pair[0])[1]


def gradient_suites(lvlm: HookedLVLM, study: Study, settings: RunSettings) -> dict[str, list[Example]]:
    """Refused requests over clean pictures, under noise of the attack's size, and under PGD against the undefended model."""
    base = list(study.gradient[: settings.pgd_examples])
    if not base:
        return {}
    return {
        CLEAN: named(base, CLEAN),
        NOISE: named(random_noise(base, epsilon=settings.pgd_epsilon, seed=settings.seed), NOISE),
        PGD: attacked(lvlm, study, settings, repair=None, channel=PGD),
    }


def named(examples: Sequence[Example], channel: str) -> list[Example]:
    """The examples as those of another channel."""
    return [replace(e, channel=channel, id=f"{e.id}/{channel}") for e in examples]


def attacked(
    lvlm: HookedLVLM, study: Study, settings: RunSettings, *, repair: Repair | None, channel: str
) -> list[Example]:
    """PGD for the opening of the compliant answer; through a defence, if one is given, for the whole answer, since a
    defence may act on any token of it."""
    base = list(study.gradient[: settings.pgd_examples])
    result = pgd(
        lvlm,
        base,
        epsilon=settings.pgd_epsilon,
        steps=settings.pgd_steps,
        target_tokens=1 if repair is None else None,
        seed=settings.seed,
        batch_size=settings.batch_size,
        repair=repair,
        progress=False,
    )
    return named(result.apply(base), channel)


def softened(repair: HybridFusion) -> HybridFusion:
    """The repair as an attacker sees it: its gates open linearly, so that the gradient tells how to close them."""
    gate = repair.corrections[0].gate
    return repair.with_gate(replace(gate, width=ATTACK_WIDTH)) if isinstance(gate, ConformalGate) else repair


def prove(
    lvlm: HookedLVLM,
    study: Study,
    choice: Choice,
    rows: FitRows,
    printed: HybridFusion,
    settings: RunSettings,
    stage: Stage,
) -> Proof:
    """Run every defence, its controls and baselines on every channel of the test split.

    Args:
        lvlm: the model.
        study: only its test split is used here, but for the fit of the baseline and the calibration of a control.
        choice: the repair that won on validation.
        rows: activations of the fit split.
        printed: the paper's printed form.
        settings: of the run.
        stage: where answers and tables are kept; generation resumes.
    """
    left_out: dict[str, str] = {}
    defences: dict[str, Repair | None] = {NONE: None}
    try:
        defences["refusal direction"] = refusal_direction(lvlm, study, settings)
    except NoRefusalDirection as error:
        left_out["refusal direction"] = str(error)
    defences[CAA] = difference_of_means(lvlm, study, rows, settings)
    defences[printed.name] = printed
    defences[choice.repair.name] = choice.repair
    defences |= controls(lvlm, study, choice, rows, settings)
    suites: dict[str, Sequence[Example]] = {c: list(e) for c, e in study.suites["test"].items()}
    suites |= gradient_suites(lvlm, study, settings)
    store = GenerationStore(stage.directory / "answers.jsonl")

    def table(
        suites: Mapping[str, Sequence[Example]], defences: Mapping[str, Repair | None], fidelity: bool
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

    main = stage.result(DefenceTable, "defences", lambda: table(suites, defences, True))
    adaptive = None
    if study.gradient and settings.pgd_examples:

        def attack_repair() -> DefenceTable:
            found = attacked(lvlm, study, settings, repair=softened(choice.repair), channel=ADAPTIVE)
            return table({ADAPTIVE: found}, {choice.repair.name: choice.repair}, False)

        adaptive = stage.result(DefenceTable, "adaptive", attack_repair)
    return Proof(main, adaptive, left_out)
