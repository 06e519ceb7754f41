"""Patching: run rows of a batch with positions of activations replaced, many replacements in one pass.

A patch replaces, at one or several sites, some positions of a row by its donor's, all of the activation or only some
heads or neurons of it. A patch that would write what is there already is not run, since its outcome is the untouched
one, and patches that come to the same are run once. (Twins that share their picture have the same activations in
the vision tower and, with a causal language model, at the image positions.) Where a
:class:`~care_lens.lvlm.Replay` of the batch is given, only what a patch can change is run; as passes are
then shorter, more patches go together, as many as take the memory of a whole batch. Hooks return new tensors and
write nowhere in place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from care_lens.core import BaseOutcome, GeneratedOutcome, Outcome, Site, as_outcome, require_outcome
from care_lens.core.display import ShortRepr
from care_lens.core.verdicts import read_out
from care_lens.lvlm import Edit, HookedLVLM, LVLMInputs, Replay


@dataclass(frozen=True, eq=False)
class Swap(ShortRepr):
    """Which positions of each row are replaced, and which positions of the donor replace them.

    Attributes:
        mask: [rows, pos] positions replaced.
        source: [rows, pos] index of the donor's position for each; read where the mask is true.
        units: Indices along the activation's third axis (heads of ``attn.hook_z``, neurons of ``mlp.hook_post``)
            that are replaced; None: all.
    """

    mask: Bool[Tensor, "rows pos"]
    source: Int[Tensor, "rows pos"]
    units: tuple[int, ...] | None = None

    @classmethod
    def everything(cls, rows: int, pos: int, *, units: tuple[int, ...] | None = None) -> "Swap":
        """Every position of every row by the same position of the donor."""
        return cls(torch.ones(rows, pos, dtype=torch.bool), torch.arange(pos).repeat(rows, 1), units)

    def apply(
        self, activation: Float[Tensor, "rows pos *rest"], donor: Float[Tensor, "rows donor_pos *rest"]
    ) -> Float[Tensor, "rows pos *rest"]:
        """The activation with the donor's values at the masked positions.

        Args:
            activation: [rows, pos, ...].
            donor: [rows, donor_pos, ...] one donor a row.

        Returns:
            A new tensor of the activation's shape.
        """
        rows = list(range(len(activation)))
        return _Exchange.of([self] * len(rows), list(self.mask), rows, donor).apply(activation, 0)

    def changed(
        self, activation: Float[Tensor, "rows pos *rest"], donor: Float[Tensor, "rows donor_pos *rest"]
    ) -> Bool[np.ndarray, "rows pos"]:
        """Where :meth:`apply` really changes something.

        Args:
            activation: [rows, pos, ...].
            donor: [rows, donor_pos, ...].

        Returns:
            [rows, pos].
        """
        return _Differences(activation, donor).under(self)


class _Differences:
    """Where activations differ from their donors', worked out once for all swaps that keep positions."""

    def __init__(self, own: Tensor, donor: Tensor) -> None:
        self._own, self._donor = own, donor
        self._aligned: Tensor | None = None

    def under(self, swap: Swap) -> np.ndarray:
        """[rows, pos] where the swap changes something."""
        pos = torch.arange(swap.mask.shape[1])
        if self._own.shape == self._donor.shape and bool(((swap.source == pos) | ~swap.mask).all()):
            if self._aligned is None:
                differs = self._own != self._donor
                self._aligned = (differs.flatten(3).any(-1) if differs.ndim > 3 else differs).cpu()
            units = self._aligned if swap.units is None else self._aligned[..., list(swap.units)]
            return (swap.mask & units.any(-1)).numpy()
        row, position = swap.mask.nonzero(as_tuple=True)
        device = self._own.device
        given = self._donor.to(device)[row.to(device), swap.source[row, position].to(device)]
        differs = given != self._own[row.to(device), position.to(device)]
        if swap.units is not None:
            differs = differs[:, list(swap.units)]
        out = torch.zeros_like(swap.mask)
        out[row, position] = differs.flatten(1).any(dim=1).cpu()
        return out.numpy()


@dataclass(frozen=True, eq=False)
class _Exchange:
    """What is replaced at one site in a pass: for each row of the pass the positions, where from, and of which donor."""

    mask: Tensor
    source: Tensor
    donor: Tensor
    donor_rows: Tensor
    units: Tensor | None

    @classmethod
    def of(cls, swaps: Sequence[Swap], masks: Sequence[Tensor], rows: Sequence[int], donor: Tensor) -> "_Exchange":
        """One swap and mask [pos] a row of the pass; ``rows`` are the batch's."""
        device = donor.device
        units = None
        if any(swap.units is not None for swap in swaps):
            units = torch.zeros(len(rows), donor.shape[2], dtype=torch.bool)
            for i, swap in enumerate(swaps):
                units[i, slice(None) if swap.units is None else list(swap.units)] = True
            units = units.to(device)
        source = torch.stack([swap.source[row] for swap, row in zip(swaps, rows, strict=True)])
        chosen = torch.tensor(list(rows), device=device)[:, None]
        return cls(torch.stack(list(masks)).to(device), source.to(device), donor, chosen, units)

    def apply(self, activation: Tensor, start: int) -> Tensor:
        """The activation of positions ``start`` and following, with what replaces it."""
        part = slice(start, start + activation.shape[1])
        moved = self.donor[self.donor_rows, self.source[:, part]].to(activation.device, activation.dtype)
        mask = self.mask[:, part].reshape(len(moved), -1, *(1 for _ in activation.shape[2:]))
        if self.units is not None:
            mask = mask & self.units.reshape(len(moved), 1, -1, *(1 for _ in activation.shape[3:]))
        return torch.where(mask.to(activation.device), moved, activation)


Patch = Mapping[Site, Swap]
"""What is replaced together: a swap for each site."""


@dataclass(frozen=True, eq=False)
class _Job:
    """One row of one patch (or of several that come to the same), and which positions it changes at each site."""

    row: int
    patches: list[int]
    changed: Mapping[Site, np.ndarray]

    @property
    def start(self) -> int:
        """The first position that changes anywhere."""
        return min(int(part.argmax()) for part in self.changed.values() if part.any())


def patched_outcomes(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    *,
    patches: Sequence[Patch],
    own: Mapping[Site, Tensor],
    donor: Mapping[Site, Tensor],
    untouched: Float[Tensor, " rows"],
    outcome: Outcome | BaseOutcome,
    batch_size: int,
    logits_to_keep: int = 0,
    replay: Replay | None = None,
) -> Float[Tensor, "patches rows"]:
    """Outcomes of a batch under each patch.

    Args:
        lvlm: The model.
        inputs: The rows; at a vision or projector site each must have exactly one image.
        patches: What is replaced, one after the other.
        own: Site to the rows' activation [rows, pos, ...] there in an untouched run, for every site of the patches.
        donor: Site to the activation [rows, donor_pos, ...] that replaces each row's.
        untouched: [rows] outcomes of the untouched run.
        outcome: The outcome, bound to the batch where it needs that: its ``for_rows`` is given rows of it.
        batch_size: Rows of a whole forward pass; those of several patches go together.
        logits_to_keep: As in ``HookedLVLM.__call__``; must be that of the replay.
        replay: Of these inputs; None: forward passes are run whole.

    Returns:
        [patches, rows] float64 on the CPU.

    Raises:
        ValueError: If the outcome is not one finite number a row, or a site is not the model's.
    """
    own_outcome = as_outcome(outcome)
    values = untouched.to(torch.float64).repeat(len(patches), 1)
    for sites, jobs in _jobs(patches, own, donor).items():
        replayed = replay is not None and not isinstance(own_outcome, GeneratedOutcome) and replay.can(sites)
        length = inputs.input_ids.shape[1]
        for some in _batches(jobs, batch_size, length if replayed and replay is not None and replay.causal else 0):
            rows = [job.row for job in some]
            exchanges = {
                site: _Exchange.of(
                    [patches[job.patches[0]][site] for job in some],
                    [torch.from_numpy(job.changed[site]) for job in some],
                    rows,
                    donor[site],
                )
                for site in sites
            }
            if replayed and replay is not None:
                found = _replayed(replay, inputs, rows, exchanges, own_outcome)
                if found is None:
                    continue
            else:
                found = _whole(lvlm, inputs, rows, exchanges, own_outcome, logits_to_keep)
            for job, value in zip(some, found, strict=True):
                values[job.patches, job.row] = value
    return values


def _jobs(
    patches: Sequence[Patch], own: Mapping[Site, Tensor], donor: Mapping[Site, Tensor]
) -> dict[tuple[Site, ...], list[_Job]]:
    """What has to be run, by the sites at which something changes, in the order of the first position."""
    differences = {site: _Differences(own[site], donor[site]) for site in own}
    same: dict[tuple[Any, ...], _Job] = {}
    for i, patch in enumerate(patches):
        changed = {site: differences[site].under(swap) for site, swap in patch.items()}
        for row in np.flatnonzero(np.any([part.any(axis=1) for part in changed.values()], axis=0)).tolist():
            parts = [(site, part[row]) for site, part in changed.items() if part[row].any()]
            key = (
                row,
                *(
                    (site, part.tobytes(), patch[site].source[row].numpy()[part].tobytes(), patch[site].units)
                    for site, part in parts
                ),
            )
            if (job := same.get(key)) is not None:
                job.patches.append(i)
                continue
            same[key] = _Job(row, [i], {site: part[row] for site, part in changed.items()})
    out: dict[tuple[Site, ...], list[_Job]] = {}
    for job in same.values():
        out.setdefault(tuple(sorted(patches[job.patches[0]])), []).append(job)
    return {sites: sorted(jobs, key=lambda job: job.start) for sites, jobs in out.items()}


_KEPT = 0.25
"""Memory of a position of which only keys and values are held, beside one that is run."""


def _batches(jobs: Sequence[_Job], batch_size: int, length: int) -> list[list[_Job]]:
    """Jobs as passes: of ``batch_size`` rows, or of as many shorter ones as take their memory."""
    if length == 0:
        return [list(jobs[start : start + batch_size]) for start in range(0, len(jobs), batch_size)]
    out: list[list[_Job]] = []
    budget = batch_size * length * (1 + _KEPT)
    for job in jobs:
        row = length - out[-1][0].start + _KEPT * length if out else 0.0
        if not out or (len(out[-1]) + 1) * row > budget:
            out.append([])
        out[-1].append(job)
    return out


def _replayed(
    replay: Replay, inputs: LVLMInputs, rows: list[int], exchanges: Mapping[Site, _Exchange], outcome: BaseOutcome
) -> Tensor | None:
    """[rows] outcomes by replay; None if nothing that is read depends on the patches."""
    edits = []
    for site, exchange in exchanges.items():
        where = exchange.mask.any(dim=0).nonzero()[:, 0].tolist()
        if where:
            edits.append(Edit(site, where[0], where[-1] + 1, exchange.apply))
    if not replay.sees(edits):
        return None
    with torch.no_grad():
        return read_outcome(outcome, replay.logits(rows, edits), inputs.rows(rows), rows)


def _whole(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    rows: list[int],
    exchanges: Mapping[Site, _Exchange],
    outcome: BaseOutcome,
    logits_to_keep: int,
) -> Tensor:
    """[rows] outcomes by whole forward passes, or by generation."""
    part = inputs.rows(rows)
    prompt = inputs.input_ids.shape[1]

    def replace_positions(activation: Tensor, hook: Any, site: Site, exchange: _Exchange) -> Tensor | None:
        if site.tower == "language" and activation.shape[1] != exchange.mask.shape[1]:
            return None  # a token that is generated
        # Where pictures of several sizes share a row of patches, some rows alone are padded less than the whole batch.
        return exchange.apply(activation, 0)

    hooks = [(site, partial(replace_positions, site=site, exchange=exchange)) for site, exchange in exchanges.items()]
    if isinstance(outcome, GeneratedOutcome):
        if prompt == 1:
            raise ValueError("prompts must have more than one token to be patched while generating, got 1")
        return generated_outcome(outcome, lvlm, part, rows, hooks)
    with torch.no_grad():
        logits = lvlm.run_with_hooks(part, fwd_hooks=hooks, logits_to_keep=logits_to_keep)
        return read_outcome(outcome, logits, part, rows)


def generated_outcome(
    outcome: GeneratedOutcome, lvlm: HookedLVLM, inputs: LVLMInputs, rows: Sequence[int], fwd_hooks: Sequence[Any]
) -> Float[Tensor, " rows"]:
    """The outcome of generated answers to every row.

    Args:
        outcome: The outcome.
        lvlm: The model.
        inputs: The rows.
        rows: Which rows of the batch they are.
        fwd_hooks: Pairs of a place and a function.

    Returns:
        [rows] in float64, on the CPU; NaN where there is no answer.

    Raises:
        OutcomeError: If it is not one number for each row. It is a ValueError.
    """
    made: Any = outcome.generated(lvlm, inputs, rows, fwd_hooks)
    values = torch.from_numpy(made) if isinstance(made, np.ndarray) else made
    values = require_outcome(values, inputs.batch_size, outcome=outcome, missing=True)
    return values.detach().to("cpu", torch.float64)


def read_outcome(
    outcome: BaseOutcome,
    logits: Float[Tensor, "rows pos vocab"],
    inputs: LVLMInputs,
    rows: Sequence[int] | None = None,
) -> Float[Tensor, " rows"]:
    """The outcome of each row, checked.

    Args:
        outcome: The outcome.
        logits: [rows, pos, vocab].
        inputs: The rows.
        rows: Which rows of the batch they are, for outcomes that compare with the batch's own; None: all, in order.

    Returns:
        [rows] float64 on the CPU.

    Raises:
        OutcomeError: If it is not one finite number for each row. It is a ValueError.
    """
    own = outcome if rows is None else outcome.for_rows(rows)
    values = require_outcome(read_out(own, logits, inputs), inputs.batch_size, outcome=own)
    return values.detach().to("cpu", torch.float64)
