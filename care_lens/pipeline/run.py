"""The four steps in a row: diagnose, learn, choose, prove; then the report. A stopped run resumes in its folder."""

import datetime
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from care_lens.core.files import swept
from care_lens.core.identity import content_digest, model_fingerprint
from care_lens.core.progress import Steps
from care_lens.core.results import package_versions
from care_lens.data.study import Study
from care_lens.evaluation import judge_name
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.placement import reader_layers
from care_lens.pipeline.ahead import PRINTED, ROWS, ahead_of_choice, ahead_of_proof, at_once
from care_lens.pipeline.choose import Choice, choose
from care_lens.pipeline.chosen import chosen, subspace_folder
from care_lens.pipeline.diagnose import Diagnosis, diagnose
from care_lens.pipeline.generating import generating
from care_lens.pipeline.learn import capture_fit, printed_subspaces
from care_lens.pipeline.needs import require_ready
from care_lens.pipeline.prove import Proof, prove, search_store
from care_lens.pipeline.resume import Stage
from care_lens.pipeline.settings import RunSettings
from care_lens.subspace import SafetySubspace

log = logging.getLogger(__name__)

#: Where a run says when each step ended and how long it took; the one file that differs between two runs of the same.
TIMES = "times.jsonl"
#: Folders of a run beside that of the frames.
_FOLDERS = ("repair", "subspaces", "figures")
#: What a study says of itself, which no figure depends on.
_TEXT = ("about", "meanings")


@dataclass(frozen=True)
class Run:
    """Everything a run found.

    Attributes:
        study, settings: what it worked on and how.
        diagnosis, choice, proof: the steps' results.
        printed_subspaces: those of the paper's printed form, at every layer.
        seconds: by step, of the last start; also in the folder's ``times.jsonl``, with those of earlier starts.
        provenance: model, weights, study, data, judge, versions.
    """

    study: Study
    settings: RunSettings
    diagnosis: Diagnosis
    choice: Choice
    proof: Proof
    printed_subspaces: list[SafetySubspace]
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def study_digest(study: Study) -> str:
    """A digest of everything a run takes from a study: every field of its examples, in their splits, channels and pairs, the outcomes
    with their settings and code, and the judge by its code or stated version."""
    return content_digest({part.name: getattr(study, part.name) for part in fields(study) if part.name not in _TEXT})


def _provenance(lvlm: HookedLVLM, study: Study, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "weights": model_fingerprint(lvlm.hf_model),
        "study": study.name,
        "data": study_digest(study),
        "judge": judge_name(study.judge),
        "acting": lvlm.acting(),
        "versions": package_versions(),
    }


def open_stage(lvlm: HookedLVLM, out: str | Path, study: Study, settings: RunSettings, *, model: str) -> Stage:
    """The folder of frames of a run; refuses one that holds a run of other settings, weights or data."""
    return Stage(Path(out) / "frames", {"settings": settings.to_dict(), **_provenance(lvlm, study, model)})


def _note_time(out: Path, step: str, seconds: float) -> None:
    ended = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with (out / TIMES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "seconds": seconds, "ended": ended}) + "\n")


def _sweep(out: Path) -> None:
    """Remove what a kill has left of files that were being written."""
    swept(out, inside=False)
    for folder in _FOLDERS:
        swept(out / folder)


def run(
    lvlm: HookedLVLM,
    study: Study,
    out: str | Path,
    *,
    model: str,
    settings: RunSettings | None = None,
    progress: bool = True,
) -> Run:
    """Diagnose, learn, choose on validation, prove on test; results are saved as they come.

    A run that is stopped at any moment and started again ends in the same files, byte for byte, as one that was left alone, but for
    ``times.jsonl``. What is done again then is short beside what is kept: see the docs page on the command line.

    Args:
        lvlm: the model.
        study: example sets in four splits.
        out: folder of the run; a second call with the same settings resumes there.
        model: what to call the model in the report: a hub name and revision, or "bundled".
        settings: see `RunSettings`.
        progress: show progress bars: of the steps, and of what learning and choosing do.

    Returns:
        All results; `care_lens.pipeline.write_report` makes the report of them.

    Raises:
        NeedsError: if the study is too small for the settings, with the numbers needed; nothing has run then. It is a ValueError.
        ValueError: if the study lacks what a step needs.
        ArtifactError: if `out` holds a run of other settings, weights or data, or files of it are damaged.
        InUseError: if another process runs in `out`.
        NoCandidateError: if no repair keeps benign accuracy on validation.
    """
    out, settings = Path(out), settings or RunSettings()
    study = settings.asked(settings.part(study))
    settings = require_ready(study, settings)
    seconds: dict[str, float] = {}
    bar = Steps(
        total=4,
        desc="diagnose",
        disable=not progress,
        resume=f"start it again with {str(out)!r} as its folder and the same settings: it goes on there",
    )

    @contextmanager
    def step(name: str) -> Iterator[None]:
        bar.set_description(name)
        log.info("%s begins", name)
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 1)
        _note_time(out, name, seconds[name])
        bar.update()
        log.info("%s: %.1f s", name, seconds[name])

    with open_stage(lvlm, out, study, settings, model=model) as stage, bar, generating(lvlm, settings.generation):
        _sweep(out)
        provenance = _provenance(lvlm, study, model)
        kept = stage.directory / "learn"
        with step("diagnose"):
            early = at_once(
                lvlm,
                ahead_of_choice(lvlm, study, settings, stage, kept=kept),
                stage,
                wanted=(ROWS, PRINTED),
            )
            diagnosis = diagnose(lvlm, study, settings, stage)
        with step("learn"):
            rows = early.get(ROWS) or capture_fit(lvlm, study, settings, progress=progress)
            printed = early.get(PRINTED) or printed_subspaces(
                lvlm, study, range(lvlm.n_layers()), settings, checkpoint=kept, progress=progress
            )
            for subspace in printed.values():
                subspace.save(out / "subspaces" / subspace_folder(subspace))
        with step("choose"):
            placement = reader_layers(diagnosis.places, lvlm.n_layers(), score=settings.carrier_score)
            store = search_store(stage.directory, study)
            choice = chosen(
                stage,
                out,
                lambda: choose(lvlm, study, rows, settings, placement=placement, store=store, progress=progress),
            )
        with step("prove"):
            at_once(lvlm, ahead_of_proof(lvlm, study, choice, rows, settings, stage), stage)
            proof = prove(lvlm, study, choice, rows, settings, stage)
    return Run(study, settings, diagnosis, choice, proof, list(printed.values()), seconds, provenance)
