"""Parts of a run that do not need one another, made at the same time in several processes; the steps find them kept.

Each is made by the function that makes it in its step, with the same names in the run's folder, so that a run in one process and one that
was stopped in the middle of this end in the same files. What the folder does not hold (activations) comes back.
"""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from care_lens.core.forked import forked, workers
from care_lens.core.identity import repair_fingerprint
from care_lens.core.threads import one_torch_thread
from care_lens.data.study import Study
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.choose import Choice
from care_lens.pipeline.diagnose import measure_ablation, measure_pair_set
from care_lens.pipeline.gradient import LOSSES, attack, bases, first_adaptive_attack
from care_lens.pipeline.learn import capture_fit, printed_subspaces
from care_lens.pipeline.prove import kept_direction, kept_published, kept_shuffled
from care_lens.pipeline.resume import Stage
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import FitRows

log = logging.getLogger(__name__)


Jobs = Mapping[str, Callable[[], Any]]
"""What is to be made, by name."""
ROWS, PRINTED = "rows", "printed subspaces"
#: Parameters of a model of which several such jobs fit into memory beside each other, and whose operations are too short for threads.
_SMALL = 10**8


def ahead_of_choice(lvlm: HookedLVLM, study: Study, settings: RunSettings, stage: Stage, *, kept: Path) -> Jobs:
    """What does not depend on the repair, longest first: rivals' fits, effects and maps, ablation, gradient attacks on the bare model,
    activations and subspaces of the fit split (`ROWS`, `PRINTED`).

    Args:
        lvlm: the model.
        study: its example sets.
        settings: of the run.
        stage: where all is kept.
        kept: where the activations of printed subspaces are kept.
    """
    jobs: dict[str, Callable[[], Any]] = {}
    if "published CARE" in settings.rivals and not stage.has("published_care"):
        jobs["published CARE"] = partial(kept_published, lvlm, study, settings, stage)
    if "refusal direction" in settings.rivals and not stage.has("refusal_direction"):
        jobs["refusal direction"] = partial(kept_direction, lvlm, study, settings, stage)
    if not stage.has("ablation"):
        jobs["ablation"] = partial(measure_ablation, lvlm, study, settings, stage)
    names = [name for name, pairs in study.pairs.items() if len(pairs[: settings.pairs])]
    pictures = [name for name in names if any(example.images for example in study.pairs[name].safe[:1])]
    measured = {
        name: partial(measure_pair_set, lvlm, study, name, settings, stage)
        for name in names
        if not stage.has(f"effects.{name}")
    }
    for name in pictures:  # these have places in both towers
        if name in measured:
            jobs[f"effects of {name}"] = measured.pop(name)
    layers = range(lvlm.n_layers())
    jobs[PRINTED] = partial(printed_subspaces, lvlm, study, layers, settings, checkpoint=kept, progress=False)
    jobs[ROWS] = partial(capture_fit, lvlm, study, settings, progress=False)
    if base := bases(study, settings):
        for loss, tokens in LOSSES.items():
            jobs[f"gradient attack, {loss}"] = partial(
                attack, lvlm, base, settings, target_tokens=tokens, directory=stage.directory
            )
    return jobs | {f"effects of {name}": make for name, make in measured.items()}


def ahead_of_proof(
    lvlm: HookedLVLM, study: Study, choice: Choice, rows: FitRows, settings: RunSettings, stage: Stage
) -> Jobs:
    """What the proof needs of the chosen repair: gradient attacks that see it, by each loss, and the control of shuffled labels.

    The attack by the second loss is made of all requests; where the first one gets some through, `care_lens.pipeline.gradient` removes it and
    makes it of the others.

    Args:
        lvlm: the model.
        study: its example sets.
        choice: the repair that won on validation.
        rows: activations of the fit split.
        settings: of the run.
        stage: where all is kept.
    """
    jobs: dict[str, Callable[[], Any]] = {}
    key = repair_fingerprint(choice.repair)[:8]
    if (base := bases(study, settings)) and settings.restarts and not stage.has(f"adaptive.{key}"):
        for loss in LOSSES:
            jobs[f"gradient attack that sees the repair, {loss}"] = partial(
                first_adaptive_attack, lvlm, base, settings, choice.repair, loss, directory=stage.directory
            )
    if not stage.has(f"shuffled.{key}"):
        jobs["control of shuffled labels"] = partial(kept_shuffled, lvlm, study, choice, rows, settings, stage)
    return jobs


def at_once(lvlm: HookedLVLM, jobs: Jobs, stage: Stage, *, wanted: tuple[str, ...] = ()) -> dict[str, Any]:
    """Do the jobs in as many processes as work is shared between; with one process, a model that is not small, or not on a CPU, nothing:
    the steps do it.

    A job that fails is left to its step, which then says so.

    Args:
        lvlm: the model.
        jobs: what is to be made; longest first.
        stage: is told how long what they made took.
        wanted: whose results come back; they must be picklable.

    Returns:
        The results that are wanted and were made, by name.
    """
    small = sum(parameter.numel() for parameter in lvlm.hf_model.parameters()) < _SMALL
    if workers() < 2 or lvlm.device.type != "cpu" or not small:
        return {}

    def made(job: tuple[str, Callable[[], Any]]) -> tuple[Any, dict[str, float]]:
        name, make = job
        start, known = time.monotonic(), {*stage.seconds}
        found = None
        try:
            found = make()
        except Exception as error:
            log.info("%s is left to its step, since it failed: %s: %s", name, type(error).__name__, error)
        kept = {one: seconds for one, seconds in stage.seconds.items() if one not in known}
        if not kept:  # what the stage keeps it tells itself
            log.info("%s: %.1f s", name, time.monotonic() - start)
        return found if name in wanted else None, kept

    results: dict[str, Any] = {}
    with one_torch_thread():  # one job alone is done here, and its last bits are those of the number of threads
        for (name, _), (found, seconds) in zip(jobs.items(), forked(made, list(jobs.items())), strict=True):
            stage.seconds |= seconds
            if found is not None:
                results[name] = found
    return results
