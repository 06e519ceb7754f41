"""The runs behind path effects: a sender's new output with everything between frozen, then what a receiver writes.

What a batch's paths have in common (the safe rows' outcome, the activations of both twins in a tower) is run when it is first needed.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from care_lens.core import BaseOutcome, Site
from care_lens.core.site import Tower
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.mediators import HEADS, Mediator
from care_lens.mediation.pairs import PairBatch, bound_to_rows, logits_needed, require_whole_pictures
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.path_places import END, WRITERS, writers_after


class PathRuns:
    """The safe rows of one batch, with what their components write, and the unsafe twins' activations."""

    def __init__(self, lvlm: HookedLVLM, batch: PairBatch, outcome: BaseOutcome, batch_size: int) -> None:
        self._lvlm, self._batch, self._batch_size = lvlm, batch, batch_size
        self._keep = logits_needed(outcome, batch.inputs)
        self._inputs = batch.inputs.rows(range(batch.n))
        self._held: dict[Tower, dict[Site, Tensor]] = {}
        self._given = outcome

    @cached_property
    def _read(self) -> tuple[BaseOutcome, Tensor]:
        """The outcome for the safe rows, and what it is of them untouched; run when it is first needed."""
        with torch.no_grad():
            logits = self._lvlm(self._batch.inputs, logits_to_keep=self._keep)
        outcome = bound_to_rows(self._given, self._batch, logits, range(self._batch.n))
        return outcome, read_outcome(outcome, logits[: self._batch.n], self._inputs)

    def untouched(self) -> list[float]:
        """[n] outcomes of the safe rows."""
        return self._read[1].tolist()

    def sent(self, sender: Mediator, position: str, receivers: Sequence[str]) -> list[list[float]]:
        """[n, receiver] outcomes of the safe rows with one path each."""
        place, n = sender.sites[0], self._batch.n
        frozen = {site: self._activations(site)[:n] for site in writers_after(self._lvlm, sender)}
        require_whole_pictures([self._batch], [place])
        both = self._activations(place)
        swap = self._swap(place, position, both.shape[1], sender.units)
        written: dict[Site, Tensor] = {}

        def send(activation: Tensor, hook: Any) -> Tensor:
            return swap.apply(activation, both[n:].to(activation.device, activation.dtype))

        def freeze(site: Site):
            def keep_what_was(activation: Tensor, hook: Any) -> Tensor:
                written[site] = activation.detach().clone()
                return frozen[site].to(activation.device, activation.dtype)

            return keep_what_was

        hooks = [(place, send), *((site, freeze(site)) for site in frozen)]
        with torch.no_grad():
            logits = self._lvlm.run_with_hooks(self._inputs, fwd_hooks=hooks, logits_to_keep=self._keep)
        out = [
            read_outcome(self._read[0], logits, self._inputs)
            if receiver == END
            else self._received(Site.parse(receiver), frozen, written)
            for receiver in receivers
        ]
        values = torch.stack(out, dim=1)
        if place.tower == "language":
            values[~swap.mask.any(dim=1)] = torch.nan
        return values.tolist()

    def _received(self, site: Site, frozen: dict[Site, Tensor], written: dict[Site, Tensor]) -> Tensor:
        """[n] outcomes of the safe run with what one receiver writes."""
        own = frozen[site]
        return patched_outcomes(
            self._lvlm,
            self._inputs,
            patches=[{site: Swap.everything(*own.shape[:2])}],
            own={site: own},
            donor={site: written[site]},
            untouched=self._read[1],
            outcome=self._read[0],
            batch_size=self._batch_size,
            logits_to_keep=self._keep,
        )[0]

    def _swap(self, site: Site, position: str, length: int, units: tuple[int, ...] | None) -> Swap:
        n = self._batch.n
        if site.tower != "language":
            return Swap.everything(n, length, units=units)
        both = self._batch.swap(position, units)
        return Swap(both.mask[:n], both.source[:n], units)

    def _activations(self, site: Site) -> Tensor:
        """[2n, ...] activations of both twins; those of one tower are read together."""
        if site.tower not in self._held:
            sites = [one for one in self._lvlm.sites(tower=site.tower) if one.component in (*WRITERS, HEADS)]
            with torch.no_grad():
                cache = self._lvlm.run_with_cache(self._batch.inputs, sites=sites, logits_to_keep=1)[1]
            self._held[site.tower] = {one: cache[str(one)] for one in sites}
        return self._held[site.tower][site]
