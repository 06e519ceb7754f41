"""Mediation sweep: TE, NIE, NDE, TIE, proportion and interaction by layer, component and positions, on both
towers.

In a forward pass each row receives its twin's activation at one site and one set of positions: safe rows the
unsafe run's (for the NIE) and unsafe rows the safe run's (for the NDE). Definitions and signs:
``care_lens.mediation.effects``. In TransformerLens's words the NIE takes the safe run as the corrupted one,
and the unsafe run, which shows the behaviour, as the clean one.

Positions in the language tower are spans: "image", "text", "last" (the last prompt token), "all" and the
others of ``TokenSpans.mask``. In the vision tower and at the projector all patches of the picture are
exchanged together, class token included, and the position is called "all"; single patches are the business of
``patch_map``. Cells that a pair cannot have (image positions of a pair without pictures) leave that pair out;
``n`` counts the pairs of a cell.

Cost: for each site and position the twins whose activations differ there are run once, and per layer one pass
fills the cache. Memory: the cache holds one layer's sites for one batch.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from care_lens.core import Outcome, PairedExamples, Site, SiteLike, package_versions
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.checkpoint import CellLog
from care_lens.mediation.effects import effects_of, summarise
from care_lens.mediation.frames import (
    DetailedResult,
    describe_outcome,
    examples_digest,
    metric_name,
    site_columns,
    tidy,
)
from care_lens.mediation.pairs import PairBatch, logits_needed, pair_batches, require_shared
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome

if TYPE_CHECKING:
    import plotly.graph_objects as go

log = logging.getLogger(__name__)

POSITIONS: tuple[str, ...] = ("image", "text", "last", "all")
"""The default positions of the language tower."""

COLUMNS = (
    "tower",
    "layer",
    "component",
    "position",
    "metric",
    "effect",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "seed",
)
PAIR_COLUMNS = (
    *("tower", "layer", "component", "position", "pair", "group"),
    *("safe", "unsafe", "safe_patched", "unsafe_patched"),
)
Cell = tuple[Site, str]


@dataclass(frozen=True)
class MediationResult(DetailedResult):
    """Mediation effects by site and position.

    Attributes:
        frame: One row a site, position and effect: tower, layer (missing at the projector), component,
            position, metric (the outcome's name), effect ("TE", "NIE", "NDE", "TIE", "interaction",
            "proportion"), value, ci_low, ci_high, n (pairs), seed. In the outcome's unit, except for the
            proportion, which is a ratio and missing where TE's interval contains 0.
        settings: Outcome, positions, number of pairs and groups, n_boot, seed, versions.
        details: One row a site, position and pair: pair (its index), group, and the four outcomes safe =
            Y(x), unsafe = Y(x*), safe_patched = Y(x with M := M(x*)), unsafe_patched = Y(x* with M := M(x)).
            Every effect follows from them.
    """

    def plot(self) -> "go.Figure":
        """Effects by layer, component and position."""
        from care_lens.plots import plot_effects

        return plot_effects(self)


def default_sites(lvlm: HookedLVLM) -> list[Site]:
    """Residual stream, attention and MLP output of every layer of both towers, and the projector's output."""
    kept = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_out")
    return [site for site in lvlm.sites() if site.component in kept]


def mediate(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome,
    sites: Sequence[SiteLike] | None = None,
    positions: Sequence[str] = POSITIONS,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> MediationResult:
    """Causal mediation effects of sites, over pairs of safe and unsafe twins.

    Args:
        lvlm: The model; a repair that is on it acts in every run.
        pairs: The pairs. For outcomes over responses, both twins carry the response whose likelihood is
            measured.
        outcome: Larger where the model is less safe.
        sites: The mediators; None: :func:`default_sites`.
        positions: Span names, for the sites of the language tower.
        batch_size: Sequences in a forward pass, at least 2.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        checkpoint: A file in which finished cells are kept; a stopped sweep goes on from it.

    Returns:
        The effects.

    Raises:
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
    wanted = _editable(lvlm, default_sites(lvlm) if sites is None else sites)
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    require_shared(batches, positions)
    cells = _cells(wanted, positions, any(batch.has_images for batch in batches))
    settings = {
        "outcome": describe_outcome(outcome),
        "examples": examples_digest([*pairs.safe, *pairs.unsafe]),
        "batch_size": batch_size,
    }
    untouched = np.full((2, len(pairs)), np.nan)
    for batch in batches:
        untouched[:, list(batch.index)] = _twins(_plain_outcomes(lvlm, batch, outcome))
    done = CellLog(checkpoint, settings=settings, probe=untouched.ravel().tolist())
    patched = np.full((2, len(pairs), len(cells)), np.nan)
    where = {cell: i for i, cell in enumerate(cells)}
    with tqdm(total=len(batches) * len(wanted), desc="mediating", disable=not progress) as bar:
        for batch in batches:
            before = torch.from_numpy(untouched[:, list(batch.index)].ravel())
            for cell, values in _sweep(lvlm, batch, cells, outcome, before, batch_size, done, bar):
                patched[:, list(batch.index), where[cell]] = _twins(values)
    return _result(pairs, cells, untouched, patched, outcome, n_boot, seed, settings | {"positions": list(positions)})


def _editable(lvlm: HookedLVLM, sites: Sequence[SiteLike]) -> list[Site]:
    wanted = sorted({Site.parse(site) for site in sites})
    for site in wanted:
        info = lvlm.site_info(site)
        if not info.editable or site.component == "attn.hook_pattern":
            raise ValueError(
                f"sites must be editable and have positions, got {site} with axes {info.axes}; {info.note}"
            )
    if not wanted:
        raise ValueError("sites must hold at least one site, got none")
    return wanted


def _cells(sites: Sequence[Site], positions: Sequence[str], has_images: bool) -> list[Cell]:
    cells = [(site, position) for site in sites for position in (positions if site.tower == "language" else ("all",))]
    kept = [cell for cell in cells if has_images or not _needs_image(cell)]
    if not kept:
        raise ValueError("pairs must have images for these sites and positions, got text alone")
    if len(kept) < len(cells):
        log.warning("no pair has an image in both twins: %d cells about images are left out", len(cells) - len(kept))
    return kept


def _needs_image(cell: Cell) -> bool:
    site, position = cell
    return site.tower != "language" or position == "image"


def _twins(values: Sequence[float]) -> np.ndarray:
    """[2, n] of the safe and the unsafe twins."""
    return np.asarray(values, dtype=np.float64).reshape(2, -1)


def _plain_outcomes(lvlm: HookedLVLM, batch: PairBatch, outcome: Outcome) -> list[float]:
    with torch.no_grad():
        logits = lvlm(batch.inputs, logits_to_keep=logits_needed(outcome, batch.inputs))
        return read_outcome(outcome, logits, batch.inputs).tolist()


def _sweep(
    lvlm: HookedLVLM,
    batch: PairBatch,
    cells: Sequence[Cell],
    outcome: Outcome,
    untouched: torch.Tensor,
    batch_size: int,
    done: CellLog,
    bar: Any,
) -> Iterator[tuple[Cell, list[float]]]:
    """Outcomes [2n] of a batch in every cell it can have; the cache holds one layer at a time."""
    mine = [cell for cell in cells if batch.has_images or not _needs_image(cell)]
    keep = logits_needed(outcome, batch.inputs)

    def key(cell: Cell) -> str:
        return f"{cell[0]} {cell[1]} from {batch.index[0]}"

    for _, layer in groupby(mine, key=lambda cell: (cell[0].tower, cell[0].layer)):
        here = list(layer)
        todo = [cell for cell in here if key(cell) not in done]
        sites = list(dict.fromkeys(site for site, _ in todo))
        cached: dict[str, torch.Tensor] = {}
        if sites:
            with torch.no_grad():
                cached = dict(lvlm.run_with_cache(batch.inputs, sites=sites, logits_to_keep=1)[1].items())
        for site in sites:
            own = cached.pop(str(site))
            names = [position for at, position in todo if at == site]
            swaps = [
                batch.swap(name) if site.tower == "language" else Swap.everything(*own.shape[:2]) for name in names
            ]
            values = patched_outcomes(
                lvlm,
                batch.inputs,
                site=site,
                own=own,
                donor=own[batch.twins],
                swaps=swaps,
                untouched=untouched,
                outcome=outcome,
                batch_size=batch_size,
                logits_to_keep=keep,
            )
            for name, row in zip(names, values.tolist(), strict=True):
                done.add(key((site, name)), row)
        bar.update(len({site for site, _ in here}))
        yield from ((cell, done[key(cell)]) for cell in here)


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
    measured = np.isfinite(patched[0])
    for kept in {tuple(column.tolist()) for column in measured.T}:
        index = np.flatnonzero(kept)
        columns = np.flatnonzero((np.asarray(kept) == measured.T).all(axis=1))
        safe, unsafe = (np.repeat(part[index, None], len(columns), axis=1) for part in untouched)
        effects = effects_of(safe, unsafe, *(part[np.ix_(index, columns)] for part in patched))
        intervals = summarise(effects, [groups[i] for i in index], n_boot=n_boot, seed=seed)
        for at, column in enumerate(columns.tolist()):
            site, position = cells[column]
            shared = {**site_columns(site), "position": position, "metric": metric_name(outcome)}
            rows[column] = [
                {
                    **shared,
                    "effect": effect,
                    "value": ci.estimate[at],
                    "ci_low": ci.low[at],
                    "ci_high": ci.high[at],
                }
                | {"n": len(index), "seed": seed}
                for effect, ci in intervals.items()
            ]
    for column, (site, position) in enumerate(cells):
        for i in np.flatnonzero(measured[:, column]).tolist():
            pair_rows.append(
                {**site_columns(site), "position": position, "pair": i, "group": groups[i]}
                | {"safe": untouched[0, i], "unsafe": untouched[1, i]}
                | {"safe_patched": patched[0, i, column], "unsafe_patched": patched[1, i, column]}
            )
    settings = settings | {
        "n": len(pairs),
        "groups": len(set(groups)),
        "n_boot": n_boot,
        "seed": seed,
        "confidence": 0.95,
        "versions": package_versions(),
    }
    frame = tidy([row for column in sorted(rows) for row in rows[column]], COLUMNS)
    return MediationResult(frame, settings, tidy(pair_rows, PAIR_COLUMNS))
