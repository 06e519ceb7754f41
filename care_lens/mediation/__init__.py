"""Diagnosis: mediation by exchanging activations between twins, ablation by generation, separability."""

# The earlier place, before the function of that name: a later import would put the module in its stead.
import care_lens.mediation.separability  # noqa: F401
from care_lens.core.arguments import checked
from care_lens.core.renames import moved
from care_lens.lens.separability import SeparabilityResult, probe_auc, separability
from care_lens.mediation.ablation import MODES, AblationResult, ablate
from care_lens.mediation.attribution import AttributionResult, attribute
from care_lens.mediation.circuits import FaithfulnessResult, circuit_faithfulness
from care_lens.mediation.counterfactuals import neutralise, remove_noise, swap_drawn_text, swap_text
from care_lens.mediation.edge_verification import EdgeVerification, verify_edges
from care_lens.mediation.edges import EdgeResult, edge_attribution
from care_lens.mediation.effects import EFFECTS, effects_of, p_values, summarise
from care_lens.mediation.judged import JudgedCompliance
from care_lens.mediation.knockout import KnockoutResult, knockout
from care_lens.mediation.localise import Localisation, NothingToLocaliseError, localise, rank_places, refine
from care_lens.mediation.mediate import POSITIONS, MediationResult, default_sites, mediate
from care_lens.mediation.mediators import Mediator, cumulative, heads, neurons, windows
from care_lens.mediation.pairs import PairBatch, misaligned, pair_batches
from care_lens.mediation.patch_map import PatchMapResult, patch_map
from care_lens.mediation.patching import Swap, patched_outcomes
from care_lens.mediation.paths import PathResult, head_paths, path_effects
from care_lens.mediation.placement import Placement, localised, reader_layers
from care_lens.mediation.regions import Region
from care_lens.mediation.verification import VerifiedResult, verify
from care_lens.mediation.writing import Writing, neuron_directions, writes_towards

__all__ = [
    "EFFECTS",
    "MODES",
    "POSITIONS",
    "AblationResult",
    "AttributionResult",
    "EdgeResult",
    "EdgeVerification",
    "FaithfulnessResult",
    "JudgedCompliance",
    "KnockoutResult",
    "Localisation",
    "MediationResult",
    "Mediator",
    "NothingToLocaliseError",
    "PairBatch",
    "PatchMapResult",
    "PathResult",
    "Placement",
    "Region",
    "SeparabilityResult",
    "Swap",
    "VerifiedResult",
    "Writing",
    "ablate",
    "attribute",
    "circuit_faithfulness",
    "cumulative",
    "default_sites",
    "edge_attribution",
    "effects_of",
    "head_paths",
    "heads",
    "knockout",
    "localise",
    "localised",
    "mediate",
    "misaligned",
    "neuron_directions",
    "neurons",
    "neutralise",
    "p_values",
    "pair_batches",
    "patch_map",
    "patched_outcomes",
    "path_effects",
    "probe_auc",
    "rank_places",
    "reader_layers",
    "refine",
    "remove_noise",
    "separability",
    "summarise",
    "swap_drawn_text",
    "swap_text",
    "verify",
    "verify_edges",
    "windows",
    "writes_towards",
]

checked(globals(), __all__)
__getattr__ = moved(
    __name__,
    {"NothingToLocalise": "care_lens.mediation.NothingToLocaliseError", "Replay": "care_lens.lvlm.Replay"},
)
