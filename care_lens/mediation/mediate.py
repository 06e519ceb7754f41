"""Mediation sweep: TE, NIE, NDE, TIE, proportion and interaction by layer, component and positions, on both
towers.

In a forward pass each row receives its twin's activation at one mediator and one set of positions: safe rows the
unsafe run's (for the NIE) and unsafe rows the safe run's (for the NDE). Definitions and signs:
``care_lens.mediation.effects``. In TransformerLens's words the NIE takes the safe run as the corrupted one,
and the unsafe run, which shows the behaviour, as the clean one. A mediator is a site, some heads or neurons of one, or
several sites patched together (``care_lens.mediation.mediators``).

Positions in the language tower are spans: "image", "text", "last" (the last prompt token), "all" and the
others of ``TokenSpans.mask``; "each" stands for every token by itself, named by its index counted from the row's first
token ("0", "1", ...), and such indices can be given too. In the vision tower and at the projector all patches of the
picture are exchanged together, class token included, and the position is called "all"; single patches are the
business of ``patch_map``. A pair that lacks a position (image positions without pictures, a response where there is none,
tokens after its end) is left out of that cell; ``n`` counts the pairs of a cell. A cell that no pair has is missing, with
n = 0. Effects that cannot be told from rounding are 0 (``care_lens.mediation.resolution``).

Cost: for each mediator and position the twins whose activations differ there are run once. In the language tower only
what the patch can change is run (``care_lens.mediation.replay``); in the vision tower whole forward passes are.
Memory: the activations of one layer's sites (of a group's sites) for one batch, and what replay keeps.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from care_lens.core import Example, Interval, Outcome, PairedExamples, PrefixMargin, Site, SiteLike
from care_lens.core.stats import are_binary
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.effects import EFFECTS, effects_of, p_values, summarise
from care_lens.mediation.errors import MediationError
from care_lens.mediation.frames import DetailedResult, metric_name, sampling, tidy
from care_lens.mediation.mediators import Mediator
from care_lens.mediation.pairs import (
    PairBatch,
    bound,
    is_index,
    logits_needed,
    pair_batches,
    require_shared,
    require_whole_pictures,
)
from care_lens.mediation.patching import Patch, Swap, patched_outcomes, read_outcome
from care_lens.mediation.regions import Place, Region, region_settings, split_regions
from care_lens.mediation.replay import Replay
from care_lens.mediation.resolution import resolved, spacing
from care_lens.mediation.sweep import EACH, Part, Sweep, require_options, require_positions, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

POSITIONS: tuple[str, ...] = ("image", "text", "last", "all")
"""The default positions of the language tower."""

_PLACE = ("tower", "layer", "component", "head", "neuron", "mediator", "position")
COLUMNS = (*_PLACE, "metric", "effect", "value", "ci_low", "ci_high", "p_value", "n", "seed")
PAIR_COLUMNS = (*_PLACE, "pair", "group", "safe", "unsafe", "safe_patched", "unsafe_patched")
Cell = tuple[Mediator, str]


@dataclass(frozen=True)
class MediationResult(DetailedResult):
    """Mediation effects by site and position.

    Attributes:
        frame: One row a mediator, position and effect: tower, layer (missing at the projector), component ("several"
            and missing where a group's sites differ), head and neuron (counted from 0, of mediators that are one),
            mediator (its name; that of the site where it is one), position, metric (the outcome's name), effect ("TE",
            "NIE", "NDE", "TIE", "interaction", "proportion"), value, ci_low, ci_high, p_value (two-sided, of a mean of
            0 under flips of the groups' signs; not corrected for the number of cells), n (pairs), seed. In the
            outcome's unit, except for the proportion, which is a ratio, missing where TE's interval contains 0,
            and has no p-value. A cell that no pair has is missing, with n = 0.
        settings: Outcome, positions, number of pairs and groups, text_only (indices of the pairs without any picture),
            of_pictures (names of the mediators outside the language tower), resolution (relative, of a difference of
            outcomes: see ``care_lens.mediation.resolution``), n_boot, n_permutations, seed, versions.
        details: One row a mediator, position and pair: pair (its index), group, and the four outcomes safe =
            Y(x), unsafe = Y(x*), safe_patched = Y(x with M := M(x*)), unsafe_patched = Y(x* with M := M(x)).
            Every effect follows from them.
    """

    def plot(self) -> "go.Figure":
        """Effects of whole sites by layer, component and position; of heads alone by layer and head; of neurons and groups one by one."""
        from care_lens.plots import plot_mediation

        return plot_mediation(self)


def default_sites(lvlm: HookedLVLM) -> list[Site]:
    """Residual stream, attention and MLP output of every layer of both towers, and the projector's output."""
    kept = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_out")
    return [site for site in lvlm.sites() if site.component in kept]


def mediate(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome,
    sites: Sequence[SiteLike | Mediator] | None = None,
    positions: Sequence[Place] = POSITIONS,
    batch_size: int = 32,
    n_boot: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
    replay: bool = True,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> MediationResult:
    """Causal mediation effects of sites, over pairs of safe and unsafe twins.

    Args:
        lvlm: The model; a repair that is on it acts in every run.
        pairs: The pairs. For outcomes over responses, both twins carry the response whose likelihood is
            measured.
        outcome: Larger where the model is less safe. A function of logits and inputs, or one of those of
            ``care_lens.core``, or :class:`~care_lens.mediation.judged.JudgedCompliance`, which generates.
        sites: The mediators: sites, and heads, neurons and groups of sites; None: :func:`default_sites`.
        positions: Span names, token indices or "each", for the sites of the language tower, and regions of the picture
            (:class:`~care_lens.mediation.Region`), for those of every tower.
        batch_size: Sequences in a whole forward pass, at least 2; shorter ones hold more.
        n_boot: Bootstrap resamples of the pairs' groups.
        n_permutations: Sign flips of the p-value, where there are more than 12 groups; all of them, where not.
        seed: Seed of bootstrap and sign flips.
        replay: Whether only what a patch can change is run, where that is exact. It takes memory for the input of every
            block; without it every patch is a whole forward pass.
        progress: Whether to show a progress bar.
        checkpoint: A file in which finished cells are kept; a stopped sweep goes on from it.

    Returns:
        The effects.

    Raises:
        MediationError: If positions or a number are none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If the model has no such site or it cannot be edited, twins are not aligned as the
            positions need, the outcome is not one finite number a row, or the checkpoint is of another sweep.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> found = mediate(
        ...     lvlm,
        ...     organism.pairs("typographic", "fit", n=2),
        ...     outcome=organism.outcome(),
        ...     sites=["blocks.0.hook_mlp_out"],
        ...     progress=False,
        ... )
        >>> found.frame.effect.unique().tolist()
        ['TE', 'NIE', 'NDE', 'TIE', 'interaction', 'proportion']
    """
    require_options(
        batch_size=batch_size, n_boot=n_boot, n_permutations=n_permutations, seed=seed, least={"batch_size": 2}
    )
    named, regions = split_regions(positions)
    require_positions([name for name in named if name not in regions], each=True)
    wanted = _editable(lvlm, default_sites(lvlm) if sites is None else sites)
    if not named and any(mediator.in_language for mediator in wanted):
        raise MediationError(f"positions must name one or more for the language tower, got none; give {POSITIONS}")
    if isinstance(outcome, PrefixMargin):
        run, single = _with_prefixes(pairs, outcome), outcome.single
    else:
        run, single = pairs, outcome
    of_pairs = _of_run(regions, len(run) // max(1, len(pairs)))
    batches = pair_batches(lvlm, run, outcome=single, batch_size=batch_size, regions=of_pairs)
    positions = _each(named, batches)
    require_shared(batches, positions)
    require_whole_pictures(batches, [site for mediator in wanted for site in mediator.sites])
    cells = _cells(wanted, positions, regions, any(batch.has_images for batch in batches))
    settings = sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size)
    settings |= region_settings(regions)
    untouched = np.full((2, len(run)), np.nan)

    def probe() -> list[float]:
        for batch in batches:
            untouched[:, list(batch.index)] = _twins(_plain_outcomes(lvlm, batch, single))
        if not isinstance(outcome, PrefixMargin):
            _tell_reversed(untouched)
        return untouched.ravel().tolist()

    sweep = Sweep(checkpoint, settings=settings, probe=probe)

    def parts() -> Iterator[Part[tuple[_Batch, list[Cell]]]]:
        for batch in batches:
            before = torch.from_numpy(untouched[:, list(batch.index)].ravel())
            yield from _Batch(lvlm, batch, single, before, batch_size, replay).parts(cells)

    patched = np.full((2, len(run), len(cells)), np.nan)
    where = {cell: i for i, cell in enumerate(cells)}
    total = len(batches) * len(wanted)
    for (batch, some), found in sweep.run(parts(), total=total, desc="mediating", progress=progress):
        for cell, values in zip(some, found, strict=True):
            patched[:, list(batch.index), where[cell]] = _twins(batch.present(cell, values))
    if isinstance(outcome, PrefixMargin):
        n = len(outcome.prefixes)
        untouched = outcome.combine(untouched.reshape(2, len(pairs), n))
        _tell_reversed(untouched)
        patched = outcome.combine(patched.reshape(2, len(pairs), n, len(cells)).swapaxes(2, 3))
    text_only = [i for i, pair in enumerate(pairs) if not any(example.images for example in pair)]
    pictures = [mediator.name for mediator in wanted if not mediator.in_language]
    settings |= {"positions": list(positions), "n_permutations": n_permutations}
    settings |= {"text_only": text_only, "of_pictures": pictures}
    settings["resolution"] = spacing(lvlm)
    return _result(pairs, cells, untouched, patched, outcome, n_boot, seed, settings)


def _editable(lvlm: HookedLVLM, sites: Sequence[SiteLike | Mediator]) -> list[Mediator]:
    wanted = list(dict.fromkeys(Mediator.of(site) for site in sites))
    for site in {site for mediator in wanted for site in mediator.sites}:
        info = lvlm.site_info(site)
        if not info.editable or site.component == "attn.hook_pattern":
            raise ValueError(
                f"sites must be editable and have positions, got {site} with axes {info.axes}; {info.note}"
            )
    if not wanted:
        raise ValueError("sites must hold at least one site, got none")
    return sorted(wanted, key=lambda mediator: (mediator.sites, mediator.units or ()))


def _with_prefixes(pairs: PairedExamples, outcome: PrefixMargin) -> PairedExamples:
    """Each pair once for each prefix, with it as both twins' response."""

    def spread(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(one for example in examples for one in outcome.responses_for(example))

    return PairedExamples(spread(pairs.safe), spread(pairs.unsafe))


def _each(positions: Sequence[str], batches: Sequence[PairBatch]) -> tuple[str, ...]:
    """Positions with every token's index in place of "each"."""
    longest = max(batch.length for batch in batches)
    indices = tuple(map(str, range(longest)))
    found = tuple(dict.fromkeys(name for given in positions for name in (indices if given == EACH else (given,))))
    if beyond := [name for name in found if is_index(name) and int(name) >= longest]:
        raise ValueError(f"positions must be below the longest row's {longest} tokens, got {beyond}")
    return found


def _of_run(regions: dict[str, Region], times: int) -> dict[str, Region]:
    """Regions for pairs that each stand so many times in a run, one after the other (once for each prefix)."""
    return {
        name: replace(region, members=tuple(one for one in region.members for _ in range(times)))
        for name, region in regions.items()
    }


def _cells(
    mediators: Sequence[Mediator], positions: Sequence[str], regions: dict[str, Region], has_images: bool
) -> list[Cell]:
    # Outside the language tower only "all" and regions are positions.
    elsewhere = [*(["all"] if not regions or set(positions) - set(regions) else []), *regions]
    cells = [
        (mediator, position)
        for mediator in mediators
        for position in (positions if mediator.in_language else elsewhere)
    ]
    kept = [cell for cell in cells if has_images or not _needs_image(cell, regions)]
    if not kept:
        raise ValueError("pairs must have images for these sites and positions, got text alone")
    if len(kept) < len(cells):
        log.warning("no pair has an image in both twins: %d cells about images are left out", len(cells) - len(kept))
    return kept


def _needs_image(cell: Cell, regions: Mapping[str, Region]) -> bool:
    mediator, position = cell
    return mediator.towers != {"language"} or position == "image" or position in regions


def _tell_reversed(untouched: np.ndarray) -> None:
    """Say that the outcome is larger for the safe twins, which is most often an outcome that was made for other pairs."""
    safe, unsafe = untouched
    if np.isfinite(untouched).all() and len(safe) > 1 and bool((unsafe < safe).all()):
        log.warning(
            "the outcome is larger for the safe twin in all %d pairs, so that the total effect is negative: outcomes must be larger where the model is less "
            "safe; for a study's pairs take study.pair_outcomes.get(name, study.outcome), or exchange the twins",
            len(safe),
        )


def _twins(values: Sequence[float]) -> np.ndarray:
    """[2, n] of the safe and the unsafe twins."""
    return np.asarray(values, dtype=np.float64).reshape(2, -1)


def _plain_outcomes(lvlm: HookedLVLM, batch: PairBatch, outcome: Outcome) -> list[float]:
    if (generated := getattr(bound(outcome, batch, None), "generated", None)) is not None:
        return generated(lvlm, batch.inputs, list(range(2 * batch.n)), []).tolist()
    with torch.no_grad():
        logits = lvlm(batch.inputs, logits_to_keep=logits_needed(outcome, batch.inputs))
        return read_outcome(bound(outcome, batch, logits), logits, batch.inputs).tolist()


class _Batch:
    """The cells of one batch; what replay and outcome need is run when the first cell is that is not done yet."""

    def __init__(
        self,
        lvlm: HookedLVLM,
        batch: PairBatch,
        outcome: Outcome,
        untouched: torch.Tensor,
        batch_size: int,
        replay: bool,
    ) -> None:
        self._lvlm, self._batch, self._outcome, self._untouched = lvlm, batch, outcome, untouched
        self._batch_size, self._may_replay, self.index = batch_size, replay, batch.index
        self._keep = logits_needed(outcome, batch.inputs)
        self._replay: Replay | None = None
        self._ready = False
        self._pictures: dict[Site, torch.Tensor] = {}

    def parts(self, cells: Sequence[Cell]) -> Iterator[Part[tuple["_Batch", list[Cell]]]]:
        """Every cell that the batch can have, those of mediators in the same layers together; values are outcomes [2n]."""
        mine = [cell for cell in cells if self._batch.has_images or not _needs_image(cell, self._batch.regions)]
        for places, layer in groupby(mine, key=lambda cell: {(site.tower, site.layer) for site in cell[0].sites}):
            here = {self._key(cell): cell for cell in layer}
            language = any(place[0] == "language" for place in places)

            def run(
                todo: Sequence[str], bar: Any, here: dict[str, Cell] = here, language: bool = language
            ) -> Iterator[dict[str, list[float]]]:
                self._prepare(language)
                return self._filled([here[key] for key in todo])

            steps = len({mediator for mediator, _ in here.values()})
            yield Part((self, [*here.values()]), [*here], run, steps)

    def _key(self, cell: Cell) -> str:
        return f"{cell[0].key} {cell[1]} from {self._batch.index[0]}"

    def _prepare(self, language: bool) -> None:
        if not self._ready:
            generates = hasattr(self._outcome, "generated")
            logits = None
            if hasattr(self._outcome, "with_reference"):
                with torch.no_grad():
                    logits = self._lvlm(self._batch.inputs, logits_to_keep=self._keep)
            self._outcome = bound(self._outcome, self._batch, logits)
            self._may_replay, self._ready = self._may_replay and not generates, True
        if language and self._may_replay:
            self._replay, _ = Replay.of(self._lvlm, self._batch.inputs, logits_to_keep=self._keep)
            self._may_replay = False

    def _filled(self, todo: Sequence[Cell]) -> Iterator[dict[str, list[float]]]:
        """Run cells whose mediators are in the same layers, one mediator after the other."""
        own = self._activations(list(dict.fromkeys(site for mediator, _ in todo for site in mediator.sites)))
        for mediator, some in groupby(todo, key=lambda cell: cell[0]):
            mine = list(some)
            held = {site: own[site] for site in mediator.sites}
            values = patched_outcomes(
                self._lvlm,
                self._batch.inputs,
                patches=[self._patch(mediator, position, held) for _, position in mine],
                own=held,
                donor={site: activation[self._batch.twins] for site, activation in held.items()},
                untouched=self._untouched,
                outcome=self._outcome,
                batch_size=self._batch_size,
                logits_to_keep=self._keep,
                replay=self._replay,
            )
            yield {self._key(cell): row for cell, row in zip(mine, values.tolist(), strict=True)}

    def _activations(self, sites: Sequence[Site]) -> dict[Site, torch.Tensor]:
        def look(site: Site) -> Any:
            def looking(activation: torch.Tensor, hook: Any) -> None:
                self._pictures[site] = self._lvlm.patch_mask(site, activation).cpu()

            return looking

        with torch.no_grad():
            if self._replay is not None and self._replay.can(sites):
                return self._replay.read(sites)
            seen = [(site, look(site)) for site in sites if site.tower != "language" and self._batch.regions]
            cache = self._lvlm.run_with_cache(self._batch.inputs, sites=sites, fwd_hooks=seen, logits_to_keep=1)[1]
        return {site: cache[str(site)] for site in sites}

    def _patch(self, mediator: Mediator, position: str, own: dict[Site, torch.Tensor]) -> Patch:
        def swap(site: Site, activation: torch.Tensor) -> Swap:
            if site.tower == "language":
                return self._batch.swap(position, mediator.units)
            if position not in self._batch.regions:
                return Swap.everything(*activation.shape[:2], units=mediator.units)
            mask = self._batch.patches(position, self._pictures[site])
            return Swap(mask, torch.arange(mask.shape[1]).repeat(len(mask), 1), mediator.units)

        return {site: swap(site, activation) for site, activation in own.items()}

    def present(self, cell: Cell, values: Sequence[float]) -> list[float]:
        """Outcomes [2n] of a cell; those of rows without the position are missing."""
        if not cell[0].in_language and cell[1] not in self._batch.regions:
            return list(values)
        has = self._batch.mask(cell[1]).any(dim=1).tolist()
        return [value if there else float("nan") for value, there in zip(values, has, strict=True)]


def _result(
    pairs: PairedExamples,
    cells: Sequence[Cell],
    untouched: np.ndarray,
    patched: np.ndarray,
    outcome: Outcome,
    n_boot: int,
    seed: int,
    settings: dict[str, Any],
) -> MediationResult:
    groups = pairs.groups
    rows: dict[int, list[dict[str, Any]]] = {}
    pair_rows: list[dict[str, Any]] = []
    binary = are_binary(untouched, patched)
    measured = np.isfinite(patched).all(axis=0) & np.asarray(np.isfinite(untouched).all(axis=0))[:, None]
    for kept in {tuple(column.tolist()) for column in measured.T}:
        index = np.flatnonzero(kept)
        columns = np.flatnonzero((np.asarray(kept) == measured.T).all(axis=1))
        safe, unsafe = (np.repeat(part[index, None], len(columns), axis=1) for part in untouched)
        if len(index):
            effects = effects_of(safe, unsafe, *(part[np.ix_(index, columns)] for part in patched))
            effects = {
                name: resolved(part, safe, unsafe, spacing=settings["resolution"]) for name, part in effects.items()
            }
            labels = [groups[i] for i in index]
            intervals = summarise(effects, labels, n_boot=n_boot, seed=seed, binary=binary)
            p = p_values(effects, labels, n_permutations=settings["n_permutations"], seed=seed)
        else:
            lacking = list(dict.fromkeys(cells[column][1] for column in columns.tolist()))
            log.warning(
                "no pair was measured in %d cells, at positions %s: they are missing, with n = 0", len(columns), lacking
            )
            missing = np.full(len(columns), np.nan)
            intervals, p = dict.fromkeys(EFFECTS, Interval(missing, missing, missing)), {}
        for at, column in enumerate(columns.tolist()):
            mediator, position = cells[column]
            shared = {**mediator.columns(), "position": position, "metric": metric_name(outcome)}
            rows[column] = [
                {
                    **shared,
                    "effect": effect,
                    "value": ci.estimate[at],
                    "ci_low": ci.low[at],
                    "ci_high": ci.high[at],
                    "p_value": p[effect][at] if effect in p else np.nan,
                }
                | {"n": len(index), "seed": seed}
                for effect, ci in intervals.items()
            ]
    for column, (mediator, position) in enumerate(cells):
        for i in np.flatnonzero(measured[:, column]).tolist():
            pair_rows.append(
                {**mediator.columns(), "position": position, "pair": i, "group": groups[i]}
                | {"safe": untouched[0, i], "unsafe": untouched[1, i]}
                | {"safe_patched": patched[0, i, column], "unsafe_patched": patched[1, i, column]}
            )
    settings = settings | {
        **sampling(len(pairs), groups, n_boot, seed),
    }
    frame = tidy([row for column in sorted(rows) for row in rows[column]], COLUMNS)
    return MediationResult(frame, settings, tidy(pair_rows, PAIR_COLUMNS))
