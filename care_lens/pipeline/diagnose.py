"""Step 1: where an unsafe answer comes from: mediation effects, ablation by generation, picture patches."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pandas as pd

from care_lens.core import Example, PairedExamples, Site
from care_lens.data.study import Study
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import (
    AblationResult,
    Localisation,
    MediationResult,
    PatchMapResult,
    ablate,
    mediate,
    patch_map,
)
from care_lens.mediation.mediate import POSITIONS
from care_lens.mediation.pairs import PairBatch, pair_batches, require_whole_pictures, shared_positions
from care_lens.mediation.placement import localised
from care_lens.pipeline.resume import Stage
from care_lens.pipeline.settings import RunSettings

log = logging.getLogger(__name__)

COMPONENTS = ("hook_attn_out", "hook_mlp_out", "hook_resid_post")


@dataclass(frozen=True)
class Diagnosis:
    """What step 1 found.

    Attributes:
        effects: mediation by pair set.
        places: attention and MLP outputs ranked by what they carry, by pair set; those that say nothing are left out.
        ablation: share complied by layer and ablated component, from generation.
        patches: effect of every picture patch, by pair set whose pictures differ.
    """

    effects: dict[str, MediationResult]
    places: dict[str, Localisation]
    ablation: AblationResult
    patches: dict[str, PatchMapResult]

    def places_frame(self) -> pd.DataFrame:
        """The rankings of all pair sets, which the column `pairs` names."""
        parts = [result.to_dataframe().assign(pairs=name) for name, result in self.places.items()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()

    def effects_frame(self) -> pd.DataFrame:
        """The effects of all pair sets, which the column `pairs` names."""
        parts = [result.to_dataframe().assign(pairs=name) for name, result in self.effects.items()]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def pictures_differ(pairs: PairedExamples) -> bool:
    """Whether every twin has a picture and they are not the same."""
    images = [(safe.image, unsafe.image) for safe, unsafe in pairs]
    if any(a is None or b is None for a, b in images):
        return False
    return any(a.tobytes() != b.tobytes() for a, b in images if a is not None and b is not None)


def diagnosed_sites(lvlm: HookedLVLM) -> list[Site]:
    """Attention output, MLP output and residual of every live layer of both towers, and the projector's output."""
    return [s for s in lvlm.sites() if s.component in COMPONENTS or str(s) == "projector.hook_out"]


def _corresponding(batches: Sequence[PairBatch], sites: Sequence[Site]) -> list[Site]:
    """Those of the sites at which twins can be exchanged: not the vision tower's where pictures are cut in tiles or differ in size."""
    try:
        require_whole_pictures(batches, sites)
    except ValueError as error:
        log.warning("the vision tower is left out of the diagnosis: %s", error)
        return [site for site in sites if site.tower == "language"]
    return list(sites)


def _one_grid(batches: Sequence[PairBatch]) -> bool:
    """Whether every picture of every pair is one grid of patches of one shape, as a map over pairs needs."""
    shapes = {
        tuple((grid.rows, grid.cols) for grid in grids)
        for batch in batches
        if batch.has_images
        for grids in batch.inputs.spans.grids
    }
    return len(shapes) == 1 and len(next(iter(shapes))) == 1


def measure_pairs(
    lvlm: HookedLVLM, study: Study, settings: RunSettings, stage: Stage, *, maps: bool = True
) -> tuple[dict[str, MediationResult], dict[str, PatchMapResult]]:
    """Mediation over the study's pairs and, where pictures differ and patches correspond, patch maps; resumable.

    Args:
        lvlm: the model.
        study: its pairs come from the fit split; sets without pairs are left out.
        settings: of the run.
        stage: where results are kept.
        maps: whether patch maps are made.

    Returns:
        By pair set: effects, and patch maps.
    """
    effects, patches = {}, {}
    for name, pairs in study.pairs.items():
        if not len(pairs[: settings.pairs]):
            log.warning("pair set %r is empty: nothing is diagnosed of it", name)
            continue
        effects[name], patch = measure_pair_set(lvlm, study, name, settings, stage, maps=maps)
        if patch is not None:
            patches[name] = patch
    return effects, patches


def measure_pair_set(
    lvlm: HookedLVLM, study: Study, name: str, settings: RunSettings, stage: Stage, *, maps: bool = True
) -> tuple[MediationResult, PatchMapResult | None]:
    """What `measure_pairs` measures of one set of pairs.

    Args:
        lvlm: the model.
        study: its pairs come from the fit split.
        name: of the set, which holds pairs.
        settings: of the run.
        stage: where results are kept.
        maps: whether a patch map is made.
    """
    few, kept = study.pairs[name][: settings.pairs], (f"effects.{name}", f"patches.{name}")
    wants_map = maps and pictures_differ(few)
    if all(map(stage.has, kept if wants_map else kept[:1])):  # nothing has to be prepared
        effects = stage.result(MediationResult, kept[0], _unmade)
        return effects, stage.result(PatchMapResult, kept[1], _unmade) if wants_map else None
    outcome = study.pair_outcomes.get(name, study.outcome)
    batches = pair_batches(lvlm, few, outcome=outcome, batch_size=settings.batch_size)
    every = diagnosed_sites(lvlm)
    sites, positions = _corresponding(batches, every), shared_positions(batches, POSITIONS)
    without_map = ""
    if positions != POSITIONS:
        without_map = "its twins are of different lengths"
    elif len(sites) < len(every) or not _one_grid(batches):
        without_map = "its pictures are not one grid of patches of one shape each"
    del batches  # their pixels
    effects = stage.result(
        MediationResult,
        f"effects.{name}",
        lambda: mediate(
            lvlm,
            few,
            outcome=outcome,
            sites=sites,
            positions=positions,
            batch_size=settings.batch_size,
            n_boot=settings.n_boot,
            seed=settings.seed,
            progress=False,
            checkpoint=stage.checkpoint(f"effects.{name}"),
        ),
    )
    if not wants_map:
        return effects, None
    if without_map:
        log.info("no patch map of %r: %s", name, without_map)
        return effects, None
    patches = stage.result(
        PatchMapResult,
        f"patches.{name}",
        lambda: patch_map(
            lvlm,
            few,
            outcome=outcome,
            site="blocks.0.hook_resid_pre",
            batch_size=settings.batch_size,
            progress=False,
            checkpoint=stage.checkpoint(f"patches.{name}"),
        ),
    )
    return effects, patches


def _unmade() -> NoReturn:
    raise AssertionError("a result that is kept was to be made again")


def rank_pairs(effects: dict[str, MediationResult], settings: RunSettings, stage: Stage) -> dict[str, Localisation]:
    """The places of each pair set, ranked and kept beside the effects."""
    places = localised(effects, n_boot=settings.n_boot, seed=settings.seed)
    for name, ranking in places.items():
        stage.result(Localisation, f"places.{name}", lambda ranking=ranking: ranking)
    return places


def diagnose(lvlm: HookedLVLM, study: Study, settings: RunSettings, stage: Stage) -> Diagnosis:
    """Mediation over the study's pairs, places ranked, ablation of MLP and attention by layer, and patch maps; resumable.

    Args:
        lvlm: the model.
        study: its pairs come from the fit split.
        settings: of the run.
        stage: where results are kept.
    """
    effects, patches = measure_pairs(lvlm, study, settings, stage)
    ablation = measure_ablation(lvlm, study, settings, stage)
    return Diagnosis(effects, rank_pairs(effects, settings, stage), ablation, patches)


def measure_ablation(lvlm: HookedLVLM, study: Study, settings: RunSettings, stage: Stage) -> AblationResult:
    """Seen attacks with each MLP and each attention of the language tower ablated; resumable.

    Args:
        lvlm: the model.
        study: its fit split is used.
        settings: of the run.
        stage: where results are kept.
    """
    attacked: list[Example] = []
    for channels in study.seen.values():
        for channel in channels:
            attacked += study.suites["fit"][channel][: settings.ablated]
    return stage.result(
        AblationResult,
        "ablation",
        lambda: _ablate(lvlm, attacked, study.benign("fit"), study, settings, stage.checkpoint("ablation")),
    )


def _ablate(
    lvlm: HookedLVLM,
    attacked: Sequence[Example],
    benign: Sequence[Example],
    study: Study,
    settings: RunSettings,
    checkpoint: Path,
) -> AblationResult:
    return ablate(
        lvlm,
        attacked,
        judge=study.judge,
        reference=benign[:: max(1, len(benign) // 64)],
        mode="mean",
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=False,
        checkpoint=checkpoint,
    )
