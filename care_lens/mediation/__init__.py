"""Diagnosis: mediation by exchanging activations between twins, ablation by generation, separability."""

from care_lens.mediation.ablation import MODES, AblationResult, ablate
from care_lens.mediation.effects import EFFECTS, effects_of, summarise
from care_lens.mediation.mediate import POSITIONS, MediationResult, default_sites, mediate
from care_lens.mediation.pairs import PairBatch, misaligned, pair_batches
from care_lens.mediation.patch_map import PatchMapResult, patch_map
from care_lens.mediation.patching import Swap, patched_outcomes
from care_lens.mediation.separability import SeparabilityResult, probe_auc, separability

__all__ = [
    "EFFECTS",
    "MODES",
    "POSITIONS",
    "AblationResult",
    "MediationResult",
    "PairBatch",
    "PatchMapResult",
    "SeparabilityResult",
    "Swap",
    "ablate",
    "default_sites",
    "effects_of",
    "mediate",
    "misaligned",
    "pair_batches",
    "patch_map",
    "patched_outcomes",
    "probe_auc",
    "separability",
    "summarise",
]
