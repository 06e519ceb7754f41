"""CARE as the paper prints it, from a study: covariance contrast at MLP outputs, projection from the benign mean, adaptive fusion, no gate.

    subspaces = printed_subspaces(lvlm, study, range(3), rank=8)
    repair = printed_form(subspaces, range(3), alpha=4.5)

What the published code does instead, faults included, is `care_lens.defences.PublishedCARE`.

Source: Fu et al., CVPR 2026, arXiv:2603.27240.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from care_lens.capture import capture
from care_lens.core.examples import Example
from care_lens.core.site import Site
from care_lens.data.study import Study
from care_lens.lvlm import HookedLVLM
from care_lens.repair.correction import Correction
from care_lens.repair.errors import RepairError
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.rows import MODALITIES
from care_lens.subspace import Modality, SafetySubspace

#: The span whose mean stands for a modality.
SPAN: Mapping[Modality, str] = {"visual": "image:attributed", "textual": "text:attributed"}


def printed_subspaces(
    lvlm: HookedLVLM,
    study: Study,
    layers: Sequence[int],
    *,
    rank: int = 8,
    batch_size: int = 32,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> dict[tuple[Modality, int], SafetySubspace]:
    """Subspaces of CARE as printed: covariance contrast at MLP outputs, orthogonal projection.

    Visual rows: harmless requests with their answers against visual attacks with compliant answers, image tokens chosen by
    the paper's attribution. Textual rows: the same harmful requests with a refusal against a compliance.

    Args:
        lvlm: The model.
        study: Its fit split is used.
        layers: Of the language tower.
        rank: Of each subspace; the paper has 64 to 256.
        batch_size: Examples a forward pass.
        checkpoint: A folder in which captured batches are kept.
        progress: Whether to show progress bars.

    Returns:
        By modality and layer; modalities without examples are left out.

    Raises:
        ValueError: If there are too few examples for the rank (RankError).
    """
    sites = [Site("language", layer, "hook_mlp_out") for layer in layers]
    textual, visual = study.malicious("fit", "textual"), study.malicious("fit", "visual")
    classes: dict[Modality, tuple[list[Example], list[Example]]] = {
        "visual": ([e for e in study.benign("fit") if e.image is not None][: 4 * len(visual)], visual),
        "textual": ([replace(e, response=study.refusal) for e in textual], textual),
    }
    made: dict[tuple[Modality, int], SafetySubspace] = {}
    for modality in MODALITIES:
        benign, malicious = classes[modality]
        if not benign or not malicious:
            continue
        span = SPAN[modality]
        held = [
            capture(
                lvlm,
                rows,
                sites,
                positions=(span,),
                responses=True,
                batch_size=batch_size,
                progress=progress,
                checkpoint=None if checkpoint is None else checkpoint / f"{modality}.{label}",
            )
            for label, rows in (("benign", benign), ("malicious", malicious))
        ]
        for layer, site in zip(layers, sites):
            made[modality, layer] = SafetySubspace.fit(
                held[0].rows(site, span),
                held[1].rows(site, span),
                rank=rank,
                contrast="covariance",
                projection="orthogonal",
                site=site,
                modality=modality,
                provenance={"rows": span, "split": "fit", "form": "printed"},
            )
    return made


def printed_form(
    subspaces: Mapping[tuple[Modality, int], SafetySubspace], layers: Sequence[int], *, alpha: float = 1.0
) -> HybridFusion:
    """CARE as printed: benign mean, adaptive fusion, no gate.

    Args:
        subspaces: From `printed_subspaces`.
        layers: Where to correct.
        alpha: Strength; 1 projects, published runs use 4 to 4.5. Beyond 1 there is no warning here.

    Raises:
        RepairError: If no subspace is of these layers.
    """
    if not any((m, layer) in subspaces for m in MODALITIES for layer in layers):
        raise RepairError(f"layers must be among those of the subspaces, got {list(layers)}; fit them there first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # published strengths go past the target
        sides = {
            m: tuple(Correction.care(subspaces[m, layer], alpha=alpha) for layer in layers if (m, layer) in subspaces)
            for m in MODALITIES
        }
    about = {"layers": list(layers), "alpha": alpha}
    return HybridFusion(visual=sides["visual"], textual=sides["textual"], name="CARE as printed", provenance=about)
