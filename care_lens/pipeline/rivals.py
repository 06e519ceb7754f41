"""What the repair is compared with: baselines and the paper's printed form, tuned on validation by the repair's own rule."""

from collections.abc import Callable, Sequence
from itertools import product

from care_lens.core.outcome import Repair
from care_lens.core.site import Site
from care_lens.data.study import Modality, Study
from care_lens.defences import MeanDifference, RefusalDirection
from care_lens.evaluation import GenerationStore, spread, tune_defence
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import FitRows, HybridFusion, printed_form
from care_lens.subspace import SafetySubspace

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
    )


def best_printed(
    lvlm: HookedLVLM,
    study: Study,
    subspaces: dict[tuple[Modality, int], SafetySubspace],
    settings: RunSettings,
    modalities: Sequence[Modality],
    *,
    store: GenerationStore | None = None,
) -> tuple[HybridFusion, dict[str, object]]:
    """CARE as printed on the best window of neighbouring layers, at the best of its strengths."""
    n = min(settings.printed_layers, lvlm.n_layers())
    windows = [range(i, i + n) for i in range(lvlm.n_layers() - n + 1)]
    makers = [
        lambda w=window, a=alpha: printed_form(subspaces, list(w), alpha=a)
        for window, alpha in product(windows, settings.printed_alphas)
    ]
    best, validation = tuned(lvlm, study, makers, settings, modalities, store=store)
    assert isinstance(best, HybridFusion)
    return best, {**best.provenance, "validation": validation}


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
