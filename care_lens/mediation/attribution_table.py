"""The table of attributions: filled batch by batch, then means with intervals, a row a unit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

from care_lens.core import Interval, Site, cluster_bootstrap
from care_lens.core.details import site_columns, tidy
from care_lens.mediation.attribution_units import Cell

ESTIMATE = "NIE estimate"

KINDS: tuple[str, ...] = ("site", "head", "neuron", "patch")
_PLACE = ("kind", "tower", "layer", "component", "head", "neuron", "patch", "mediator", "position")
COLUMNS = (*_PLACE, "metric", "effect", "value", "ci_low", "ci_high", "n", "seed")
PAIR_COLUMNS = ("tower", "layer", "component", "head", "neuron", "mediator", "position", "pair", "group", "value")
_CELLS = 4096


@dataclass
class AttributionTable:
    """Attributions [n, units] of every cell, filled batch by batch."""

    n: int
    cells: dict[Cell, ndarray] = field(default_factory=dict)

    def add(self, cell: Cell, index: Sequence[int], values: ndarray) -> None:
        """Put in what some pairs have of a cell; where they have fewer units than others the rest is missing."""
        held = self.cells.get(cell, np.full((self.n, 0), np.nan))
        if (more := values.shape[1] - held.shape[1]) > 0:
            held = np.pad(held, ((0, 0), (0, more)), constant_values=np.nan)
        held[list(index), : values.shape[1]] = values
        self.cells[cell] = held

    def frames(self, groups: Sequence[str], metric: str, neurons: int, n_boot: int, seed: int) -> tuple[Any, Any]:
        """The frame, and its details.

        Args:
            groups: Of the pairs.
            metric: The outcome's name.
            neurons: Of how many neurons (those with the largest means) the details have every pair.
            n_boot: Bootstrap resamples.
            seed: Their seed.
        """
        rows: list[dict[str, Any]] = []
        pair_rows: list[dict[str, Any]] = []
        least = self._least_neuron(neurons)
        for cell, values in sorted(self.cells.items(), key=lambda item: (KINDS.index(item[0].kind), item[0].site)):
            estimate, low, high, counts = _intervals(values, groups, n_boot, seed)
            for unit in range(values.shape[1]):
                place = unit_columns(cell.kind, cell.site, cell.position, unit)
                rows.append(
                    {**place, "metric": metric, "effect": ESTIMATE, "value": estimate[unit]}
                    | {"ci_low": low[unit], "ci_high": high[unit], "n": int(counts[unit]), "seed": seed}
                )
                if cell.kind == "neuron" and abs(estimate[unit]) < least:
                    continue
                pair_rows += [
                    {**place, "pair": pair, "group": groups[pair], "value": values[pair, unit]}
                    for pair in np.flatnonzero(np.isfinite(values[:, unit])).tolist()
                ]
        frame = tidy(rows, COLUMNS).astype({"patch": "Int64"})
        return frame, tidy(pair_rows, PAIR_COLUMNS)

    def _least_neuron(self, neurons: int) -> float:
        """The smallest mean, in size, of the neurons that are kept pair by pair."""
        means = [np.abs(np.nanmean(values, axis=0)) for cell, values in self.cells.items() if cell.kind == "neuron"]
        if neurons < 1 or not means:
            return np.inf
        ordered = np.sort(np.concatenate(means))
        return float(ordered[-min(neurons, len(ordered))])


def unit_columns(kind: str, site: Site, position: str, unit: int) -> dict[str, Any]:
    """The place of a unit, for a frame."""
    name = str(site) if kind in ("site", "patch") else f"{site}[{unit}]"
    return {
        "kind": kind,
        **site_columns(site),
        "head": unit if kind == "head" else None,
        "neuron": unit if kind == "neuron" else None,
        "patch": unit if kind == "patch" else None,
        "mediator": name,
        "position": f"patch {unit}" if kind == "patch" else position,
    }


def _intervals(
    values: ndarray, groups: Sequence[str], n_boot: int, seed: int
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Means over the pairs that have the unit, their intervals and numbers, [units] each."""
    finite = np.isfinite(values)
    out = np.full((3, values.shape[1]), np.nan)
    for kept in {tuple(column) for column in finite.T.tolist()}:
        index = np.flatnonzero(kept)
        if not len(index):
            continue
        columns = np.flatnonzero((np.asarray(kept) == finite.T).all(axis=1))
        labels = [groups[i] for i in index.tolist()]
        for start in range(0, len(columns), _CELLS):
            some = columns[start : start + _CELLS]
            found: Interval = cluster_bootstrap(
                values[np.ix_(index, some)], labels, kind="numbers", n_boot=n_boot, seed=seed
            )
            out[:, some] = found
    return out[0], out[1], out[2], finite.sum(axis=0)
