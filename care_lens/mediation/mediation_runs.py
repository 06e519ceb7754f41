"""The runs behind a mediation sweep: a batch of twins as it is, and with each cell's activations exchanged."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from care_lens.core import BaseOutcome, GeneratedOutcome, Site
from care_lens.lvlm import HookedLVLM, Replay
from care_lens.mediation.mediation_cells import Cell, needs_image
from care_lens.mediation.mediators import Mediator
from care_lens.mediation.pairs import PairBatch, bound, logits_needed
from care_lens.mediation.patching import Patch, Swap, generated_outcome, patched_outcomes, read_outcome
from care_lens.mediation.sweep import Part


def plain_outcomes(lvlm: HookedLVLM, batch: PairBatch, outcome: BaseOutcome) -> list[float]:
    """Outcomes [2n] of a batch as it is."""
    if isinstance(own := bound(outcome, batch, None), GeneratedOutcome):
        return generated_outcome(own, lvlm, batch.inputs, list(range(2 * batch.n)), []).tolist()
    with torch.no_grad():
        logits = lvlm(batch.inputs, logits_to_keep=logits_needed(outcome, batch.inputs))
        return read_outcome(bound(outcome, batch, logits), logits, batch.inputs).tolist()


class MediationRuns:
    """The cells of one batch; what replay and outcome need is run when the first cell is that is not done yet."""

    def __init__(
        self,
        lvlm: HookedLVLM,
        batch: PairBatch,
        outcome: BaseOutcome,
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

    def parts(self, cells: Sequence[Cell]) -> Iterator[Part[tuple["MediationRuns", list[Cell]]]]:
        """Every cell that the batch can have, those of mediators in the same layers together; values are outcomes [2n]."""
        mine = [cell for cell in cells if self._batch.has_images or not needs_image(cell, self._batch.regions)]
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
            generates = isinstance(self._outcome, GeneratedOutcome)
            logits = None
            if bound(self._outcome, self._batch, None).compares:
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
