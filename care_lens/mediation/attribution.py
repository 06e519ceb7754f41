"""Attribution: what every head, neuron, component and picture patch of both towers contributes, all at once.

The natural indirect effect of a mediator M is, to first order, NIE ~ (M(x*) - M(x)) . dY/dM, with x the safe input, x* its
unsafe twin and Y the outcome (``care_lens.mediation.effects``). One backward pass gives that of every M.

- "gradient": the gradient is that of the safe run. Exact on a linear model; wrong where units saturate.
- "integrated": the gradient is averaged over runs between the safe and the unsafe one, whose INPUTS are interpolated (the
  form published as EAP-IG), and activations follow. The inputs are what enters the towers: the patch embeddings
  (``vision.hook_embed``) and, at the positions of words, the word embeddings (``blocks.0.hook_resid_pre``); both go
  together. At image positions ``blocks.0.hook_resid_pre`` follows from the vision tower. Where the patch embeddings cannot
  be edited, and with ``path="embeddings"``, ``blocks.0.hook_resid_pre`` is interpolated at every position instead. Summed
  over what enters, attributions equal the total effect as points grow (completeness; not with "embeddings" on models that
  feed picture features into later layers too); over other sites they are estimates. Interpolating each site's own
  activation would be complete at every site, but needs its own forward and backward passes a site.

Points are Gauss-Legendre nodes on [0, 1], which need fewer runs for the same error than the published evenly spaced ones. By
default there are 8, twice as many again and again, up to 64, until the completeness gap, mean |sum of attributions of what enters -
total effect| over mean |total effect|, is at most 0.5 %; the gap is reported with every result, and a larger one is logged.

Estimates are to be checked by exact patching: ``care_lens.mediation.verify``. Units of a site add up: the attribution of a
set of heads, or of positions, is the sum of theirs.

Cost: the two runs of each pair, and one forward and one backward pass a point, those of smaller numbers that were not enough
included. Memory: the graph of half a batch, and for
every site the difference between the twins and the sum of gradients.

Source: Nanda 2023, "Attribution patching"; Sundararajan et al. 2017, "Axiomatic attribution for deep networks"; Hanna et al.
2024, "Have faith in faithfulness" (EAP-IG).
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from care_lens.core import BaseOutcome, Outcome, PairedExamples, Site, SiteLike
from care_lens.core.details import DetailedResult, metric_name, sampling
from care_lens.core.outcome import logits_outcome
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.attribution_table import AttributionTable
from care_lens.mediation.attribution_units import Cell, kept
from care_lens.mediation.interpolation import Path, Plan, attributed, nodes_of
from care_lens.mediation.pairs import PairBatch, misaligned, pair_batches
from care_lens.mediation.regions import Place, region_settings, split_regions
from care_lens.mediation.sweep import Part, Sweep, require_options, require_positions, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

Method = Literal["gradient", "integrated"]
FIRST_POINTS, MOST_POINTS = 8, 64
TOLERANCE = 0.005
"""Largest completeness gap that counts as enough points."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttributionResult(DetailedResult):
    """Attributions of heads, neurons, components and patches.

    Attributes:
        frame: One row a unit and position: kind ("site", "head", "neuron", "patch"), tower, layer (missing outside blocks),
            component, head, neuron and patch (counted from 0; missing where the unit is none), mediator (its name),
            position (in the vision tower and the projector "all"; of a patch "patch 3"), metric (the outcome's name),
            effect ("NIE estimate"), value (mean over pairs, in the outcome's unit), ci_low, ci_high, n (pairs), seed.
        settings: Method, points, path, where inputs enter, the mean total effect ("TE") and the mean sum of the
            attributions of what enters ("entering", equal to TE if there were enough points), the completeness gap ("gap":
            mean over pairs of ``|entering - TE|`` over mean ``|TE|``), and what made it all.
        details: One row a unit, position and pair: pair (its index), group, value. Of neurons only those with the largest
            means, as asked for.
    """

    def plot(self) -> "go.Figure":
        """The largest attributions, with intervals."""
        from care_lens.plots.attribution import plot_attribution

        return plot_attribution(self)


def attribute(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome | BaseOutcome,
    sites: Sequence[SiteLike] | None = None,
    patches: Sequence[SiteLike] | None = None,
    positions: Sequence[Place] = ("all",),
    method: Method = "integrated",
    points: int | None = None,
    path: Path = "inputs",
    batch_size: int = 32,
    neurons_by_pair: int = 100,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | FilePath | None = None,
) -> AttributionResult:
    """Attribution of the total effect to every unit of some sites.

    Args:
        lvlm: The model; a repair that is on it acts in every run, and gradients go through it.
        pairs: Pairs of twins that are aligned: same length, same image positions.
        outcome: Larger where the model is less safe; differentiable in the logits.
        sites: Sites: ``attn.hook_z`` is split by head, ``mlp.hook_post`` by neuron; None: these, attention and MLP output
            of every layer of both towers, and the projector's output.
        patches: Sites that are split by picture patch; None: where patches enter, and ``blocks.0.hook_resid_pre``.
        positions: Span names or token indices, for the sites of the language tower, and regions of the picture, for those of every
            tower.
        method: "gradient" or "integrated", see above.
        points: Runs between the twins, for "integrated". None: as many as completeness to 0.5 % takes, 8 to 64. Where the gap
            is larger a warning is logged.
        path: "inputs": patch and word embeddings are interpolated; "embeddings": ``blocks.0.hook_resid_pre`` at every
            position, in which case nothing before it has an attribution.
        batch_size: Sequences in a forward pass without gradients, at least 2; half as many with.
        neurons_by_pair: Of how many neurons (those with the largest means) ``details`` has every pair.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        checkpoint: A file in which what is finished is kept; a stopped sweep goes on from it.

    Returns:
        The attributions.

    Raises:
        MediationError: If positions or a number are none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If an option is not known, the model has no such site or it cannot be edited, twins are not aligned,
            no pair has a picture where only such sites are asked for, or the outcome is not one finite number a row with a
            gradient, or the checkpoint is of another attribution.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> found = attribute(
        ...     lvlm,
        ...     organism.pairs("typographic", "fit", n=2),
        ...     outcome=organism.outcome(),
        ...     sites=["blocks.0.attn.hook_z"],
        ...     method="gradient",
        ...     progress=False,
        ... )
        >>> sorted(set(found.frame.kind))
        ['head', 'patch']
    """
    least = {"batch_size": 2, "neurons_by_pair": 0}
    require_options(batch_size=batch_size, neurons_by_pair=neurons_by_pair, n_boot=n_boot, seed=seed, least=least)
    named, regions = split_regions(positions)
    require_positions([name for name in named if name not in regions])
    own = check_options(outcome, method, points, path)
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size, regions=regions)
    if bad := misaligned(batches):
        raise ValueError(
            f"pairs must be aligned (same length, same image positions) to be interpolated, got twins that differ in pairs "
            f"{bad}; leave those out, or patch them exactly with mediate at positions=('image', 'last')"
        )
    pictured = any(batch.has_images for batch in batches)
    plan = Plan.of(lvlm, sites, patches, named, path, pictured)
    made: dict[str, Any] = {
        "method": method,
        "path": path,
        "enters_at": [str(site) for site in plan.entries(pictured)],
        "positions": list(named),
        **region_settings(regions),
        **sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size),
    }
    held = {"sites": [str(site) for site in plan.sites], "patches": [str(site) for site in plan.patches]}
    sweep = Sweep(checkpoint, settings={**made, "points": points, **held})
    count = (points or FIRST_POINTS) if method == "integrated" else 0
    while True:
        nodes = nodes_of(count) if count else ((0.0, 1.0),)
        table, total, entering = _swept(lvlm, batches, own, plan, nodes, sweep, progress)
        gap = completeness_gap(entering, total)
        if points is not None or not count or gap <= TOLERANCE or count >= MOST_POINTS:
            break
        count *= 2
    if count and gap > TOLERANCE:
        log.warning(
            "attributions of what enters miss the total effect by %.2g of its size with %d points; read them as estimates, or "
            "give more points", gap, count,
        )  # fmt: skip
    groups = pairs.groups
    frame, details = table.frames(groups, metric_name(outcome), neurons_by_pair, n_boot, seed)
    settings: dict[str, Any] = {
        **made,
        "points": len(nodes),
        "TE": float(total.mean()),
        "entering": float(entering.mean()),
        "gap": gap,
        **sampling(len(pairs), groups, n_boot, seed),
    }
    return AttributionResult(frame, settings, details)


def _swept(
    lvlm: HookedLVLM,
    batches: Sequence[PairBatch],
    outcome: BaseOutcome,
    plan: Plan,
    nodes: Sequence[tuple[float, float]],
    sweep: Sweep,
    progress: bool,
) -> tuple[AttributionTable, ndarray, ndarray]:
    """Attributions, and each pair's total effect and sum of the attributions of what enters, [n] each."""
    n = sum(batch.n for batch in batches)
    table, total, entering = AttributionTable(n), np.full(n, np.nan), np.full(n, np.nan)

    def parts() -> Iterator[Part[list[int]]]:
        for batch in batches:

            def run(todo: Sequence[str], bar: Any, batch: PairBatch = batch) -> Iterator[dict[str, Any]]:
                yield {todo[0]: kept(batch, plan, attributed(lvlm, batch, outcome, plan, nodes, bar))}

            key = f"from {batch.index[0]} at {len(nodes)} points"
            yield Part(list(batch.index), [key], run, len(nodes))

    steps = len(batches) * len(nodes)
    for index, (found,) in sweep.run(parts(), total=steps, desc="attributing", progress=progress):
        untouched, entering[index], cells = found
        total[index] = np.asarray(untouched[1]) - np.asarray(untouched[0])
        for kind, site, position, values in cells:
            table.add(Cell(kind, Site.parse(site), position), index, np.asarray(values, dtype=np.float64))
    return table, total, entering


def completeness_gap(entering: Float[ndarray, " n"], total: Float[ndarray, " n"]) -> float:
    """How far attributions of what enters are from the total effects: mean |entering - total| / mean |total|.

    Args:
        entering: [n] sum of the attributions of what enters, of each pair.
        total: [n] total effects.

    Returns:
        The gap; 0 where both are 0, infinite where the total effects alone are.
    """
    off, size = float(np.abs(entering - total).mean()), float(np.abs(total).mean())
    return off / size if size else float("inf") if off else 0.0


def check_options(outcome: Outcome | BaseOutcome, method: str, points: int | None, path: str) -> BaseOutcome:
    """Refuse unknown methods and paths, too few points, and outcomes without a gradient in the logits of one run.

    Raises:
        ValueError: As said.
    """
    if method not in get_args(Method) or path not in get_args(Path):
        raise ValueError(
            f"method must be one of {get_args(Method)} and path one of {get_args(Path)}, got {method!r}, {path!r}"
        )
    if points is not None and points < 1:
        raise ValueError(f"points must be 1 or more, or None for as many as it takes, got {points}")
    return logits_outcome(outcome)
