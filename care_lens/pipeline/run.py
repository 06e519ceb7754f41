"""The four steps in a row: diagnose, learn, choose, prove; then the report. A stopped run resumes in its folder."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from care_lens.core.results import package_versions
from care_lens.data.study import Study
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.choose import Choice, choose
from care_lens.pipeline.diagnose import Diagnosis, diagnose
from care_lens.pipeline.learn import capture_fit, printed_form
from care_lens.pipeline.prove import Proof, prove
from care_lens.pipeline.resume import Stage
from care_lens.pipeline.settings import RunSettings
from care_lens.subspace import SafetySubspace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Everything a run found.

    Attributes:
        study, settings: what it worked on and how.
        diagnosis, choice, proof: the steps' results.
        printed_subspaces: those of the paper's printed form.
        seconds: by step.
        provenance: model, versions, study.
    """

    study: Study
    settings: RunSettings
    diagnosis: Diagnosis
    choice: Choice
    proof: Proof
    printed_subspaces: list[SafetySubspace]
    seconds: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


def _provenance(study: Study, model: str) -> dict[str, Any]:
    return {"model": model, "study": study.name, "versions": package_versions()}


def open_stage(out: str | Path, study: Study, settings: RunSettings, *, model: str) -> Stage:
    """The folder of frames of a run; refuses one that holds a run of other settings."""
    return Stage(Path(out) / "frames", {"settings": settings.to_dict(), **_provenance(study, model)})


def printed_layers(diagnosis: Diagnosis, settings: RunSettings) -> list[int]:
    """Where the paper puts its subspaces: the layers whose MLP's ablation lowers compliance most."""
    frame = diagnosis.ablation.to_dataframe()
    mlp = pd.DataFrame(frame[(frame["component"] == "hook_mlp_out") & (frame["metric"] == "complied")])
    lowest = mlp.sort_values(by="value").head(settings.printed_layers)
    return sorted(int(layer) for layer in lowest["layer"])


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

    Args:
        lvlm: the model.
        study: example sets in four splits.
        out: folder of the run; a second call with the same settings resumes there.
        model: what to call the model in the report: a hub name and revision, or "bundled".
        settings: see `RunSettings`.
        progress: show a progress bar of the steps.

    Returns:
        All results; `care_lens.pipeline.write_report` makes the report of them.

    Raises:
        ValueError: if `out` holds a run of other settings, or a split that a step needs is empty.
        NoCandidate: if no repair keeps benign accuracy on validation.
    """
    settings = settings or RunSettings()
    study = study.limited(settings.limit) if settings.limit else study
    stage = open_stage(out, study, settings, model=model)
    seconds: dict[str, float] = {}
    bar = tqdm(total=4, desc="diagnose", disable=not progress)

    @contextmanager
    def step(name: str) -> Iterator[None]:
        bar.set_description(name)
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 1)
        bar.update()
        log.info("%s: %.1f s", name, seconds[name])

    with step("diagnose"):
        diagnosis = diagnose(lvlm, study, settings, stage)
    with step("learn"):
        rows = capture_fit(lvlm, study, settings)
        printed, printed_subspaces = printed_form(lvlm, study, printed_layers(diagnosis, settings), settings)
    with step("choose"):
        choice = choose(lvlm, study, rows, settings)
        choice.repair.save(Path(out) / "repair")
        for subspace in (*choice.subspaces, *printed_subspaces):
            form = subspace.provenance["form" if "form" in subspace.provenance else "rows"].replace(" ", "_")
            subspace.save(Path(out) / "subspaces" / f"{subspace.site}.{subspace.modality}.{form}")
        tables: dict[str, pd.DataFrame] = {
            "readers": choice.readers,
            "runs": choice.runs,
        }
        for name, frame in tables.items():
            frame.to_csv(stage.directory / f"choice.{name}.csv", index=False)
    with step("prove"):
        proof = prove(lvlm, study, choice, rows, printed, settings, stage)
    bar.close()
    return Run(study, settings, diagnosis, choice, proof, printed_subspaces, seconds, _provenance(study, model))
