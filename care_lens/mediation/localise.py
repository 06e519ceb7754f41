"""Localise: a ranked choice of the places that carry an unsafe answer, with the reason for each.

Every attention and MLP output of both towers is exchanged between the twins, in both directions. A place that carries the
answer is sufficient (put into the safe run, it brings the unsafe answer: NIE / TE near 1) and necessary (taken out of the unsafe run,
the answer is safe: TIE / TE near 1). Carriers upstream are often one of the two only: there are others beside them. The score is the mean
of the two shares, each cut off at 0 and 1; ranks are bootstrapped over the pairs' groups, so that a reader sees how often
another place would have come first.

Residual streams are not candidates: everything passes through them. The method knows what the pairs tell apart and nothing
else, and redundant places (each sufficient, none necessary) share the middle of the ranking.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from care_lens.core import Outcome, PairedExamples, Site, SiteLike, cluster_bootstrap
from care_lens.core.results import FrameResult
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.effects import effects_of
from care_lens.mediation.frames import sampling, tidy
from care_lens.mediation.mediate import MediationResult, mediate
from care_lens.mediation.mediators import HEADS, NEURONS, Mediator, heads, neurons
from care_lens.mediation.pairs import ALWAYS_SHARED, pair_batches, shared_positions

if TYPE_CHECKING:
    import plotly.graph_objects as go

WRITERS = ("hook_attn_out", "hook_mlp_out")
SPANS = ("image", "text", "last")
_PLACE = ("tower", "layer", "component", "head", "neuron", "mediator", "position")
COLUMNS = (
    "rank", *_PLACE, "score", "ci_low", "ci_high",
    "sufficient", "necessary", "first", "reason", "n", "seed",
)  # fmt: skip


class NothingToLocalise(ValueError):
    """The unsafe twins are no less safe than the safe ones, by the outcome."""


@dataclass(frozen=True)
class Localisation(FrameResult):
    """Places, the most likely first.

    Attributes:
        frame: rank (from 1), tower, layer, component, head, neuron, mediator, position (the span of the language tower through
            which it acts most, where that was asked for), score with its interval, sufficient (NIE / TE), necessary (TIE / TE), first (share of
            resamples of the pairs in which this place comes first), reason, n (pairs), seed.
        settings: outcome, number of pairs and groups, TE, n_boot, seed, versions.
    """

    def plot(self) -> "go.Figure":
        """The leading places with their scores."""
        from care_lens.plots import plot_localisation

        return plot_localisation(self)

    def top(self, k: int = 1) -> list[str]:
        """The names of the first k places."""
        return self.frame["mediator"].head(k).tolist()


def candidates(lvlm: HookedLVLM) -> list[Site]:
    """Attention and MLP outputs of every layer of both towers."""
    return [site for site in lvlm.sites() if site.component in WRITERS]


def localise(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome,
    sites: Sequence[SiteLike | Mediator] | None = None,
    spans: int = 3,
    batch_size: int = 32,
    n_boot: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> Localisation:
    """Rank places by how far they carry the unsafe answer.

    Twins that are aligned are exchanged at all positions. Those that are not have the image and the last token in common;
    then each place is ranked at each of the two, and what passes elsewhere is not seen.

    Args:
        lvlm: The model.
        pairs: Counterfactual twins; where a pair has no picture, places of the vision tower carry nothing of it.
        outcome: Larger where the model is less safe.
        sites: Candidates; None: :func:`candidates`.
        spans: For so many of the leading places of the language tower the span is found through which they act most.
        batch_size: Sequences in a forward pass.
        n_boot: Resamples of the pairs' groups.
        seed: Of the resamples.
        progress: Whether to show progress bars.

    Returns:
        The ranking.

    Raises:
        NothingToLocalise: If the total effect's interval contains 0 or is below it.
    """
    places = [Mediator.of(site) for site in (candidates(lvlm) if sites is None else sites)]
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    positions = shared_positions(batches, ("all",)) or shared_positions(batches, ALWAYS_SHARED)
    options: dict[str, Any] = {
        "outcome": outcome,
        "batch_size": batch_size,
        "n_boot": 2,
        "n_permutations": 2,
        "seed": seed,
    }
    found = mediate(lvlm, pairs, sites=places, positions=positions, progress=progress, **options)
    ranking = rank_places(found, n_boot=n_boot, seed=seed)
    if positions != ("all",) or spans < 1:
        return ranking
    by_name = {place.name: place for place in places}
    leading = [by_name[name] for name in ranking.frame["mediator"]]
    language = [place for place in leading if place.towers == {"language"}][:spans]
    if not language:
        return ranking
    acting = mediate(lvlm, pairs, sites=language, positions=SPANS, progress=False, **options)
    return Localisation(_with_spans(ranking.frame, acting.frame), ranking.settings)


def rank_places(
    found: MediationResult, *, components: Sequence[str] | None = None, n_boot: int = 500, seed: int = 0
) -> Localisation:
    """The ranking of what was exchanged already, without another run of the model.

    Args:
        found: Effects of the candidates. Cells at position "all" are ranked where there are such, else those of the image
            and of the last token.
        components: Components that are ranked, such as :data:`WRITERS`; None: all that were exchanged.
        n_boot: Resamples of the pairs' groups.
        seed: Of the resamples.

    Returns:
        The ranking; the span through which a place acts most is told where it was measured.

    Raises:
        NothingToLocalise: If the total effect's interval contains 0 or is below it.
        ValueError: If there is no such cell, or no pair that was measured in all of them.
    """
    details = found.details
    if components is not None:
        details = pd.DataFrame(details[details["component"].isin(components)])
    cells, shares, groups = _shares(details)
    total = cluster_bootstrap(shares[:, 0, 0], groups, n_boot=1000, seed=0)
    if not total.low > 0:
        raise NothingToLocalise(
            f"unsafe twins must be less safe by the outcome, got a total effect of {total.estimate:.3g} "
            f"[{total.low:.3g}, {total.high:.3g}]"
        )
    boot = _resampled(shares, groups, n_boot=n_boot, seed=seed)
    mean = shares.mean(axis=0)
    estimate = _score(mean)
    first = np.bincount(boot.argmax(axis=1), minlength=len(cells)) / len(boot)
    low, high = np.quantile(boot, [0.025, 0.975], axis=0)
    sufficient, necessary = mean[:, 1] / mean[:, 0], mean[:, 2] / mean[:, 0]
    rows = []
    for rank, i in enumerate(np.argsort(-estimate, kind="stable"), 1):
        rows.append({
            "rank": rank, **cells[i], "score": estimate[i], "ci_low": low[i], "ci_high": high[i],
            "sufficient": sufficient[i], "necessary": necessary[i], "first": first[i],
            "reason": _reason(float(sufficient[i]), float(necessary[i]), float(first[i])), "n": len(shares), "seed": seed,
        })  # fmt: skip
    settings = {
        "outcome": found.settings["outcome"],
        "TE": {"value": float(total.estimate), "ci_low": float(total.low), "ci_high": float(total.high)},
        **sampling(len(shares), groups, n_boot, seed),
    }
    return Localisation(_with_spans(tidy(rows, COLUMNS), found.frame), settings)


def refine(
    lvlm: HookedLVLM, pairs: PairedExamples, place: SiteLike, *, outcome: Outcome, **options: Any
) -> Localisation:
    """The heads of an attention output or the neurons of an MLP output, ranked in the same way.

    Args:
        lvlm: The model.
        pairs: The pairs.
        place: A site that writes to the residual stream.
        outcome: Larger where the model is less safe.
        **options: Of :func:`localise`.

    Returns:
        The ranking of its heads or neurons. Neurons are exchanged one at a time, each in full: their number times two
        short forward passes a pair.

    Raises:
        ValueError: If the place does not write to the residual stream, or has no heads or neurons.
    """
    site = Site.parse(place)
    if site.component not in WRITERS or site.layer is None:
        raise ValueError(f"place must be an attention or MLP output, got {site}; its heads or neurons are ranked")
    if site.component == "hook_attn_out":
        units = heads(lvlm, tower=site.tower, layers=[site.layer])
    else:
        inner = Site(site.tower, site.layer, NEURONS)
        units = neurons(inner, range(lvlm.width(inner)))
    return localise(lvlm, pairs, outcome=outcome, sites=units, **{"spans": 0, **options})


def _shares(details: pd.DataFrame) -> tuple[list[dict[str, Any]], Float[ndarray, "pair cell 3"], list[str]]:
    """The cells that are ranked; TE, NIE and TIE of each pair and cell; the pairs' groups."""
    language, everywhere = ~details["tower"].isin(["vision", "projector"]), details["position"] == "all"
    shared = details["position"].isin(ALWAYS_SHARED) & language & (not (language & everywhere).any())
    kept = pd.DataFrame(details[everywhere | shared])
    if kept.empty:
        raise ValueError(f"found must hold such components at position 'all' or at {ALWAYS_SHARED}, got none")
    cells = pd.DataFrame(kept[[*_PLACE]]).drop_duplicates(subset=["mediator", "position"]).to_dict(orient="records")
    index = pd.MultiIndex.from_tuples([(cell["mediator"], cell["position"]) for cell in cells])
    wide = {
        name: kept.pivot(index="pair", columns=["mediator", "position"], values=name).reindex(columns=index).to_numpy()
        for name in ("safe", "unsafe", "safe_patched", "unsafe_patched")
    }
    # A pair without a picture has no cell at places of pictures: exchanging nothing changes nothing.
    pictured = np.array([cell["tower"] != "language" or cell["position"] == "image" for cell in cells])
    without = np.outer(np.isnan(wide["safe_patched"][:, pictured]).all(axis=1), pictured)
    for name in ("safe", "unsafe"):
        own = pd.DataFrame(wide[name]).max(axis=1).to_numpy()[:, None]
        for one in (name, f"{name}_patched"):
            wide[one] = np.where(without, own, wide[one])
    whole = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in wide.values()])
    if not whole.any():
        raise ValueError("found must hold a pair that was measured in every cell, got none")
    effects = effects_of(**{name: values[whole] for name, values in wide.items()})
    groups = kept.groupby("pair")["group"].first().to_numpy()[whole].tolist()
    return cells, np.stack([effects["TE"], effects["NIE"], effects["TIE"]], axis=2), groups


def _score(mean: Float[ndarray, "*draws place 3"]) -> Float[ndarray, "*draws place"]:
    shares = mean[..., 1:] / mean[..., :1]
    return np.clip(np.nan_to_num(shares), 0.0, 1.0).mean(axis=-1)


def _resampled(
    shares: Float[ndarray, "pair place 3"], groups: Sequence[str], *, n_boot: int, seed: int
) -> Float[ndarray, "boot place"]:
    """Scores of every place in resamples of whole groups."""
    labels = np.array(groups)
    kinds = np.unique(labels)
    members = {kind: np.flatnonzero(labels == kind) for kind in kinds}
    rng = np.random.default_rng(seed)
    draws = [rng.choice(kinds, size=len(kinds)) for _ in range(n_boot)]
    return np.stack([_score(shares[np.concatenate([members[k] for k in draw])].mean(axis=0)) for draw in draws])


def _with_spans(ranking: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """The ranking, with the span of largest NIE as the position of what was exchanged at all of them."""
    nie = pd.DataFrame(effects[(effects["effect"] == "NIE") & effects["position"].isin(SPANS)])
    best = nie.loc[nie.groupby("mediator")["value"].idxmax()]
    acting = dict(zip(best["mediator"], best["position"], strict=True))
    here = ranking["mediator"].map(acting)
    return ranking.assign(position=ranking["position"].where((ranking["position"] != "all") | here.isna(), here))


def _reason(sufficient: float, necessary: float, first: float) -> str:
    """What the figures say, in words."""
    enough, needed = sufficient >= 0.5, necessary >= 0.5
    kind = (
        "sufficient and necessary" if enough and needed
        else "sufficient, and others stand in for it" if enough
        else "necessary, and not enough alone" if needed
        else "neither sufficient nor necessary alone"
    )  # fmt: skip
    return f"{kind}: brings {sufficient:.0%} of the effect, its removal takes {necessary:.0%}; first in {first:.0%} of resamples"


__all__ = ["HEADS", "NEURONS", "Localisation", "NothingToLocalise", "candidates", "localise", "rank_places", "refine"]
