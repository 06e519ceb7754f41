"""What the repair is compared with: baselines and published CARE, tuned on validation by the repair's own rule."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product

from care_lens.core.examples import Example
from care_lens.core.outcome import Repair
from care_lens.core.site import Site
from care_lens.data.study import Modality, Study
from care_lens.defences import MeanDifference, NoRefusalDirectionError, PublishedCARE, RefusalDirection
from care_lens.evaluation import GenerationStore, spread, tune_defence
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import FitRows

log = logging.getLogger(__name__)

CAA = "difference of means, all tokens"


def tuned(
    lvlm: HookedLVLM,
    study: Study,
    candidates: Sequence[Callable[[], Repair]],
    settings: RunSettings,
    modalities: Sequence[Modality],
    *,
    store: GenerationStore | None = None,
) -> tuple[Repair, dict[str, float | int]]:
    """`care_lens.evaluation.tune_defence` with the settings of a run, on the validation split of a study.

    Args:
        lvlm: the model.
        study: its validation split is used.
        candidates: makers of repairs.
        settings: of the run.
        modalities: whose seen attack channels count.
        store: where the candidates' answers are kept, so that a stopped search goes on.

    Returns:
        The candidate, and what it reached on validation: its attack success, benign answers that were right without and with it.
    """
    return tune_defence(
        lvlm,
        candidates,
        attacked=[e for m in modalities for e in study.malicious("validation", m)],
        benign=study.benign("validation"),
        judge=study.judge,
        benign_loss=settings.benign_loss,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        store=store,
        progress=False,
    )


def published_care(
    lvlm: HookedLVLM, study: Study, settings: RunSettings, modalities: Sequence[Modality], *, batch_size: int = 32
) -> PublishedCARE:
    """Published CARE fitted on every block at the largest of its ranks, its faults included; `best_published` tunes it."""
    malicious = [e for m in modalities for e in study.malicious("fit", m)]
    return PublishedCARE.fit(
        lvlm,
        benign=spread(study.benign("fit"), 2 * len(malicious)),
        malicious=malicious,
        refusals=[study.refusal],
        layers=range(lvlm.n_layers()),
        rank=max(_published_ranks(study, settings, modalities)),
        batch_size=min(batch_size, settings.batch_size),
        progress=False,
    )


def best_published(
    lvlm: HookedLVLM,
    study: Study,
    fitted: PublishedCARE,
    settings: RunSettings,
    modalities: Sequence[Modality],
    *,
    store: GenerationStore | None = None,
) -> tuple[PublishedCARE, dict[str, object]]:
    """Published CARE on the best window of neighbouring blocks, at the best of its ranks and strengths.

    Args:
        lvlm: the model.
        study: its validation split is used.
        fitted: from `published_care`.
        settings: of the run.
        modalities: whose seen attack channels count.
        store: where the candidates' answers are kept.
    """
    n = min(settings.printed_layers, lvlm.n_layers())
    windows = [range(i, i + n) for i in range(lvlm.n_layers() - n + 1)]
    makers = [
        lambda w=window, k=rank, a=alpha: fitted.restricted(layers=list(w), rank=k, alpha_visual=a, alpha_textual=a)
        for window, rank, alpha in product(
            windows, _published_ranks(study, settings, modalities), settings.printed_alphas
        )
    ]
    best, validation = tuned(lvlm, study, makers, settings, modalities, store=store)
    assert isinstance(best, PublishedCARE)
    (rank,) = {of.columns.shape[1] for side in (best.visual, best.textual) for of in side.values()}
    return best, {"layers": best.layers, "rank": rank, "alpha": best.alpha_textual, "validation": validation}


def _published_ranks(study: Study, settings: RunSettings, modalities: Sequence[Modality]) -> list[int]:
    """The rank of the settings and four times it, as far as the examples of each modality determine directions."""
    least = min(len(study.malicious("fit", m)) for m in modalities)
    return sorted({settings.printed_rank, max(settings.printed_rank, min(4 * settings.printed_rank, least - 1))})


def difference_of_means(
    lvlm: HookedLVLM, study: Study, rows: FitRows, settings: RunSettings, *, store: GenerationStore | None = None
) -> tuple[MeanDifference, dict[str, object]]:
    """c (mean of refused - mean of complied requests) added at the input of one block, at all tokens and always.

    After CAA (contrastive activation addition), which adds after the prompt only.

    Args:
        lvlm: the model.
        study: its validation split is used.
        rows: of the fit split; last prompt tokens.
        settings: of the run.
        store: where the candidates' answers are kept.
    """

    def make(layer: int, c: float) -> MeanDifference:
        site = Site("language", layer - 1, "hook_resid_post")
        return MeanDifference.of_rows(rows.refused.at(site, 0), rows.complied(site, 0), site=site, alpha=c, name=CAA)

    makers = [
        lambda layer=layer, c=c: make(layer, c) for layer, c in product(range(1, lvlm.n_layers()), settings.steering)
    ]
    best, validation = tuned(lvlm, study, makers, settings, rows.modalities, store=store)
    assert isinstance(best, MeanDifference) and best.site.layer is not None
    return best, {"layer": best.site.layer + 1, "coefficient": best.alpha, "validation": validation}


def refusal_direction(lvlm: HookedLVLM, study: Study, settings: RunSettings) -> RefusalDirection:
    """The baseline of Arditi et al. as a defence: plain requests against harmless ones, selected on validation.

    The harmless ones are of all benign channels; where no candidate passes the filters so, of the study's counterpart of the plain
    requests, which is nearer to the ordinary instructions that the paper takes. Then a column "harmless" of its candidates names it.

    Raises:
        NoRefusalDirectionError: if no candidate passes its filters either way.
    """

    def fit(harmless: Mapping[str, Sequence[Example]]) -> RefusalDirection:
        return RefusalDirection.fit(
            lvlm,
            harmful=study.refused("fit")[:128],
            harmless=spread(harmless["fit"], 128),
            harmful_validation=study.refused("validation")[:32],
            harmless_validation=spread(harmless["validation"], 32),
            refusal_tokens=study.outcome.refuse,
            batch_size=settings.batch_size,
            progress=False,
        )

    try:
        return fit({split: study.benign(split) for split in ("fit", "validation")})
    except NoRefusalDirectionError as error:
        alike = {split: study.suites[split].get(study.counterpart or "", ()) for split in ("fit", "validation")}
        if not all(alike.values()):
            raise
        log.warning("refusal direction: %s; it is fitted against %r alone", error, study.counterpart)
        found = fit(alike)
        return replace(found, candidates=found.candidates.assign(harmless=study.counterpart))


def best_direction(
    lvlm: HookedLVLM,
    study: Study,
    direction: RefusalDirection,
    settings: RunSettings,
    modalities: Sequence[Modality],
    *,
    store: GenerationStore | None = None,
) -> tuple[RefusalDirection, dict[str, object]]:
    """The refusal direction at the best of the strengths, as `tuned` has it; the note says what it was fitted against."""
    makers = [lambda c=c: replace(direction, coefficient=c) for c in settings.steering]
    best, validation = tuned(lvlm, study, makers, settings, modalities, store=store)
    assert isinstance(best, RefusalDirection)
    against = best.candidates.get("harmless")
    return best, {
        "layer": best.layer,
        "coefficient": best.coefficient,
        "harmless": str(against.iloc[0]) if against is not None else "all benign channels",
        "validation": validation,
    }
