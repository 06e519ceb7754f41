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
what the patch can change is run (``care_lens.lvlm.replay``); in the vision tower whole forward passes are.
Memory: the activations of one layer's sites (of a group's sites) for one batch, and what replay keeps.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from care_lens.core import (
    BaseOutcome,
    Example,
    GeneratedOutcome,
    Interval,
    Outcome,
    PairedExamples,
    PrefixMargin,
    Site,
    SiteLike,
    as_outcome,
)
from care_lens.core.details import DetailedResult, metric_name, sampling, tidy
from care_lens.core.outcome import logits_outcome
from care_lens.core.stats import are_binary
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.effects import EFFECTS, effects_of, p_values, summarise
from care_lens.mediation.errors import MediationError
from care_lens.mediation.mediation_cells import Cell, cells_of, each_token, editable, regions_of_run
from care_lens.mediation.mediation_runs import MediationRuns, plain_outcomes
from care_lens.mediation.mediators import Mediator
from care_lens.mediation.pairs import pair_batches, require_shared, require_whole_pictures
from care_lens.mediation.regions import Place, region_settings, split_regions
from care_lens.mediation.resolution import resolved, spacing
from care_lens.mediation.sweep import Part, Sweep, require_options, require_positions, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

POSITIONS: tuple[str, ...] = ("image", "text", "last", "all")
"""The default positions of the language tower."""

_PLACE = ("tower", "layer", "component", "head", "neuron", "mediator", "position")
COLUMNS = (*_PLACE, "metric", "effect", "value", "ci_low", "ci_high", "p_value", "n", "seed")
PAIR_COLUMNS = (*_PLACE, "pair", "group", "safe", "unsafe", "safe_patched", "unsafe_patched")


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
    outcome: Outcome | BaseOutcome,
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
            ``care_lens.core``, or :class:`~care_lens.mediation.judged.JudgedCompliance`, which generates, or a
            :class:`~care_lens.core.BaseOutcome` of your own.
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
    wanted = editable(lvlm, default_sites(lvlm) if sites is None else sites)
    if not named and any(mediator.in_language for mediator in wanted):
        raise MediationError(f"positions must name one or more for the language tower, got none; give {POSITIONS}")
    if isinstance(outcome, PrefixMargin):
        run, single = _with_prefixes(pairs, outcome), outcome.single
    else:
        run, single = pairs, as_outcome(outcome)
        if not isinstance(single, GeneratedOutcome):
            logits_outcome(single)
    of_pairs = regions_of_run(regions, len(run) // max(1, len(pairs)))
    batches = pair_batches(lvlm, run, outcome=single, batch_size=batch_size, regions=of_pairs)
    positions = each_token(named, batches)
    require_shared(batches, positions)
    require_whole_pictures(batches, [site for mediator in wanted for site in mediator.sites])
    cells = cells_of(wanted, positions, regions, any(batch.has_images for batch in batches))
    settings = sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size)
    settings |= region_settings(regions)
    untouched = np.full((2, len(run)), np.nan)

    def probe() -> list[float]:
        for batch in batches:
            untouched[:, list(batch.index)] = _twins(plain_outcomes(lvlm, batch, single))
        if not isinstance(outcome, PrefixMargin):
            _tell_reversed(untouched)
        return untouched.ravel().tolist()

    sweep = Sweep(checkpoint, settings=settings, probe=probe)

    def parts() -> Iterator[Part[tuple[MediationRuns, list[Cell]]]]:
        for batch in batches:
            before = torch.from_numpy(untouched[:, list(batch.index)].ravel())
            yield from MediationRuns(lvlm, batch, single, before, batch_size, replay).parts(cells)

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


def _with_prefixes(pairs: PairedExamples, outcome: PrefixMargin) -> PairedExamples:
    """Each pair once for each prefix, with it as both twins' response."""

    def spread(examples: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(one for example in examples for one in outcome.responses_for(example))

    return PairedExamples(spread(pairs.safe), spread(pairs.unsafe))


def _tell_reversed(untouched: np.ndarray) -> None:
    """Say that the outcome is larger for the safe twins, which is most often an outcome that was made for other pairs."""
    safe, unsafe = untouched
    if np.isfinite(untouched).all() and len(safe) > 1 and bool((unsafe < safe).all()):
        log.warning(
            "the outcome is larger for the safe twin in all %d pairs, so that the total effect is negative: outcomes must be larger where the model is less "
            "safe. Either this model is not made less safe by what the twins differ in; or the outcome is that of other pairs (for a study's take "
            "study.pair_outcomes.get(name, study.outcome)), or the twins are exchanged",
            len(safe),
        )


def _twins(values: Sequence[float]) -> np.ndarray:
    """[2, n] of the safe and the unsafe twins."""
    return np.asarray(values, dtype=np.float64).reshape(2, -1)


def _result(
    pairs: PairedExamples,
    cells: Sequence[Cell],
    untouched: np.ndarray,
    patched: np.ndarray,
    outcome: Outcome | BaseOutcome,
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
