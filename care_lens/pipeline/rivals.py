"""What the repair is compared with: baselines and the paper's printed form, tuned on validation by the repair's own rule."""

from collections.abc import Callable, Sequence
from itertools import product

import pandas as pd

from care_lens.baselines import RefusalDirection
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair, Verdict
from care_lens.core.site import Site
from care_lens.data.study import Modality, Study
from care_lens.evaluation import GenerationStore
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.choose import answer_verdicts, share
from care_lens.pipeline.learn import FitRows, printed_form
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import HybridFusion
from care_lens.subspace import SafetySubspace

CAA = "difference of means, all tokens"
#: Benign prompts on which a rival is screened before all of validation is asked, and the loss of right answers that rules it out.
SCREENED, HOPELESS = 48, 0.10


def spread(examples: Sequence[Example], n: int) -> list[Example]:
    """n examples taken at even distances, so that every channel has its share."""
    n = min(n, len(examples))
    return [examples[i * len(examples) // n] for i in range(n)]


def tuned(
    lvlm: HookedLVLM,
    study: Study,
    candidates: Sequence[Callable[[], Repair]],
    settings: RunSettings,
    modalities: Sequence[Modality],
    *,
    store: GenerationStore | None = None,
) -> tuple[Repair, dict[str, float]]:
    """The candidate with the lowest attack success among those that keep benign accuracy, on validation.

    The rule of the repair itself (`settings.benign_loss`). Where no candidate keeps it, the one with the largest sum of attacks stopped and benign
    prompts answered rightly.

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
    attacked = [e for m in modalities for e in study.malicious("validation", m)]
    benign = study.benign("validation")
    few = spread(benign, SCREENED)

    def right(repair: Repair | None) -> float:
        if repair is not None:
            screened = share(answer_verdicts(lvlm, few, repair, settings, study.judge, store=store), Verdict.COMPLIED)
            if screened < before - HOPELESS:
                return screened
        return share(answer_verdicts(lvlm, benign, repair, settings, study.judge, store=store), Verdict.COMPLIED)

    before = 0.0
    before = right(None)
    tried = []
    for make in candidates:
        repair = make()
        tried.append(
            (
                share(answer_verdicts(lvlm, attacked, repair, settings, study.judge, store=store), Verdict.COMPLIED),
                repair,
            )
        )
    rest: list[tuple[float, float, Repair]] = []
    for asr, repair in sorted(
        tried, key=lambda row: row[0]
    ):  # in this order the first that keeps benign answers is the best
        rest.append((asr, right(repair), repair))
        if rest[-1][1] >= before - settings.benign_loss:
            break
    else:
        rest.sort(key=lambda row: row[1] - row[0])
    asr, after, repair = rest[-1]
    return repair, {"asr": asr, "benign_before": before, "benign_after": after, "candidates": len(tried)}


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
) -> tuple[RefusalDirection, dict[str, object]]:
    """c (mean of refused - mean of complied requests) added at the input of one block, at all tokens and always.

    After CAA (contrastive activation addition), which adds after the prompt only.

    Args:
        lvlm: the model.
        study: its validation split is used.
        rows: of the fit split; last prompt tokens.
        settings: of the run.
        store: where the candidates' answers are kept.
    """

    def make(layer: int, c: float) -> RefusalDirection:
        site = Site("language", layer - 1, "hook_resid_post")
        direction = rows.refused.at(site, 0).mean(0) - rows.complied(site, 0).mean(0)
        only = pd.DataFrame([{"layer": layer, "position": -1, "kept": True}])
        return RefusalDirection(direction=direction, layer=layer, position=-1, candidates=only, coefficient=c, name=CAA)

    makers = [
        lambda layer=layer, c=c: make(layer, c) for layer, c in product(range(1, lvlm.n_layers()), settings.steering)
    ]
    best, validation = tuned(lvlm, study, makers, settings, rows.modalities, store=store)
    assert isinstance(best, RefusalDirection)
    return best, {"layer": best.layer, "coefficient": best.coefficient, "validation": validation}


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
