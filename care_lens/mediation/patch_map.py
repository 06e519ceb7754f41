"""Patch map: the natural indirect effect of each patch of the picture, at one site.

For each patch of the safe twin's picture, the activation of its token is replaced by that of the same patch
in the unsafe run: NIE_p = Y(x with M_p := M_p(x*)) - Y(x). At ``blocks.0.hook_resid_pre`` that is what the
language model is given of that patch; at sites of the vision tower it is the patch there, before later layers
mix it with others. Patches interact, so that their effects need not add up to that of the whole image.

A picture that is cut in tiles has several grids of patches: those of the overview and of every tile, one after the other. Their map is
measured in the language tower, where each has tokens of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool

from care_lens.core import BaseOutcome, Outcome, PairedExamples, Site, SiteLike
from care_lens.core.details import DetailedResult, metric_name, sampling, site_columns, tidy
from care_lens.core.outcome import logits_outcome
from care_lens.core.spans import PatchGrid
from care_lens.lvlm import HookedLVLM, Replay
from care_lens.mediation.pairs import PairBatch, bound, logits_needed, pair_batches, require_shared
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.regions import Region, region_settings
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import Part, Sweep, one_cell, require_options, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PLACE = ("tower", "layer", "component", "patch", "grid", "row", "col")
COLUMNS = (*_PLACE, "metric", "effect", "value", "ci_low", "ci_high", "n", "seed")
PAIR_COLUMNS = (*_PLACE, "pair", "group", "value", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class PatchMapResult(DetailedResult):
    """Effects of picture patches at one site.

    Attributes:
        frame: One row a patch: tower, layer, component, patch (index in row-major order, grid after grid), grid (index of the grid or
            tile), row, col, metric, effect ("NIE"), value (mean over pairs, in the outcome's unit), ci_low, ci_high, n (pairs), seed.
        settings: Site, rows and cols of the first grid, rows and cols of all ("grids"), mean total effect ("TE"), resolution (relative: effects that cannot be
            told from rounding are 0, see ``care_lens.mediation.resolution``), outcome, n_boot, seed, versions.
        details: One row a patch and pair: its NIE as value, and the rectangle x0, y0, x1, y1 in pixels of the
            unsafe twin's picture that the patch covers.
    """

    @property
    def grid(self) -> np.ndarray:
        """[rows, cols] mean NIE; of a picture in tiles that of the first grid. Patches that were not asked for are missing."""
        return self.grids[0]

    @property
    def grids(self) -> list[np.ndarray]:
        """For each grid [rows, cols] mean NIE."""
        shapes = self.settings.get("grids", [[self.settings["rows"], self.settings["cols"]]])
        out = [np.full(tuple(shape), np.nan) for shape in shapes]
        number = self.frame["grid"] if "grid" in self.frame.columns else [0] * len(self.frame)
        for at, row, col, value in zip(number, self.frame["row"], self.frame["col"], self.frame["value"], strict=True):
            out[at][row, col] = value
        return out

    def plot(self) -> "go.Figure":
        """Effects over the picture; of a picture in tiles one panel a grid."""
        from care_lens.plots import plot_patch_effects
        from care_lens.plots.regions import plot_tiles

        return plot_tiles(self) if len(self.grids) > 1 else plot_patch_effects(self)


def patch_map(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome | BaseOutcome,
    site: SiteLike = "blocks.0.hook_resid_pre",
    region: Region | None = None,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | FilePath | None = None,
) -> PatchMapResult:
    """Natural indirect effect of each patch of the picture.

    Args:
        lvlm: The model.
        pairs: The pairs; both twins of each have a picture, cut into the same grid, or into the same tiles.
        outcome: Larger where the model is less safe.
        site: Where patches are exchanged, in any tower; of pictures in tiles in the language tower.
        region: Only the patches of this part of the picture are exchanged; None: all.
        batch_size: Sequences in a forward pass.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        checkpoint: A file in which what is finished is kept; a stopped sweep goes on from it.

    Returns:
        The effects, patch by patch.

    Raises:
        MediationError: If a number is none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If a pair lacks a picture, grids differ, the model has no such site, or it cannot be
            edited; or the checkpoint is of another map.
    """
    require_options(batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    place = Site.parse(site)
    if not lvlm.site_info(place).editable or place.component == "attn.hook_pattern":
        raise ValueError(f"site must be editable and have a patch axis, got {place}")
    regions = {} if region is None else {region.name: region}
    own = logits_outcome(outcome)
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size, regions=regions)
    require_shared(batches, ("image",))
    grids = _shared_grids(batches, place)
    n_patches = sum(grid.rows * grid.cols for grid in grids)
    asked = _asked(batches, region, len(pairs), n_patches)
    wanted = np.flatnonzero(asked.any(axis=0)).tolist()
    made = {
        "site": str(place),
        **region_settings(regions),
        **sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size),
    }
    sweep = Sweep(checkpoint, settings=made)

    def parts() -> Iterator[Part[PairBatch]]:
        for batch in batches:

            def make(batch: PairBatch = batch) -> list[Any]:
                return [part.tolist() for part in _patched(lvlm, batch, place, own, wanted, batch_size)]

            yield Part(batch, [f"from {batch.index[0]}"], one_cell(make))

    safe, total = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
    outcomes = np.full((len(pairs), len(wanted)), np.nan)
    for batch, (found,) in sweep.run(parts(), total=len(batches), desc="patching", progress=progress):
        index = list(batch.index)
        untouched, patched = map(np.asarray, found)
        safe[index] = untouched[: batch.n]
        total[index] = untouched[batch.n :] - untouched[: batch.n]
        outcomes[index] = patched
    effects = resolved(outcomes - safe[:, None], outcomes, safe[:, None], spacing=spacing(lvlm))
    effects[~asked[:, wanted]] = np.nan
    cells = _cells(place, grids, wanted)
    shared = {"metric": metric_name(outcome), "effect": "NIE", "seed": seed}
    rows: list[dict[str, Any]] = [{} for _ in cells]
    for kept in {tuple(column) for column in asked[:, wanted].T.tolist()}:
        index = np.flatnonzero(kept)
        columns = np.flatnonzero((np.array(kept) == asked[:, wanted].T).all(axis=1))
        some = np.ix_(index, columns)
        labels = [pairs.groups[i] for i in index.tolist()]
        interval = mean_effect(effects[some], labels, outcomes[some], safe[index], n_boot=n_boot, seed=seed)
        for at, column in enumerate(columns.tolist()):
            rows[column] = {
                **cells[column],
                **shared,
                "value": interval.estimate[at],
                "ci_low": interval.low[at],
                "ci_high": interval.high[at],
                "n": len(index),
            }
    settings: dict[str, Any] = {
        **made,
        "rows": grids[0].rows,
        "cols": grids[0].cols,
        "grids": [[grid.rows, grid.cols] for grid in grids],
        "TE": float(total.mean()),
        "resolution": spacing(lvlm),
        **sampling(len(pairs), pairs.groups, n_boot, seed),
    }
    return PatchMapResult(tidy(rows, COLUMNS), settings, _pair_frame(batches, pairs, cells, effects))


def _shared_grids(batches: Sequence[PairBatch], site: Site) -> tuple[PatchGrid, ...]:
    if lacking := [pair for batch in batches if not batch.has_images for pair in batch.index]:
        raise ValueError(f"both twins of every pair must have a picture, got none in pairs {lacking}; leave those out")
    rows = [row for batch in batches for row in batch.inputs.spans.grids]
    shapes = {tuple((grid.rows, grid.cols, grid.image) for grid in row) for row in rows}
    if len(shapes) != 1:
        raise ValueError(
            f"every twin must have its pictures cut into the same grids of tokens, got {len(shapes)} kinds, such as "
            f"{[[cell[:2] for cell in kind] for kind in sorted(shapes)[:2]]}; use pictures of one size"
        )
    if site.tower != "language" and len(rows[0]) != 1:
        raise ValueError(
            f"every picture must be one grid of tokens for {site}, got {len(rows[0])} grids: it is cut in tiles; use "
            "site='blocks.0.hook_resid_pre'"
        )
    return rows[0]


def _asked(
    batches: Sequence[PairBatch], region: Region | None, n: int, n_patches: int
) -> Bool[np.ndarray, "pair patch"]:
    """[pair, patch] which patches are exchanged."""
    asked = np.full((n, n_patches), region is None)
    if region is None:
        return asked
    for batch in batches:
        mask = batch.mask(region.name)
        for at, pair in enumerate(batch.index):
            asked[pair] = mask[at, _positions(batch, at)].numpy()
    return asked


def _positions(batch: PairBatch, row: int) -> list[int]:
    """Positions of a row's patches, grid after grid."""
    return [at for grid in batch.inputs.spans.grids[row] for at in grid.positions()]


def _cells(site: Site, grids: Sequence[PatchGrid], wanted: Sequence[int]) -> list[dict[str, Any]]:
    places = [
        (number, at // grid.cols, at % grid.cols)
        for number, grid in enumerate(grids)
        for at in range(grid.rows * grid.cols)
    ]
    names = ("grid", "row", "col")
    return [{**site_columns(site), "patch": p, **dict(zip(names, places[p], strict=True))} for p in wanted]


def _patched(
    lvlm: HookedLVLM, batch: PairBatch, site: Site, outcome: BaseOutcome, wanted: Sequence[int], batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """[2n] untouched outcomes, and [n, patch] outcomes of the safe rows with one patch exchanged."""
    keep = logits_needed(outcome, batch.inputs)
    replay = None
    with torch.no_grad():
        logits, cache = lvlm.run_with_cache(batch.inputs, sites=[site], logits_to_keep=keep)
        outcome = bound(outcome, batch, logits)
        safe = batch.inputs.rows(range(batch.n))
        if site.tower == "language":
            replay, _ = Replay.of(lvlm, safe, logits_to_keep=keep)
    untouched = read_outcome(outcome, logits, batch.inputs)
    own, donor = cache[str(site)].split(batch.n)
    patched = patched_outcomes(
        lvlm,
        safe,
        patches=[{site: _swap(lvlm, batch, site, own.shape[1], patch)} for patch in wanted],
        own={site: own},
        donor={site: donor},
        untouched=untouched[: batch.n],
        outcome=outcome,
        batch_size=batch_size,
        logits_to_keep=keep,
        replay=replay,
    )
    return untouched.numpy(), patched.T.numpy()


def _swap(lvlm: HookedLVLM, batch: PairBatch, site: Site, length: int, patch: int) -> Swap:
    """Exchange one patch of every safe row with the same patch of its unsafe twin."""
    if site.tower == "language":
        at = torch.tensor([_positions(batch, row)[patch] for row in range(2 * batch.n)])
    else:
        at = torch.full((2 * batch.n,), _first_patch(lvlm, batch, site, length) + patch)
    here, there = at.split(batch.n)
    mask = torch.arange(length) == here[:, None]
    return Swap(mask, there[:, None].expand(-1, length))


def _first_patch(lvlm: HookedLVLM, batch: PairBatch, site: Site, length: int) -> int:
    """Index of the first patch in a vision or projector activation whose patches are the image tokens one by one."""
    family, config = lvlm.family, lvlm.hf_model.config
    before, after = family.class_tokens(config), family.closing_tokens(config)
    spare = length - _patches(batch)
    if spare not in ((before + after,) if site.tower == "vision" else (0, before)):
        raise ValueError(
            f"patches at {site} must be the image tokens one by one, got {length} of them for {_patches(batch)} tokens; "
            "use site='blocks.0.hook_resid_pre'"
        )
    return before if site.tower == "vision" else spare


def _patches(batch: PairBatch) -> int:
    grid = batch.inputs.spans.grids[0][0]
    return grid.rows * grid.cols


def _pair_frame(
    batches: Sequence[PairBatch], pairs: PairedExamples, cells: Sequence[dict[str, Any]], effects: np.ndarray
) -> pd.DataFrame:
    rows = []
    for batch in batches:
        for at, pair in enumerate(batch.index):
            grids = batch.inputs.spans.grids[batch.n + at]
            boxes = [grid.rectangle(position) for grid in grids for position in grid.positions()]
            for p, cell in enumerate(cells):
                if np.isfinite(effects[pair, p]):
                    box = dict(zip(("x0", "y0", "x1", "y1"), boxes[cell["patch"]], strict=True))
                    rows.append({**cell, "pair": pair, "group": pairs.groups[pair], "value": effects[pair, p], **box})
    return tidy(rows, PAIR_COLUMNS).sort_values(["pair", "patch"], ignore_index=True)
