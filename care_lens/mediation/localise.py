"""Localise: a ranked choice of the places that carry an unsafe answer, with the reason for each.

Every attention and MLP output of both towers is exchanged between the twins, in both directions. A place that carries the
answer is sufficient (put into the safe run, it brings the unsafe answer: NIE / TE near 1) and necessary (taken out of the unsafe run,
the answer is safe: TIE / TE near 1). Carriers upstream are often one of the two only: there are others beside them. The score is the mean
of the two shares, each cut off at 0 and 1; its interval is the mean of theirs, which is no narrower than that of a mean. Ranks
are bootstrapped over the pairs' groups, so that a reader sees how often another place would have come first.

Residual streams are not candidates: everything passes through them. The method knows what the pairs tell apart and nothing
else, and redundant places (each sufficient, none necessary) share the middle of the ranking.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from care_lens.core import BaseOutcome, Outcome, PairedExamples, Site, SiteLike, cluster_bootstrap, ratio_of_means
from care_lens.core.details import sampling, tidy
from care_lens.core.errors import CareLensError
from care_lens.core.renames import renamed
from care_lens.core.results import FrameResult
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.effects import effects_of
from care_lens.mediation.mediate import MediationResult, mediate
from care_lens.mediation.mediators import HEADS, NEURONS, Mediator, heads, neurons
from care_lens.mediation.pairs import ALWAYS_SHARED, pair_batches, shared_positions
from care_lens.mediation.sweep import require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

WRITERS = ("hook_attn_out", "hook_mlp_out")
SPANS = ("image", "text", "last")
_PLACE = ("tower", "layer", "component", "head", "neuron", "mediator", "position")
COLUMNS = (
    "rank", *_PLACE, "acts_through", "score", "ci_low", "ci_high",
    "sufficient", "necessary", "first", "reason", "n", "seed",
)  # fmt: skip
_NEARLY, _SOME = 0.9, 0.1


class NothingToLocaliseError(CareLensError, ValueError):
    """The unsafe twins are no less safe than the safe ones, by the outcome, or too few to say so."""


@dataclass(frozen=True)
class Localisation(FrameResult):
    """Places, the most likely first.

    Attributes:
        frame: rank (from 1), tower, layer, component, head, neuron, mediator, position (where it was exchanged: "all", or of
            twins that are not aligned "image" or "last"), acts_through (of places of the language tower with a score of 0.1 or
            more, where it was measured: the span at which exchanging them has the largest NIE; "last", which is part of "text", if
            that alone has nine tenths of it), score with its interval, sufficient (NIE / TE), necessary (TIE / TE), first (share of
            resamples of the pairs in which this place comes first, shared where several do), reason, n (pairs), seed.
        settings: outcome, number of pairs and groups, TE, n_boot, seed, versions.
    """

    def plot(self) -> "go.Figure":
        """The leading places with their scores."""
        from care_lens.plots import plot_localisation

        return plot_localisation(self)

    def top(self, k: int = 1) -> list[str]:
        """The names of the first k places; of twins that are not aligned a place may stand in the frame twice, and is named once."""
        return list(dict.fromkeys(self.frame["mediator"]))[:k]


def candidates(lvlm: HookedLVLM) -> list[Site]:
    """Attention and MLP outputs of every layer of both towers."""
    return [site for site in lvlm.sites() if site.component in WRITERS]


@renamed(spans="n_spans")
def localise(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome | BaseOutcome,
    sites: Sequence[SiteLike | Mediator] | None = None,
    n_spans: int = 3,
    batch_size: int = 32,
    n_boot: int = 500,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Localisation:
    """Rank places by how far they carry the unsafe answer.

    Twins that are aligned are exchanged at all positions. Those that are not have the image and the last token in common;
    then each place is ranked at each of the two, and what passes elsewhere is not seen.

    Args:
        lvlm: The model.
        pairs: Counterfactual twins. Through places of pictures nothing of a pair without any can pass: they count as 0 for it.
            Pairs of which one twin has a picture, and those that an outcome is missing of, are left out.
        outcome: Larger where the model is less safe.
        sites: Candidates; None: :func:`candidates`.
        n_spans: For so many of the leading places of the language tower the span is found through which they act most.
        batch_size: Sequences in a forward pass.
        n_boot: Resamples of the pairs' groups.
        seed: Of the resamples.
        progress: Whether to show progress bars.
        checkpoint: A file in which finished cells are kept; a stopped localisation goes on from it, and one of the same pairs by
            :func:`mediate` with the same outcome and batch size shares it.

    Returns:
        The ranking.

    Raises:
        MediationError: If a number is none that it can be run with, before anything is run. It is a ValueError.
        NothingToLocaliseError: If the total effect's interval contains 0 or is below it, or the pairs are about one item alone.
        ValueError: If two mediators have one name, no pair could be measured at every place, or :func:`mediate` refuses the
            sites or the pairs.
    """
    require_options(
        batch_size=batch_size, n_boot=n_boot, n_spans=n_spans, seed=seed, least={"batch_size": 2, "n_spans": 0}
    )
    places = list(dict.fromkeys(Mediator.of(site) for site in (candidates(lvlm) if sites is None else sites)))
    if len({place.name for place in places}) < len(places):
        raise ValueError(
            "sites must have names of their own, got two mediators of one name; give Mediator(..., name=...)"
        )
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    positions = shared_positions(batches, ("all",)) or shared_positions(batches, ALWAYS_SHARED)
    options: dict[str, Any] = {
        "outcome": outcome,
        "batch_size": batch_size,
        "n_boot": 2,
        "n_permutations": 2,
        "seed": seed,
        "checkpoint": checkpoint,
    }
    if len(places) > 1:  # pairs without an effect are refused before hours of a sweep, for the cost of one place
        rank_places(
            mediate(lvlm, pairs, sites=places[:1], positions=positions, progress=False, **options), components=None
        )
    found = mediate(lvlm, pairs, sites=places, positions=positions, progress=progress, **options)
    ranking = rank_places(found, components=None, n_boot=n_boot, seed=seed)
    if positions != ("all",) or n_spans < 1:
        return ranking
    by_name = {place.name: place for place in places}
    leading = [by_name[name] for name in ranking.frame["mediator"]]
    language = [place for place in leading if place.towers == {"language"}][:n_spans]
    if not language:
        return ranking
    acting = mediate(lvlm, pairs, sites=language, positions=SPANS, progress=False, **options)
    return Localisation(_with_spans(ranking.frame, acting.details), ranking.settings)


def rank_places(
    found: MediationResult, *, components: Sequence[str] | None = WRITERS, n_boot: int = 500, seed: int = 0
) -> Localisation:
    """The ranking of what was exchanged already, without another run of the model.

    Args:
        found: Effects of the candidates. Places of the language tower are ranked at position "all" where they were exchanged
            there, else at the image and at the last token.
        components: Components that are ranked; None: all that were exchanged, residual streams too, through which
            everything passes.
        n_boot: Resamples of the pairs' groups.
        seed: Of the resamples.

    Returns:
        The ranking, of the pairs that were measured in every cell; pairs without a picture count as 0 where pictures are exchanged.

    Raises:
        NothingToLocaliseError: If the total effect's interval contains 0 or is below it, or the pairs are about one item alone.
        ValueError: If there is no such cell, a place was exchanged at neither of these positions, or no pair was measured in every
            cell.
    """
    details = found.details
    if components is not None:
        details = pd.DataFrame(details[details["component"].isin(components)])
    of_pictures = {*found.settings.get("of_pictures", ())}
    of_pictures |= {*details.loc[details["tower"].isin(["vision", "projector"]), "mediator"]}
    cells, shares, groups = _shares(details, found.settings.get("text_only", []), of_pictures)
    if len(set(groups)) < 2:
        raise NothingToLocaliseError(f"pairs must be about two items or more to have intervals, got {len(set(groups))}")
    binary = bool(np.isin(shares, (-1.0, 0.0, 1.0)).all())
    kind = "differences" if binary else "numbers"
    total = cluster_bootstrap(shares[:, 0, 0], groups, kind=kind, n_boot=n_boot, seed=seed)
    if not total.low > 0:
        raise NothingToLocaliseError(
            f"unsafe twins must be less safe by the outcome, with an interval above 0, got a total effect of {total.estimate:.3g} "
            f"[{total.low:.3g}, {total.high:.3g}] of {len(set(groups))} items; "
            + (
                "give pairs about more items"
                if total.estimate > 0
                else "what the twins differ in does not make this model less safe, or twins or the outcome's sign are the other way round"
            )
        )
    boot = _resampled(shares, groups, n_boot=n_boot, seed=seed)
    mean = shares.mean(axis=0)
    estimate = _score(mean)
    leads = boot >= boot.max(axis=1, keepdims=True) - 1e-9
    first = (leads / leads.sum(axis=1, keepdims=True)).mean(axis=0)
    low, high = _ends(shares, groups, n_boot=n_boot, seed=seed)
    sufficient, necessary = mean[:, 1] / mean[:, 0], mean[:, 2] / mean[:, 0]
    rows = []
    # Of equal scores (both shares cut off at 1) the larger uncut sum comes first.
    for rank, i in enumerate(np.lexsort((-(sufficient + necessary), -estimate)), 1):
        rows.append({
            "rank": rank, **cells[i], "acts_through": "", "score": estimate[i], "ci_low": low[i], "ci_high": high[i],
            "sufficient": sufficient[i], "necessary": necessary[i], "first": first[i],
            "reason": _reason(float(sufficient[i]), float(necessary[i]), float(first[i])), "n": len(shares), "seed": seed,
        })  # fmt: skip
    settings = {
        "outcome": found.settings["outcome"],
        "TE": {"value": float(total.estimate), "ci_low": float(total.low), "ci_high": float(total.high)},
        **sampling(len(shares), groups, n_boot, seed),
    }
    return Localisation(_with_spans(tidy(rows, COLUMNS), details), settings)


@renamed(spans="n_spans")
def refine(
    lvlm: HookedLVLM, pairs: PairedExamples, place: SiteLike, *, outcome: Outcome | BaseOutcome, **options: Any
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
    return localise(lvlm, pairs, outcome=outcome, sites=units, **{"n_spans": 0, **options})


def _shares(
    details: pd.DataFrame, text_only: Sequence[int], of_pictures: set[str]
) -> tuple[list[dict[str, Any]], Float[ndarray, "pair cell 3"], list[str]]:
    """The cells that are ranked; TE, NIE and TIE of each pair and cell; the pairs' groups."""
    language, everywhere = ~details["mediator"].isin(list(of_pictures)), details["position"] == "all"
    shared = details["position"].isin(ALWAYS_SHARED) & language & (not (language & everywhere).any())
    kept = pd.DataFrame(details[everywhere | shared])
    if left := sorted(set(details["mediator"]) - set(kept["mediator"])):
        raise ValueError(f"places must be exchanged at position 'all' or at {ALWAYS_SHARED}, got others for {left[:3]}")
    if kept.empty:
        raise ValueError("found must hold such components, got none")
    cells = pd.DataFrame(kept[[*_PLACE]]).drop_duplicates(subset=["mediator", "position"]).to_dict(orient="records")
    index = pd.MultiIndex.from_tuples([(cell["mediator"], cell["position"]) for cell in cells])
    wide = {
        name: kept.pivot(index="pair", columns=["mediator", "position"], values=name).reindex(columns=index)
        for name in ("safe", "unsafe", "safe_patched", "unsafe_patched")
    }
    # Where pictures alone are exchanged a pair without any stays as it is. What is missing for another reason stays missing.
    pictures = [cell["mediator"] in of_pictures or cell["position"] == "image" for cell in cells]
    still = np.outer(wide["safe"].index.isin(list(text_only)), pictures)
    values = {name: frame.to_numpy() for name, frame in wide.items()}
    for name in ("safe", "unsafe"):
        own = wide[name].max(axis=1).to_numpy()[:, None]
        for one in (name, f"{name}_patched"):
            values[one] = np.where(still, own, values[one])
    whole = np.logical_and.reduce([np.isfinite(one).all(axis=1) for one in values.values()])
    if not whole.any():
        raise ValueError("found must hold a pair that was measured in every cell, got none")
    if not whole.all():
        out = wide["safe"].index[~whole].tolist()
        log.warning("pairs %s are left out of the ranking: they were not measured at every place", out)
    effects = effects_of(**{name: one[whole] for name, one in values.items()})
    groups = kept.groupby("pair")["group"].first().to_numpy()[whole].tolist()
    return cells, np.stack([effects["TE"], effects["NIE"], effects["TIE"]], axis=2), groups


def _score(mean: Float[ndarray, "*draws place 3"]) -> Float[ndarray, "*draws place"]:
    shares = mean[..., 1:] / mean[..., :1]
    return np.clip(np.nan_to_num(shares), 0.0, 1.0).mean(axis=-1)


def _ends(
    shares: Float[ndarray, "pair place 3"], groups: Sequence[str], *, n_boot: int, seed: int
) -> tuple[Float[ndarray, " place"], Float[ndarray, " place"]]:
    """The mean of both shares' intervals; a share without a bounded one may be anything."""
    ends = []
    for found in (shares[..., 1], shares[..., 2]):
        _, low, high = ratio_of_means(found, shares[..., 0], groups, n_boot=n_boot, seed=seed)
        ends.append((np.nan_to_num(np.clip(low, 0, 1), nan=0.0), np.nan_to_num(np.clip(high, 0, 1), nan=1.0)))
    return (ends[0][0] + ends[1][0]) / 2, (ends[0][1] + ends[1][1]) / 2


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


def _with_spans(ranking: pd.DataFrame, details: pd.DataFrame) -> pd.DataFrame:
    """The ranking with the span through which places of the language tower act, over pairs that were measured at all of them."""
    spans = details[details["position"].isin(SPANS) & (details["tower"] == "language")]
    acting: dict[str, str] = {}
    for name, part in spans.groupby("mediator"):
        nie = part.assign(nie=part["safe_patched"] - part["safe"]).pivot(index="pair", columns="position", values="nie")
        mean = nie.dropna().mean()
        if mean.empty or not mean.max() > 0:
            continue
        last = mean.get("last", 0.0) >= _NEARLY * mean.max()
        acting[str(name)] = "last" if last else str(mean.idxmax())
    known = ranking["mediator"].map(acting).where((ranking["position"] == "all") & (ranking["score"] >= _SOME))
    return ranking.assign(acts_through=known.where(known.notna(), ranking["acts_through"]))


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


__all__ = [
    "HEADS",
    "NEURONS",
    "Localisation",
    "NothingToLocaliseError",
    "candidates",
    "localise",
    "rank_places",
    "refine",
]
