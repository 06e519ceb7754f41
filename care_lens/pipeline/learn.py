"""Step 2: the settings of a run, put into the calls of `care_lens.repair` that capture rows and fit subspaces.

Everything that is learned is learned there; names of earlier versions can be imported from here as before.
"""

from collections.abc import Sequence
from pathlib import Path

from care_lens.data.study import Modality, Study
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import printed as _printed
from care_lens.repair.learning import fit_reader_subspace, reader_of
from care_lens.repair.printed import SPAN, printed_form
from care_lens.repair.refusing import refusal_writer
from care_lens.repair.rows import MODALITIES, FitRows, TokenRows, residual_sites, study_rows, token_rows
from care_lens.subspace import SafetySubspace

__all__ = [
    "MODALITIES",
    "SPAN",
    "FitRows",
    "TokenRows",
    "capture_fit",
    "fit_reader_subspace",
    "printed_form",
    "printed_subspaces",
    "reader_of",
    "refusal_writer",
    "residual_sites",
    "token_rows",
]


def capture_fit(lvlm: HookedLVLM, study: Study, settings: RunSettings, *, progress: bool = True) -> FitRows:
    """`care_lens.repair.study_rows` with the settings of a run."""
    return study_rows(lvlm, study, tokens=settings.answer_tokens, batch_size=settings.batch_size, progress=progress)


def printed_subspaces(
    lvlm: HookedLVLM,
    study: Study,
    layers: Sequence[int],
    settings: RunSettings,
    *,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> dict[tuple[Modality, int], SafetySubspace]:
    """`care_lens.repair.printed_subspaces` with the settings of a run."""
    return _printed.printed_subspaces(
        lvlm,
        study,
        layers,
        rank=settings.printed_rank,
        batch_size=settings.batch_size,
        checkpoint=checkpoint,
        progress=progress,
    )
