"""Step 3: the settings of a run, put into the calls of `care_lens.evaluation` and `care_lens.repair` that choose and calibrate.

Everything is chosen there (`care_lens.evaluation.tune`).
"""

from collections.abc import Sequence

from care_lens.core.examples import Example
from care_lens.core.outcome import Judge, Repair, Verdict
from care_lens.core.renames import moved
from care_lens.data.study import Study
from care_lens.evaluation import answering as _answering
from care_lens.evaluation.store import GenerationStore
from care_lens.evaluation.tuning import Choice, NoCandidateError, tune
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.placement import Placement, reader_layers
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import calibrating as _calibrating
from care_lens.repair import learning as _learning
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.rows import FitRows

__all__ = [
    "Choice",
    "NoCandidateError",
    "answer_verdicts",
    "choose",
    "plans",
    "recalibrated",
]

__getattr__ = moved(
    __name__,
    {
        "Fitted": "care_lens.repair.FittedReaders",
        "NoCandidate": "care_lens.evaluation.NoCandidateError",
        "offline": "care_lens.repair.captured_scores",
        "ReaderPlan": "care_lens.repair.ReaderPlan",
        "Readers": "care_lens.repair.Readers",
        "reader_plans": "care_lens.repair.reader_plans",
        "assemble": "care_lens.repair.assemble",
        "halves": "care_lens.repair.halves",
        "share": "care_lens.evaluation.share",
    },
)


def plans(layers: Sequence[int], settings: RunSettings) -> list[_learning.ReaderPlan]:
    """`care_lens.repair.reader_plans` with the settings of a run."""
    return _learning.reader_plans(
        layers,
        answer_tokens=settings.answer_tokens,
        ranks=settings.reader_ranks,
        epsilons=settings.epsilons,
        classifier=settings.reader_classifier,
        depths=settings.reader_depths,
    )


def answer_verdicts(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    repair: Repair | None,
    settings: RunSettings,
    judge: Judge,
    *,
    store: GenerationStore | None = None,
) -> list[Verdict]:
    """`care_lens.evaluation.answer_verdicts` with the settings of a run."""
    return _answering.answer_verdicts(
        lvlm,
        examples,
        repair,
        judge,
        store=store,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )


def recalibrated(
    lvlm: HookedLVLM, repair: HybridFusion, benign: Sequence[Example], settings: RunSettings, *, epsilon: float
) -> HybridFusion:
    """`care_lens.repair.recalibrated` with the settings of a run."""
    return _calibrating.recalibrated(
        lvlm,
        repair,
        benign,
        epsilon=epsilon,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )


def choose(
    lvlm: HookedLVLM,
    study: Study,
    rows: FitRows,
    settings: RunSettings,
    *,
    placement: Placement | None = None,
    store: GenerationStore | None = None,
    progress: bool = True,
) -> Choice:
    """`care_lens.evaluation.tune` with the settings of a run.

    Args:
        lvlm: The model.
        study: Its calibration and validation splits are used.
        rows: Of the fit split.
        settings: Of the run.
        placement: After which layers readers are tried; None: all but the last.
        store: Where the candidates' answers are kept, so that a stopped choice goes on.
        progress: Whether to show progress bars.

    Raises:
        NoCandidateError: If no plan could be calibrated, or none keeps benign accuracy.
    """
    return tune(
        lvlm,
        study,
        rows,
        layers=placement or reader_layers({}, lvlm.n_layers(), score=settings.carrier_score),
        answer_tokens=settings.answer_tokens,
        ranks=settings.reader_ranks,
        classifier=settings.reader_classifier,
        depths=settings.reader_depths,
        epsilons=settings.epsilons,
        alphas=settings.alphas,
        candidates=settings.candidates,
        benign_loss=settings.benign_loss,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        seed=settings.seed,
        store=store,
        progress=progress,
    )
