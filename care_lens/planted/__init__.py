"""Planted truth: a bench for methods that say where an unsafe channel is.

In copies of the bundled model a channel was opened at one place, drawn beforehand, by training that place alone: an MLP, an attention, one
head, eight neurons, or a vision layer. A method is any function that ranks places; the scorecard says at which rank it puts the true one,
beside care_lens's own figures, TransformerLens's attribution patching, a linear probe, and chance.

    from care_lens import planted

    def mine(lvlm, pairs):
        return sorted(planted.candidates(lvlm), key=my_score)

    planted.scorecard({"mine": mine}, plants=["mlp_1", "head_6_1"]).frame

A method that finds what was changed need not find what carries an answer in a model that nobody has changed, nor the other way round.
"""

from care_lens.core.arguments import checked
from care_lens.mediation.localise import candidates
from care_lens.planted.localisers import (
    METHODS,
    Localiser,
    by_gradient,
    by_integrated_gradients,
    by_localise,
    by_nie,
    by_probe,
    by_tie,
    by_transformer_lens,
)
from care_lens.planted.plants import Place, Plant, PlantError, doses, load, names, place_of
from care_lens.planted.scorecard import Scorecard, rank_of, scorecard, summary

__all__ = [
    "METHODS",
    "Localiser",
    "Place",
    "Plant",
    "PlantError",
    "Scorecard",
    "by_gradient",
    "by_integrated_gradients",
    "by_localise",
    "by_nie",
    "by_probe",
    "by_tie",
    "by_transformer_lens",
    "candidates",
    "doses",
    "load",
    "names",
    "place_of",
    "rank_of",
    "scorecard",
    "summary",
]

checked(globals(), __all__)
