"""Where readers are tried: after the blocks that the diagnosis says carry the unsafe answer."""

import logging
from collections.abc import Mapping

from care_lens.mediation import Localisation, MediationResult, NothingToLocalise, rank_places
from care_lens.mediation.localise import WRITERS

log = logging.getLogger(__name__)


def localised(effects: Mapping[str, MediationResult], *, n_boot: int, seed: int) -> dict[str, Localisation]:
    """The attention and MLP outputs of each pair set, ranked; sets without an effect to localise are left out and named in the log.

    Args:
        effects: by pair set.
        n_boot: resamples.
        seed: of the resamples.
    """
    places = {}
    for name, found in effects.items():
        try:
            places[name] = rank_places(found, components=WRITERS, n_boot=n_boot, seed=seed)
        except NothingToLocalise as error:
            log.warning("pairs %r say nothing of where readers belong: %s", name, error)
    return places


def reader_layers(places: Mapping[str, Localisation], n_layers: int, *, score: float) -> tuple[int, ...]:
    """Layers of the language tower after which a carrier has written.

    A carrier is a place of the language tower with at least that score; of a pair set that has none, its first place there.
    What the last block writes is read by nothing, so that its readers would have no writer above them: the block below
    stands for it.

    Args:
        places: by pair set.
        n_layers: of the language tower.
        score: of a carrier, mean of the shares of the total effect that it brings and that its removal takes.

    Returns:
        The layers, in order; all but the last where nothing was localised.
    """
    found: set[int] = set()
    for ranking in places.values():
        frame = ranking.frame[ranking.frame["tower"] == "language"]
        carriers = frame[frame["score"] >= score]
        found |= {int(layer) for layer in (carriers if len(carriers) else frame.head(1))["layer"]}
    every = range(max(n_layers - 1, 1))
    return tuple(sorted({min(layer, every[-1]) for layer in found})) or tuple(every)
