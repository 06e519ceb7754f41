"""Edges checked: path patching of the leading edges, and of as many drawn at random.

:func:`verify_edges` patches edges exactly. The sender takes the unsafe run's value in the safe run; every attention and MLP output between
sender and receiver, in both towers, stays what it was, and the projector is free; what the receiver then writes goes into the safe run, and
all that follows is free to change. Between sender and receiver of one tower this is :func:`~care_lens.mediation.path_effects`, by head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from care_lens.core import BaseOutcome, Outcome, PairedExamples, Site, examples_digest
from care_lens.core.details import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.core.outcome import logits_outcome
from care_lens.core.progress import Steps
from care_lens.lvlm import HookedLVLM, Replay
from care_lens.mediation.edge_nodes import ATTN, END, MLP, Node, nodes, position_of
from care_lens.mediation.edges import EdgeResult, edge_batches
from care_lens.mediation.mediators import HEADS
from care_lens.mediation.pairs import PairBatch, bound_to_rows, logits_needed
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.rank_measures import rank_measures
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = ("kind", "metric", "effect", "value", "ci_low", "ci_high", "n", "seed")
EDGE_COLUMNS = ("sender", "receiver", "kind", "top", "estimate", "value", "ci_low", "ci_high", "n")


@dataclass(frozen=True)
class EdgeVerification(DetailedResult):
    """How well edge scores rank edges.

    Attributes:
        frame: One row a kind of edge ("all", "vision", "language", "vision to language") and measure: metric (the outcome's name), effect
            ("spearman", "spearman of random", "miss rate"), value, ci_low, ci_high, n (edges patched), seed.
        settings: Top, random, numbers of edges, and what made it.
        details: One row an edge patched: sender, receiver, kind, top (1 of the leading ones, 0 drawn at random), estimate (its score), value
            (mean exact effect), ci_low, ci_high, n (pairs). Leading edges without effect, and large effects among those drawn, are misses.
    """

    def plot(self) -> "go.Figure":
        """Exact effects against scores."""
        from care_lens.plots.edges import plot_edge_verification

        return plot_edge_verification(self)


def verify_edges(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    edges: EdgeResult,
    *,
    outcome: Outcome | BaseOutcome,
    top: int = 20,
    random: int = 20,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> EdgeVerification:
    """Patch the edges with the largest scores, and as many drawn at random, exactly.

    Args:
        lvlm: The model.
        pairs: The pairs that the scores are of.
        edges: What :func:`~care_lens.mediation.edge_attribution` gave.
        outcome: The outcome of the scores.
        top: Edges that are patched because their scores are the largest in size.
        random: Edges drawn from the others.
        batch_size: Sequences in a forward pass, at least 2.
        n_boot: Bootstrap resamples.
        seed: Of the draw and of the resamples.
        progress: Whether to show a progress bar.

    Returns:
        Rank correlations and miss rates, and exact effects by edge.

    Raises:
        MediationError: If a number is none that it can be run with.
        ValueError: If the outcome is another than the scores', or the pairs are none that edges can be measured on.
    """
    require_options(
        top=top, random=random, batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2, "random": 0}
    )
    if describe_outcome(outcome) != edges.settings["outcome"]:
        raise ValueError(
            f"outcome must be that of the edges, {edges.settings['outcome']}, got {describe_outcome(outcome)}"
        )
    by_name = {node.name: node for some in nodes(lvlm) for node in some}
    frame = edges.frame
    drawn = np.random.default_rng(seed).choice(
        np.arange(top, len(frame)), size=min(random, max(0, len(frame) - top)), replace=False
    )
    index = [*range(min(top, len(frame))), *sorted(drawn.tolist())]
    chosen = [(by_name[row["sender"]], by_name[row["receiver"]]) for row in frame.iloc[index].to_dict("records")]
    exact = np.full((len(pairs), len(chosen)), np.nan)
    own = logits_outcome(outcome)
    batches = edge_batches(lvlm, pairs, outcome, batch_size)
    with Steps(total=len(batches) * len(chosen), desc="patching edges", disable=not progress) as bar:
        for batch in batches:
            run = _Exact(lvlm, batch, own, batch_size)
            for sender in dict.fromkeys(edge[0] for edge in chosen):
                mine = [i for i, edge in enumerate(chosen) if edge[0] == sender]
                exact[np.ix_(list(batch.index), mine)] = run.effects(sender, [chosen[i][1] for i in mine])
                bar.update(len(mine))
    rows = []
    for at, (sender, receiver) in enumerate(chosen):
        value, low, high = mean_effect(exact[:, at], list(pairs.groups), n_boot=n_boot, seed=seed)
        rows.append(
            {"sender": sender.name, "receiver": receiver.name, "kind": _kind(sender, receiver), "top": float(at < top)}
            | {
                "estimate": frame["value"].iloc[index[at]],
                "value": value,
                "ci_low": low,
                "ci_high": high,
                "n": len(pairs),
            }
        )
    details = tidy(rows, EDGE_COLUMNS)
    shared = {"metric": metric_name(outcome), "seed": seed}
    found = []
    for kind in ("all", *dict.fromkeys(details["kind"])):
        part = details if kind == "all" else pd.DataFrame(details[details["kind"] == kind])
        size = len(frame) if kind == "all" else _size(frame, by_name, kind)
        if not (part["top"] == 1).any():
            continue
        for effect, (value, low, high), n in rank_measures(part, size, n_boot, seed):
            found.append(
                {"kind": kind, **shared, "effect": effect, "value": value, "ci_low": low, "ci_high": high, "n": n}
            )
    settings = {
        "top": top,
        "random": random,
        "edges": len(frame),
        "attribution": {name: edges.settings[name] for name in ("method", "points")},
        "outcome": describe_outcome(outcome),
        "examples": examples_digest([*pairs.safe, *pairs.unsafe]),
        **sampling(len(pairs), pairs.groups, n_boot, seed),
    }
    return EdgeVerification(tidy(found, COLUMNS), settings, details)


def _kind(sender: Node, receiver: Node) -> str:
    first = "vision" if sender.site.tower != "language" else "language"
    return receiver.site.tower if first == receiver.site.tower else f"{first} to {receiver.site.tower}"


def _size(frame: pd.DataFrame, by_name: dict[str, Node], kind: str) -> int:
    return sum(_kind(by_name[a], by_name[b]) == kind for a, b in frame[["sender", "receiver"]].to_numpy().tolist())


class _Exact:
    """Exact effects of edges on the safe rows of one batch."""

    def __init__(self, lvlm: HookedLVLM, batch: PairBatch, outcome: BaseOutcome, batch_size: int) -> None:
        self._lvlm, self._batch, self._batch_size = lvlm, batch, batch_size
        self._keep = logits_needed(outcome, batch.inputs)
        self._inputs = batch.inputs.rows(range(batch.n))
        senders, _ = nodes(lvlm)
        towers = ("vision", "projector", "language") if batch.has_images else ("language",)
        sites = [node.site for node in senders if node.site.tower in towers]
        self._writers = [site for site in lvlm.sites() if site.component in (ATTN, MLP) and site.tower in towers]
        with torch.no_grad():
            logits, self._cache = lvlm.run_with_cache(
                batch.inputs, sites=list(dict.fromkeys([*sites, *self._writers])), logits_to_keep=self._keep
            )
            self._outcome = bound_to_rows(outcome, batch, logits, range(batch.n))
            self._untouched = read_outcome(self._outcome, logits[: batch.n], self._inputs)
            self._replay, _ = Replay.of(lvlm, self._inputs, logits_to_keep=self._keep)

    def effects(self, sender: Node, receivers: Sequence[Node]) -> np.ndarray:
        """[n, receiver] effects of the edges from one sender."""
        n, units = self._batch.n, (sender.head,) if sender.head >= 0 else None
        both = self._cache[str(sender.site)]
        swap = Swap.everything(n, both.shape[1], units=units)
        captured: dict[Site, Tensor] = {}

        def send(activation: Tensor, hook: Any) -> Tensor:
            return swap.apply(activation, both[n:].to(activation.device, activation.dtype))

        def freeze(site: Site) -> Any:
            def frozen(activation: Tensor, hook: Any) -> Tensor:
                captured.setdefault(site, activation.detach().clone())
                return self._cache[str(site)][:n].to(activation.device, activation.dtype)

            return frozen

        def look(site: Site) -> Any:
            def looking(activation: Tensor, hook: Any) -> None:
                captured[site] = activation.detach().clone()

            return looking

        start = position_of(sender)
        # Attention of the sender's own layer is how its head writes.
        later = [site for site in self._writers if _after(site, start)]
        seen = {node.site for node in receivers if node.site.component == HEADS}
        hooks = [
            (sender.site, send),
            *((site, look(site)) for site in sorted(seen)),
            *((site, freeze(site)) for site in later),
        ]
        with torch.no_grad():
            logits = self._lvlm.run_with_hooks(self._inputs, fwd_hooks=hooks, logits_to_keep=self._keep)
        out = []
        for receiver in receivers:
            if receiver.name == END:
                out.append(read_outcome(self._outcome, logits, self._inputs))
                continue
            site, own = receiver.site, self._cache[str(receiver.site)][:n]
            replay = self._replay if site.tower == "language" else None
            out.append(
                patched_outcomes(
                    self._lvlm,
                    self._inputs,
                    patches=[
                        {site: Swap.everything(*own.shape[:2], units=(receiver.head,) if receiver.head >= 0 else None)}
                    ],
                    own={site: own},
                    donor={site: captured[site]},
                    untouched=self._untouched,
                    outcome=self._outcome,
                    batch_size=self._batch_size,
                    logits_to_keep=self._keep,
                    replay=replay,
                )[0]
            )
        values, before = torch.stack(out).numpy(), self._untouched.numpy()
        return resolved(values - before, values, before, spacing=spacing(self._lvlm)).T


def _after(site: Site, start: tuple[int, int, int]) -> bool:
    """Whether an attention or MLP output comes after what a sender writes."""
    tower = {"vision": 0, "language": 2}[site.tower]
    assert site.layer is not None
    return (tower, site.layer, 0 if site.component == ATTN else 1) > start
