"""Scores of all edges of one batch: what senders write more, times gradients through each receiver alone.

:mod:`care_lens.mediation.edges` says what they mean.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from care_lens.core import BaseOutcome, Site
from care_lens.core.site import Tower
from care_lens.core.verdicts import read_out
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.edge_nodes import ATTN, MID, MLP, POST, PRE, PROJECTOR, Node, position_of
from care_lens.mediation.interpolation import PATCHES, WORDS, entry_hook, halves, owners
from care_lens.mediation.mediators import HEADS
from care_lens.mediation.pairs import PairBatch, bound, logits_needed
from care_lens.mediation.patching import read_outcome


class EdgeScores:
    """The runs of one batch: both ends once, then a graph a node."""

    def __init__(
        self,
        lvlm: HookedLVLM,
        batch: PairBatch,
        outcome: BaseOutcome,
        senders: Sequence[Node],
        receivers: Sequence[Node],
    ) -> None:
        self._lvlm, self._batch, self._receivers = lvlm, batch, receivers
        towers: tuple[Tower, ...] = ("vision", "language") if batch.has_images else ("language",)
        self._layers: dict[Tower, range] = {tower: range(lvlm.n_layers(tower)) for tower in towers}
        self._keep = logits_needed(outcome, batch.inputs)
        self._entries = [PATCHES, WORDS] if batch.has_images and PATCHES in lvlm.sites() else [WORDS]
        self._written = list(dict.fromkeys(node.site for node in senders))
        sites = list(dict.fromkeys([*self._entries, *self._written]))
        with torch.no_grad():
            logits, cache = lvlm.run_with_cache(batch.inputs, sites=sites, logits_to_keep=self._keep)
            outcome = bound(outcome, batch, logits)
            untouched = read_outcome(outcome, logits, batch.inputs).numpy()
        self.total = untouched[batch.n :] - untouched[: batch.n]
        self._starts: dict[Site, Tensor] = {}
        self._differences: dict[Site, Tensor] = {}
        for site in sites:
            safe, unsafe = halves(cache[str(site)], site)
            self._differences[site] = unsafe - safe
            if site in self._entries:
                self._starts[site] = safe.clone()
        self._outcome = outcome.for_rows(list(range(batch.n)))
        self._inputs = batch.inputs.rows(range(batch.n))

    def scores(self, at: float) -> Any:
        """Pairs of an edge and its score [n] with gradients of the run at one node between the twins."""
        image = self._inputs.spans.image if PATCHES in self._entries else None
        held: dict[Site, Tensor] = {}

        def keep(site: Site) -> Any:
            def kept(activation: Tensor, hook: Any) -> Tensor:
                held[site] = activation
                return activation

            return kept

        hooks: list[Any] = [
            (site, entry_hook(self._starts[site] + at * self._differences[site], image if site == WORDS else None))
            for site in self._entries
        ]
        parts = [
            Site(tower, layer, name)
            for tower, layers in self._layers.items()
            for layer in layers
            for name in (PRE, HEADS, ATTN, MID, MLP)
        ]
        parts += [Site(tower, layers[-1], POST) for tower, layers in self._layers.items()]
        parts += [PROJECTOR] if "vision" in self._layers else []
        hooks += [(site, keep(site)) for site in sorted(set(parts))]
        with torch.enable_grad():
            logits = self._lvlm.run_with_hooks(self._inputs, fwd_hooks=hooks, logits_to_keep=self._keep)
            value = read_out(self._outcome, logits, self._inputs).sum()
            outputs = {node.site: held[node.site] for node in self._receivers}
            gradients = dict(
                zip(outputs, torch.autograd.grad(value, list(outputs.values()), retain_graph=True), strict=True)
            )
            for receiver in self._receivers:
                yield from self._of_receiver(receiver, held, gradients[receiver.site])

    def _of_receiver(self, receiver: Node, held: dict[Site, Tensor], gradient: Tensor) -> Any:
        """Scores of the edges into one receiver."""
        tower, layer, component = receiver.site.tower, receiver.site.layer, receiver.site.component
        assert layer is not None
        if component == POST:
            read, stream = gradient, held[receiver.site]
        else:
            stream = held[Site(tower, layer, PRE if component == HEADS else MID)]
            cotangent = gradient
            if component == HEADS:
                # Through this head's queries, keys and values alone.
                cotangent = torch.zeros_like(gradient)
                cotangent[:, :, receiver.head] = gradient[:, :, receiver.head]
            (read,) = torch.autograd.grad(held[receiver.site], stream, cotangent, retain_graph=True)
        yield from self._of_senders(receiver, tower, read, held)
        if tower == "language" and "vision" in self._layers:
            end = held[Site("vision", self._layers["vision"][-1], POST)]
            first = held[Site("language", 0, PRE)]
            inside = self._inputs.spans.image.to(read.device)[..., None]
            at_pictures = torch.where(inside, read, torch.zeros_like(read))
            given = torch.autograd.grad(
                first, [held[PROJECTOR], end], at_pictures, retain_graph=True, allow_unused=True
            )
            if given[0] is not None:
                score = (given[0].double() * self._differences[PROJECTOR].double()).flatten(1).sum(dim=1)
                yield (Node(PROJECTOR), receiver), self._by_pair(score, PROJECTOR)
            if given[1] is not None:
                yield from self._of_senders(receiver, "vision", given[1], held)

    def _of_senders(self, receiver: Node, tower: Tower, read: Tensor, held: dict[Site, Tensor]) -> Any:
        """Scores of the senders of a tower, whose stream the receiver reads with a gradient."""
        for layer in self._layers[tower]:
            z, attn, mlp = (Site(tower, layer, name) for name in (HEADS, ATTN, MLP))
            if position_of(Node(z, 0)) < position_of(receiver):
                (pulled,) = torch.autograd.grad(held[attn], held[z], read, retain_graph=True)
                score = (pulled.double() * self._differences[z].double()).sum(dim=(1, 3))
                for head in range(score.shape[1]):
                    yield (Node(z, head), receiver), self._by_pair(score[:, head], z)
            if position_of(Node(mlp)) < position_of(receiver):
                score = (read.double() * self._differences[mlp].double()).flatten(1).sum(dim=1)
                yield (Node(mlp), receiver), self._by_pair(score, mlp)

    def _by_pair(self, score: Tensor, site: Site) -> np.ndarray:
        total = torch.zeros(self._batch.n, dtype=torch.float64)
        total.index_add_(0, owners(self._batch, site), score.detach().cpu())
        return total.numpy()
