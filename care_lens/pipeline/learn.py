"""Step 2: the settings of a run, put into the calls of `care_lens.repair` that capture rows and fit subspaces."""

from collections.abc import Sequence
from pathlib import Path

from care_lens.core.renames import moved
from care_lens.data.study import Modality, Study
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import printed as _printed
from care_lens.repair import rows as _rows
from care_lens.subspace import SafetySubspace

__all__ = ["capture_fit", "printed_subspaces"]

__getattr__ = moved(
    __name__,
    {"MODALITIES": "care_lens.repair.rows.MODALITIES", "SPAN": "care_lens.repair.printed.SPAN"}
    | {
        name: f"care_lens.repair.{name}"
        for name in (
            "FitRows",
            "TokenRows",
            "fit_reader_subspace",
            "printed_form",
            "reader_of",
            "refusal_writer",
            "residual_sites",
            "study_rows",
            "token_rows",
        )
    },
)


def capture_fit(lvlm: HookedLVLM, study: Study, settings: RunSettings, *, progress: bool = True) -> _rows.FitRows:
    """`care_lens.repair.study_rows` with the settings of a run."""
    return _rows.study_rows(
        lvlm, study, tokens=settings.answer_tokens, batch_size=settings.batch_size, progress=progress
    )


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
