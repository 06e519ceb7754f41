"""Where readers are tried: after the blocks that the diagnosis says carry the unsafe answer.

::

    places = localised({"typographic": mediate(lvlm, pairs, outcome=outcome)})
    placement = reader_layers(places, lvlm.n_layers())
    choice = care_lens.evaluation.tune(lvlm, study, layers=placement)
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from care_lens.mediation.localise import Localisation, rank_places
from care_lens.mediation.mediate import MediationResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where readers are tried.

    Attributes:
        layers: Of the language tower, after whose blocks.
        reason: Why there, in a sentence or two.
    """

    layers: tuple[int, ...]
    reason: str


def localised(effects: Mapping[str, MediationResult], *, n_boot: int = 1000, seed: int = 0) -> dict[str, Localisation]:
    """The attention and MLP outputs of each pair set, ranked; sets that cannot be ranked are left out and named in the log.

    Args:
        effects: By pair set.
        n_boot: Resamples.
        seed: Of the resamples.
    """
    places = {}
    for name, found in effects.items():
        try:
            places[name] = rank_places(found, n_boot=n_boot, seed=seed)
        except ValueError as error:  # nothing to localise, or no pair measured everywhere
            log.warning("pairs %r say nothing of where readers belong: %s", name, error)
    return places


def reader_layers(places: Mapping[str, Localisation], n_layers: int, *, score: float = 0.5) -> Placement:
    """Layers of the language tower after which a carrier has written.

    A carrier is a place of the language tower with at least that score; of a pair set that has none, its first place there.
    What the last block writes is read by nothing, so that its readers would have no writer above them: the block below
    stands for it.

    Args:
        places: By pair set.
        n_layers: Of the language tower.
        score: Of a carrier, mean of the shares of the total effect that it brings and that its removal takes.

    Returns:
        The layers, in order, all but the last where no place of the language tower was ranked; and the reason.
    """
    every = range(max(n_layers - 1, 1))
    found: set[int] = set()
    reasons = []
    for name, ranking in places.items():
        frame = pd.DataFrame(ranking.frame[ranking.frame["tower"] == "language"])
        carriers = pd.DataFrame(frame[frame["score"] >= score])
        if frame.empty:
            reasons.append(f"{name}: no place of the language tower")
            continue
        chosen = carriers if len(carriers) else frame.head(1)
        why = f"carried by {', '.join(dict.fromkeys(chosen['mediator']))}"
        if carriers.empty:
            why = (
                f"no place reaches {score:g}, the first is {chosen['mediator'].iloc[0]} ({chosen['score'].iloc[0]:.2f})"
            )
        if chosen["layer"].max() > every[-1]:
            why += f"; block {every[-1]} stands for the last: a reader after that would have no later place to write at"
        reasons.append(f"{name}: {why}")
        found |= {min(int(layer), every[-1]) for layer in chosen["layer"]}
    if not found:
        return Placement(tuple(every), "No place of the language tower was ranked: every block but the last is tried.")
    return Placement(tuple(sorted(found)), f"Score of {score:g} or more. " + ". ".join(reasons) + ".")
