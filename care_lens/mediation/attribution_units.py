"""Attributions of a batch by unit: gradients times differences as heads, neurons, components and patches have them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from care_lens.core import Site
from care_lens.mediation.interpolation import Found, Plan, owners
from care_lens.mediation.mediators import HEADS, NEURONS
from care_lens.mediation.pairs import PairBatch, require_whole_pictures

_UNIT = {HEADS: "head", NEURONS: "neuron"}


@dataclass(frozen=True)
class Cell:
    """Units of one kind at a site and a position."""

    kind: str
    site: Site
    position: str


def kept(batch: PairBatch, plan: Plan, found: Found) -> list[Any]:
    """What a checkpoint keeps of a batch, JSON-able: outcomes [2, n], entering [n], and the cells with their values [n, units]."""
    cells = [[one.kind, str(one.site), one.position, values.tolist()] for one, values in _cells(batch, plan, found)]
    return [np.asarray(found.untouched).tolist(), np.asarray(found.entering).tolist(), cells]


def _cells(batch: PairBatch, plan: Plan, found: Found) -> Iterator[tuple[Cell, ndarray]]:
    """For every cell the batch has, [n, units]; missing where a pair has no such position."""
    for site in plan.sites:
        if site not in found.scores:
            continue
        score = found.scores[site].cpu()
        score = score if score.ndim == 3 else score[..., None]
        kind = _UNIT.get(site.component, "site")
        if site.tower != "language":
            total = torch.zeros(batch.n, score.shape[2], dtype=torch.float64)
            total.index_add_(0, owners(batch, site), score.sum(dim=1))
            yield Cell(kind, site, "all"), total.numpy()
            for region in batch.regions:
                yield Cell(kind, site, region), _in_region(batch, site, region, score, found.picture[site])
            continue
        for position in plan.positions:
            mask = batch.mask(position)[: batch.n]
            total = torch.einsum("np,npu->nu", mask.double(), score)
            total[~mask.any(dim=1)] = torch.nan
            yield Cell(kind, site, position), total.numpy()
    for site in plan.patches:
        if batch.has_images:
            yield Cell("patch", site, "patch"), _by_patch(batch, site, found)


def _in_region(batch: PairBatch, site: Site, region: str, score: Tensor, picture: Tensor) -> ndarray:
    """[n, units] over the patches of a region; missing where a pair has none."""
    require_whole_pictures([batch], [site])
    mask = batch.patches(region, torch.cat([picture, picture]))[: len(picture)]
    total = torch.zeros(batch.n, score.shape[2], dtype=torch.float64)
    total.index_add_(0, owners(batch, site), torch.einsum("ep,epu->eu", mask.double(), score))
    total[~batch.mask(region)[: batch.n].any(dim=1)] = torch.nan
    return total.numpy()


def _by_patch(batch: PairBatch, site: Site, found: Found) -> ndarray:
    """[n, patch] in raster order, image after image."""
    score = found.scores[site].cpu()
    score = score if score.ndim == 2 else score.sum(dim=2)
    lists = patch_places(batch, site, found.picture.get(site))
    out = np.full((batch.n, max(map(len, lists))), np.nan)
    for pair, places in enumerate(lists):
        for patch, (row, position) in enumerate(places):
            out[pair, patch] = float(score[row, position])
    return out


def patch_places(batch: PairBatch, site: Site, picture: Tensor | None) -> list[list[tuple[int, int]]]:
    """For each pair the row and the position of its patches in the safe half of a site's activation, in raster order.

    Args:
        batch: The pairs.
        site: A site of any tower.
        picture: [entry, pos] which positions are patches of the picture; not needed in the language tower.
    """
    if site.tower == "language" or picture is None:
        grids = batch.inputs.spans.grids[: batch.n]
        return [[(row, at) for grid in grids[row] for at in grid.positions()] for row in range(batch.n)]
    out: list[list[tuple[int, int]]] = [[] for _ in range(batch.n)]
    for entry, row in enumerate(owners(batch, site).tolist()):
        out[row] += [(entry, at) for at in picture[entry].nonzero()[:, 0].tolist()]
    return out
