"""The method in one call: rows, readers, writers, and a calibrated gate, for a plan that is given.

::

    repair = learn_repair(lvlm, study, ReaderPlan(layer=2, offsets=(0, 5)), alpha=1.5, max_new_tokens=14)
    with repair.on(lvlm):
        lvlm.generate(inputs)

`care_lens.evaluation.tune` finds the plan on a validation split.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from care_lens.core.examples import Example
from care_lens.core.site import Site, SiteLike
from care_lens.data.study import Study
from care_lens.lvlm import HookedLVLM
from care_lens.repair.calibrating import halves, recalibrated
from care_lens.repair.errors import RepairError
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.learning import ReaderPlan, Readers, assemble
from care_lens.repair.refusing import Answers
from care_lens.repair.rows import FitRows, study_rows, token_rows
from care_lens.subspace import ModelIdentity


def learn_repair(
    lvlm: HookedLVLM,
    source: Study | FitRows,
    plan: ReaderPlan,
    *,
    calibration: Sequence[Example] | None = None,
    site: SiteLike | None = None,
    alpha: float = 1.0,
    answers: Answers = "rearmed",
    answer_tokens: int = 6,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    seed: int = 0,
    shuffle_seed: int | None = None,
    name: str = "care_lens",
    provenance: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> HybridFusion:
    """Learn the readers and writers of a plan and calibrate their gate.

    Args:
        lvlm: The model.
        source: A study, whose fit split is learned from and whose calibration split sets the gate; or rows of your own examples
            (`fit_rows`).
        plan: Which readers, and how many benign prompts the gate may touch.
        calibration: Benign prompts that nothing is learned from, 1/epsilon - 1 or more of them in the half of the items that sets the
            gate; None: those of the study.
        site: Where to write, at or above the readers; None: where they look.
        alpha: Strength of the writers; 1 moves a token to where the model stands before a refusal, along one line.
        answers: "rearmed", or "held" as versions before had it; see :func:`~care_lens.repair.assemble`.
        answer_tokens: Of a study's answers so many tokens are read: what a reader of the answer must not react to is learned from all of
            them.
        batch_size: Examples at a time.
        max_new_tokens: As many as the repaired model will generate: the gate is calibrated on benign answers of that length.
        seed: Of the cut of the calibration prompts in two halves by item. `tune` compares plans at thresholds of the one, and the other
            sets the gate; so it is done here, and both make the same repair of one plan.
        shuffle_seed: Deal the rows to the classes at random first: the control whose readers have nothing to find.
        name: Row of a defence table.
        provenance: What it came from, JSON-able; the plan is added.
        progress: Whether to show progress bars.

    Returns:
        The repair, which knows the model it was made for.

    Raises:
        RepairError: If rows are given without calibration prompts, or the plan asks for what was not captured.
        TooFewCalibrationError: If the calibration prompts are too few for the plan's epsilon.
    """
    if isinstance(source, Study):
        rows = study_rows(
            lvlm, source, tokens=max(answer_tokens, *plan.offsets), batch_size=batch_size, progress=progress
        )
        benign = source.benign("calibration") if calibration is None else list(calibration)
        about = {"study": source.name}
    else:
        if calibration is None:
            raise RepairError("calibration must be given with rows, got None; give benign prompts of other items")
        rows, benign, about = source, list(calibration), {}
    comparing, calibrating = halves(benign, seed=seed)
    readers_at = [Site("language", layer, "hook_resid_post") for layer in plan.layers]
    held = token_rows(lvlm, comparing, readers_at, tokens=rows.tokens, batch_size=batch_size, progress=progress)
    repair = assemble(
        Readers(rows, shuffle_seed=shuffle_seed).fit(plan, held),
        rows,
        plan,
        None if site is None else Site.parse(site),
        alpha=alpha,
        answers=answers,
        name=name,
        provenance={**about, "plan": str(plan), **(provenance or {})},
    )
    repair = recalibrated(
        lvlm,
        repair,
        calibrating,
        epsilon=plan.epsilon,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    return replace(repair, model=ModelIdentity.from_model(lvlm.hf_model))
