"""Verification of attributions: exact patching of the units that rank highest, and of as many drawn at random.

For each kind of unit (heads, neurons, sites or patches of one component and tower) the ``top`` units by the size of their
attribution, and ``random`` of the others, are patched exactly, one at a time: NIE = Y(x with M := M(x*)) - Y(x).
What is told of each kind is the rank correlation of attribution and exact effect, and the share of large effects that attribution
missed (``care_lens.mediation.rank_measures``).

Intervals of rank correlations are over units, for these pairs. Exact effects that cannot be told from rounding are 0
(``care_lens.mediation.resolution``).

Cost: a forward pass a unit and pair, many in a batch. Memory: the activations of one site at a time, and what replay keeps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from care_lens.core import BaseOutcome, Outcome, PairedExamples, Site, content_digest, examples_digest
from care_lens.core.details import DetailedResult, describe_outcome, sampling, tidy
from care_lens.core.outcome import logits_outcome
from care_lens.lvlm import HookedLVLM, Replay
from care_lens.mediation.attribution import AttributionResult
from care_lens.mediation.attribution_units import patch_places
from care_lens.mediation.errors import MediationError
from care_lens.mediation.pairs import PairBatch, bound_to_rows, logits_needed, pair_batches, require_whole_pictures
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.rank_measures import rank_measures
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import Part, Sweep, one_cell, require_options, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = ("tower", "component", "kind", "position", "metric", "effect", "value", "ci_low", "ci_high", "n", "seed")
UNIT_COLUMNS = (
    "tower",
    "layer",
    "component",
    "head",
    "neuron",
    "mediator",
    "position",
    "top",
    "estimate",
    "value",
    "ci_low",
    "ci_high",
    "n",
)


@dataclass(frozen=True)
class VerifiedResult(DetailedResult):
    """How well attributions rank units.

    Attributes:
        frame: One row a kind of unit, position and measure: tower, component, kind, position ("patch" for patches), metric
            (the outcome's name), effect ("spearman", "spearman of random", "miss rate"), value, ci_low, ci_high, n (units
            patched), seed. Missing where it is not defined (too few units, or no large effect).
        settings: Top, random, number of units, outcome, method and points of the attribution, n_boot, seed, versions.
        details: One row a unit patched: its place, top (1 of the top ones, 0 drawn at random), estimate (its attribution),
            value (mean exact NIE), ci_low, ci_high (over the pairs' groups), n (pairs).
    """

    def plot(self) -> "go.Figure":
        """Each measure by kind of unit."""
        from care_lens.plots.attribution import plot_verified

        return plot_verified(self)


def verify(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    attribution: AttributionResult,
    *,
    outcome: Outcome | BaseOutcome,
    top: int = 20,
    random: int = 20,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> VerifiedResult:
    """Patch the units that attribution ranks highest, and as many random ones, and compare.

    Args:
        lvlm: The model.
        pairs: The pairs that the attribution is of, or others of the same lengths.
        attribution: What :func:`~care_lens.mediation.attribution.attribute` gave.
        outcome: The outcome of the attribution.
        top: Units of each kind that are patched because they rank highest.
        random: Units of each kind that are drawn from the others.
        batch_size: Sequences in a forward pass, at least 2.
        n_boot: Bootstrap resamples.
        seed: Seed of the draw and of the bootstraps.
        progress: Whether to show a progress bar.
        checkpoint: A file in which what is finished is kept; a stopped verification goes on from it.

    Returns:
        Rank correlations and miss rates by kind, and exact effects by unit.

    Raises:
        MediationError: If a number is none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If the outcome is another than the attribution's, a twin has several images and a site is in the vision tower, or
            the checkpoint is of another verification.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> from care_lens.mediation.attribution import attribute
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> pairs, outcome = organism.pairs("typographic", "fit", n=2), organism.outcome()
        >>> guess = attribute(lvlm, pairs, outcome=outcome, sites=["blocks.0.attn.hook_z"], patches=(), progress=False)
        >>> verify(lvlm, pairs, guess, outcome=outcome, top=2, random=1, progress=False).frame.effect.tolist()
        ['spearman', 'spearman of random', 'miss rate']
    """
    require_options(top=top, random=random, batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    if describe_outcome(outcome) != attribution.settings["outcome"]:
        raise ValueError(
            f"outcome must be the attribution's, {attribution.settings['outcome']}, got {describe_outcome(outcome)}"
        )
    if regions := attribution.settings.get("regions"):
        raise MediationError(
            f"attribution must be at spans and tokens to be verified, got regions {list(regions)}; patch those exactly with mediate"
        )
    chosen, sizes = _choose(attribution.frame, top, random, seed)
    exact = np.full((len(pairs), len(chosen)), np.nan)
    units = chosen.to_dict("records")
    order = sorted(range(len(units)), key=lambda i: _site(units[i]))
    own = logits_outcome(outcome)
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    made = sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size)
    # Units that are patched in one pass depend on one another in the last bits, so that all of them are part of the settings.
    sweep = Sweep(
        checkpoint, settings={**made, "units": content_digest([tuple(map(str, unit.values())) for unit in units])}
    )

    def parts() -> Iterator[Part[tuple[list[int], list[int]]]]:
        for batch in batches:
            index, run = list(batch.index), _Run(lvlm, batch, own, batch_size)
            for site, members in groupby(order, key=lambda i: _site(units[i])):
                some = list(members)
                there = batch.has_images or site.tower == "language"
                effects = partial(run.effects, site, [units[i] for i in some])
                yield Part((index, some), [f"{site} from {index[0]}"] if there else [], one_cell(effects), len(some))

    total = len(batches) * len(units)
    for (index, some), found in sweep.run(parts(), total=total, desc="verifying", progress=progress):
        if found:
            exact[np.ix_(index, some)] = found[0]
    details = _details(units, exact, pairs.groups, n_boot, seed)
    settings: dict[str, Any] = {
        "top": top,
        "random": random,
        "units": {f"{key[0]} {key[2]} {key[1]} {key[3]}": size for key, size in sizes.items()},
        "attribution": {name: attribution.settings[name] for name in ("method", "points", "path")},
        "outcome": describe_outcome(outcome),
        "examples": examples_digest([*pairs.safe, *pairs.unsafe]),
        **sampling(len(pairs), pairs.groups, n_boot, seed),
    }
    kinds = [_kind(unit) for unit in units]
    rows = []
    for kind, size in sizes.items():
        part = details.iloc[[i for i, other in enumerate(kinds) if other == kind]]
        place = dict(zip(("tower", "component", "kind", "position"), kind, strict=True))
        for effect, interval, n in rank_measures(part, size, n_boot, seed):
            value, low, high = interval
            rows.append(
                {**place, "metric": attribution.frame["metric"].iloc[0], "effect": effect, "value": value}
                | {"ci_low": low, "ci_high": high, "n": n, "seed": seed}
            )
    return VerifiedResult(tidy(rows, COLUMNS), settings, details)


Kind = tuple[str, str, str, str]


def _kind(unit: Mapping[str, Any]) -> Kind:
    position = "patch" if unit["kind"] == "patch" else unit["position"]
    return unit["tower"], unit["component"], unit["kind"], position


def _site(unit: Mapping[str, Any]) -> Site:
    return Site(unit["tower"], None if pd.isna(unit["layer"]) else int(unit["layer"]), unit["component"])


def _choose(frame: pd.DataFrame, top: int, random: int, seed: int) -> tuple[pd.DataFrame, dict[Kind, int]]:
    """The units to patch, with a column ``top``, and the number of units of each kind."""
    kinds = [_kind(unit) for unit in frame.to_dict("records")]
    generator = np.random.default_rng(seed)
    index: list[int] = []
    flags: list[float] = []
    sizes: dict[Kind, int] = {}
    for kind in dict.fromkeys(kinds):
        members = np.array([i for i, other in enumerate(kinds) if other == kind])
        sizes[kind] = len(members)
        size = frame["value"].to_numpy(dtype=float)[members]
        ranked = members[np.argsort(-np.abs(size), kind="stable")]
        best, others = ranked[:top].tolist(), ranked[top:]
        drawn = generator.choice(others, size=min(random, len(others)), replace=False).tolist()
        index += best + drawn
        flags += [1.0] * len(best) + [0.0] * len(drawn)
    return frame.iloc[index].reset_index(drop=True).assign(top=flags), sizes


class _Run:
    """Exact effects on the safe rows of one batch; what they have in common is run when it is first needed."""

    def __init__(self, lvlm: HookedLVLM, batch: PairBatch, outcome: BaseOutcome, batch_size: int) -> None:
        self._lvlm, self._batch, self._batch_size, self._given = lvlm, batch, batch_size, outcome
        self._keep = logits_needed(outcome, batch.inputs)
        self._inputs = batch.inputs.rows(range(batch.n))

    @cached_property
    def _ready(self) -> tuple[BaseOutcome, torch.Tensor, Replay | None]:
        """The outcome for the safe rows, what it is of them untouched, and their replay."""
        outcome, batch = self._given, self._batch
        with torch.no_grad():
            logits = self._lvlm(batch.inputs, logits_to_keep=self._keep)
            own = bound_to_rows(outcome, batch, logits, range(batch.n))
            untouched = read_outcome(own, logits[: batch.n], self._inputs)
            return own, untouched, Replay.of(self._lvlm, self._inputs, logits_to_keep=self._keep)[0]

    def effects(self, site: Site, units: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        """[n, unit] NIE; missing where a pair has no such position or patch."""
        require_whole_pictures([self._batch], [site])
        n, (outcome, untouched, replay) = self._batch.n, self._ready
        picture: list[torch.Tensor] = []

        def look(activation: torch.Tensor, hook: Any) -> None:
            picture.append(self._lvlm.patch_mask(site, activation).cpu())

        extra = [(site, look)] if site.tower != "language" else []
        with torch.no_grad():
            cache = self._lvlm.run_with_cache(self._batch.inputs, sites=[site], fwd_hooks=extra, logits_to_keep=1)[1]
        both = cache[str(site)]
        own, donor = both.split(n)
        swaps = [self._swap(site, unit, own.shape[1], picture[0] if picture else None) for unit in units]
        patched = patched_outcomes(
            self._lvlm,
            self._inputs,
            patches=[{site: swap} for swap in swaps],
            own={site: own},
            donor={site: donor},
            untouched=untouched,
            outcome=outcome,
            batch_size=self._batch_size,
            logits_to_keep=self._keep,
            replay=replay if site.tower == "language" else None,
        )
        before = untouched.numpy()
        found = resolved(patched.numpy() - before, patched.numpy(), before, spacing=spacing(self._lvlm))
        for at, swap in enumerate(swaps):
            found[at, ~swap.mask.any(dim=1).numpy()] = np.nan
        return found.T.tolist()

    def _swap(self, site: Site, unit: Mapping[str, Any], length: int, picture: torch.Tensor | None) -> Swap:
        n = self._batch.n
        if unit["kind"] == "patch":
            mask = torch.zeros(n, length, dtype=torch.bool)
            for places in patch_places(self._batch, site, picture):
                for row, at in places[int(unit["patch"]) : int(unit["patch"]) + 1]:
                    mask[row, at] = True
            return Swap(mask, torch.arange(length).repeat(n, 1))
        units = tuple(int(unit[name]) for name in ("head", "neuron") if not pd.isna(unit[name])) or None
        if site.tower != "language":
            return Swap.everything(n, length, units=units)
        both = self._batch.swap(unit["position"], units)
        return Swap(both.mask[:n], both.source[:n], units)


def _details(
    units: Sequence[Mapping[str, Any]], exact: np.ndarray, groups: Sequence[str], n_boot: int, seed: int
) -> pd.DataFrame:
    rows = []
    for at, unit in enumerate(units):
        kept = np.flatnonzero(np.isfinite(exact[:, at]))
        labels = [groups[i] for i in kept.tolist()]
        value, low, high = mean_effect(exact[kept, at], labels, n_boot=n_boot, seed=seed)
        rows.append(
            {name: unit[name] for name in UNIT_COLUMNS if name in unit}
            | {"estimate": unit["value"], "value": value, "ci_low": low, "ci_high": high, "n": float(len(kept))}
        )
    return tidy(rows, UNIT_COLUMNS)
