"""A finished choice on disk, so that a run that is stopped later does not choose again."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from care_lens.core.cells import csv_text
from care_lens.core.errors import ArtifactError
from care_lens.core.files import load_artifact, save_artifact
from care_lens.core.identity import repair_fingerprint
from care_lens.core.results import column_types, read_frame
from care_lens.core.site import Site
from care_lens.evaluation import Choice
from care_lens.mediation import Placement
from care_lens.pipeline.resume import Stage
from care_lens.repair import HybridFusion, ReaderPlan
from care_lens.subspace import SafetySubspace

_NAME, _KIND, _SCHEMA = "choice", "choice of a run", 1


def subspace_folder(subspace: SafetySubspace) -> str:
    """What a run calls a subspace's folder: its site, its modality, and its form or the rows it was fitted to."""
    made = subspace.provenance
    return f"{subspace.site}.{subspace.modality or 'all'}.{made.get('form', made.get('rows', ''))}".replace(" ", "_")


def chosen(stage: Stage, out: Path, make: Callable[[], Choice]) -> Choice:
    """The choice that was saved, or a new one, saved at once: the repair, the subspaces it reads, then the record of both.

    Args:
        stage: of the run.
        out: its folder; the repair goes to ``repair``, subspaces to ``subspaces``.
        make: chooses.

    Raises:
        ArtifactError: if files of the choice are damaged, missing or of another run.
    """
    if (stage.directory / f"{_NAME}.json").exists():
        return _load(stage, out)
    choice = make()
    choice.repair.save(out / "repair")
    folders = [subspace_folder(subspace) for subspace in choice.subspaces]
    for folder, subspace in zip(folders, choice.subspaces, strict=True):
        subspace.save(out / "subspaces" / folder)
    tables = {"readers": choice.readers, "runs": choice.runs}
    save_artifact(
        stage.directory,
        _NAME,
        kind=_KIND,
        schema=_SCHEMA,
        data={f"{name}.csv": csv_text(frame).encode() for name, frame in tables.items()},
        content={
            "context": stage.context(_NAME),
            "plan": asdict(choice.plan),
            "writer_site": str(choice.writer_site),
            "alpha": choice.alpha,
            "placement": asdict(choice.placement),
            "repair": repair_fingerprint(choice.repair),
            "subspaces": folders,
            "columns": {name: column_types(frame) for name, frame in tables.items()},
        },
    )
    # As a resumed run has it, so that both go on from the same numbers.
    return _load(stage, out)


def _load(stage: Stage, out: Path) -> Choice:
    data, held = load_artifact(stage.directory, _NAME, kind=_KIND, schema=_SCHEMA)
    again = f"remove {stage.directory / _NAME}.json, and it is chosen again"
    if held["context"] != stage.context(_NAME):
        raise ArtifactError(f"{_NAME}.json must be of this run, got that of another; {again}")
    try:
        repair = HybridFusion.load(out / "repair")
        subspaces = tuple(SafetySubspace.load(out / "subspaces" / folder) for folder in held["subspaces"])
    except FileNotFoundError as error:
        raise ArtifactError(
            f"the repair and subspaces of {out} must be there, {error.filename} is not; {again}"
        ) from error
    if repair_fingerprint(repair) != held["repair"]:
        raise ArtifactError(
            f"{out / 'repair'} must be the repair that was chosen, got another or a damaged one; {again}"
        )
    tables = {name: read_frame(data[f"{name}.csv"], columns) for name, columns in held["columns"].items()}
    plan, placement = held["plan"], held["placement"]
    return Choice(
        repair=repair,
        plan=ReaderPlan(**{**plan, "offsets": tuple(plan["offsets"])}),
        writer_site=Site.parse(held["writer_site"]),
        alpha=held["alpha"],
        subspaces=subspaces,
        placement=Placement(tuple(placement["layers"]), placement["reason"]),
        readers=tables["readers"],
        runs=tables["runs"],
    )
