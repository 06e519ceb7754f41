"""The scorecard: at which rank methods put the place that was planted, beside chance."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from care_lens.core import Site, SiteLike, cluster_bootstrap
from care_lens.core.details import DetailedResult, tidy
from care_lens.core.options import require_options
from care_lens.core.progress import Steps
from care_lens.core.results import FrameResult, package_versions
from care_lens.core.stats import clustered_rate
from care_lens.core.verdicts import require_call
from care_lens.mediation import NothingToLocaliseError
from care_lens.mediation.localise import candidates
from care_lens.planted.localisers import METHODS, Localiser
from care_lens.planted.plants import PlantError, doses, load, names

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

TOOK = 0.5
COLUMNS = ("method", "metric", "value", "ci_low", "ci_high", "chance", "n", "seed")
DETAIL_COLUMNS = ("method", "plant", "kind", "dose", "opened", "took", "rank", "of", "chance", "place", "text")


@dataclass(frozen=True)
class Scorecard(DetailedResult):
    """How well methods find planted places.

    Attributes:
        frame: One row a method and measure: metric ("planted place first": share of cases; "mean rank"; "reciprocal rank": mean of 1 / rank), value,
            ci_low, ci_high (over plants, whose doses are not independent), chance (of a random order), n (cases), seed. Cases are plants and
            doses at which the channel took, where every method gave a ranking.
        settings: Pairs, plants, doses, and what made it.
        details: One row a method, plant and dose: method, plant, kind (of place), dose, opened (share of test requests answered over the trigger),
            took (1 where that is a half or more), rank (of the best of the planted sites, from 1; missing where the method gave none), of
            (candidates), chance (mean rank of a random order), place (what the method put first), text (why there is no rank).
    """

    def plot(self) -> "go.Figure":
        """Ranks by method, with chance."""
        from care_lens.plots.planted import plot_scorecard

        return plot_scorecard(self)


def rank_of(ranking: Sequence[SiteLike], truth: Sequence[SiteLike], every: Sequence[SiteLike]) -> float:
    """The rank of the best of the true sites, from 1.

    Sites that a ranking does not name stand behind those it names, in random order: the expected rank counts.

    Args:
        ranking: Sites, the most likely first.
        truth: Those that count as the place.
        every: All candidates.

    Raises:
        PlantError: If the ranking is no sequence of candidates, each once.

    Example:
        >>> rank_of(["blocks.1.hook_mlp_out"], ["blocks.0.hook_mlp_out"], [f"blocks.{i}.hook_mlp_out" for i in range(4)])
        3.0
    """
    if isinstance(ranking, (str, bytes)) or not isinstance(ranking, Sequence):
        advice = (
            "return sorted(scores, key=scores.get, reverse=True)"
            if isinstance(ranking, Mapping)
            else "return [site, ...]"
        )
        if isinstance(ranking, FrameResult) and "mediator" in ranking.frame.columns:
            advice = "return list(found.frame['mediator'])"
        raise PlantError(
            f"a localiser must return a list of sites, the most likely first, got {type(ranking).__name__}; {advice}"
        )
    known = {Site.parse(site) for site in every}
    listed = []
    for site in ranking:
        try:
            listed.append(Site.parse(site))
        except (ValueError, TypeError, AttributeError) as error:
            raise PlantError(
                f"a localiser must return sites, got {site!r} ({error}); return candidates(lvlm) in your order"
            ) from error
    if wrong := [str(site) for site in listed if site not in known]:
        raise PlantError(
            f"a localiser must rank the candidates, attention and MLP outputs, got {wrong[:3]}; see planted.candidates(lvlm)"
        )
    if len(set(listed)) < len(listed):
        raise PlantError("a localiser must name each site once, got some twice; keep the first of each")
    wanted = {Site.parse(site) for site in truth}
    ranks = [at for at, site in enumerate(listed, 1) if site in wanted]
    if ranks:
        return float(ranks[0])
    return len(listed) + (len(known) - len(listed) + 1) / (len(wanted) + 1)


def scorecard(
    methods: Mapping[str, Localiser] | None = None,
    *,
    plants: Sequence[str] | None = None,
    at: Sequence[float | int] | None = None,
    n: int = 24,
    ours: bool = True,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Scorecard:
    """Ask methods where a planted channel is, and compare.

    Args:
        methods: Localisers by name, functions ``(lvlm, pairs) -> ranking``; None: only those of ``METHODS``.
        plants: Names of plants; None: all.
        at: Doses; None: all at which each was measured.
        n: Pairs.
        ours: Whether those of ``METHODS`` (care_lens's, TransformerLens's attribution patching, a probe) are run too.
        n_boot: Bootstrap resamples of the plants.
        seed: Their seed.
        progress: Whether to show a progress bar.

    Returns:
        The scorecard.

    Raises:
        PlantError: If there is no such plant or dose, no method, or a ranking is none.
    """
    require_options(n=n, n_boot=n_boot, seed=seed, least={"n": 2})
    entered = {**(METHODS if ours else {}), **(methods or {})}
    if not entered:
        raise PlantError("methods must hold at least one localiser with ours=False, got none; give {name: function}")
    for method, localiser in entered.items():
        require_call(localiser, "lvlm", "pairs", what=f"the localiser {method!r}", error=PlantError)
    cases = [(name, dose) for name in (names() if plants is None else plants) for dose in _doses(name, at)]
    rows: list[dict[str, Any]] = []
    with Steps(total=len(cases) * len(entered), desc="searching plants", disable=not progress) as bar:
        for name, dose in cases:
            with load(name, dose=dose) as plant:
                every, pairs = candidates(plant.lvlm), plant.pairs(n)
                shared = {"plant": name, "kind": plant.place.kind, "dose": float(dose), "opened": plant.opened}
                shared |= {"took": float(plant.opened >= TOOK), "of": float(len(every))}
                shared["chance"] = (len(every) + 1) / (len(plant.sites) + 1)
                for method, localiser in entered.items():
                    rank, first, why = np.nan, "", ""
                    try:
                        found = localiser(plant.lvlm, pairs)
                        rank, first = rank_of(found, plant.sites, every), str(found[0]) if len(found) else ""
                    except NothingToLocaliseError as error:
                        why = str(error)
                    rows.append({"method": method, **shared, "rank": rank, "place": first, "text": why})
                    bar.update()
    details = tidy(rows, DETAIL_COLUMNS)
    settings = {
        "n": n,
        "plants": list(dict.fromkeys(name for name, _ in cases)),
        "methods": list(entered),
        "took": TOOK,
        "n_boot": n_boot,
        "seed": seed,
        "confidence": 0.95,
        "versions": package_versions(),
    }
    return Scorecard(summary(details, n_boot=n_boot, seed=seed), settings, details)


def summary(details: pd.DataFrame, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The frame of a scorecard, from ranks by method, plant and dose.

    Args:
        details: As of a :class:`Scorecard`; those of several can be put together first.
        n_boot: Bootstrap resamples of the plants.
        seed: Their seed.
    """
    took = details[details["took"] == 1]
    complete = took.groupby(["plant", "dose"])["rank"].transform(lambda ranks: ranks.notna().all())
    kept = pd.DataFrame(took[complete.astype(bool)])
    rows = []
    for method, part in kept.groupby("method", sort=False):
        rank, labels = part["rank"].to_numpy(dtype=float), part["plant"].tolist()
        first = clustered_rate(rank == 1, labels)
        # A random order: the best of w sites among m stands first with w / m, and at (m + 1) / (w + 1) on average.
        w = (part["of"] + 1) / part["chance"] - 1
        by_chance = {"planted place first": float((w / part["of"]).mean()), "mean rank": float(part["chance"].mean())}
        by_chance["reciprocal rank"] = float(
            np.mean([_reciprocal(int(m), round(k)) for m, k in zip(part["of"], w, strict=True)])
        )
        measured = {
            "planted place first": first,
            "mean rank": cluster_bootstrap(rank, labels, kind="numbers", n_boot=n_boot, seed=seed),
            "reciprocal rank": cluster_bootstrap(1 / rank, labels, kind="rates", n_boot=n_boot, seed=seed),
        }
        for metric, (value, low, high) in measured.items():
            if metric == "mean rank":  # no rank is below 1, nor above the number of candidates
                low, high = (float(np.clip(end, 1.0, part["of"].max())) for end in (low, high))
            rows.append(
                {"method": method, "metric": metric, "value": value, "ci_low": low, "ci_high": high}
                | {"chance": by_chance[metric], "n": len(part), "seed": seed}
            )
    return tidy(rows, COLUMNS)


def _reciprocal(of: int, wanted: int) -> float:
    """Mean of 1 / rank of the best of some sites in a random order."""
    left, total = 1.0, 0.0
    for rank in range(1, of - wanted + 2):
        hit = wanted / (of - rank + 1)
        total += left * hit / rank
        left *= 1 - hit
    return total


def _doses(name: str, at: Sequence[float | int] | None) -> list[float]:
    known = doses(name)
    if at is None:
        return list(known)
    if unknown := [dose for dose in at if float(dose) not in known]:
        raise PlantError(f"at must be some of {tuple(known)}, the doses of {name}, got {unknown}")
    return [float(dose) for dose in at]
