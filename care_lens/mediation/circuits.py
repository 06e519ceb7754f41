"""Edges and circuits checked: path patching of the leading edges, and how much of the effect the leading nodes carry.

:func:`verify_edges` patches edges exactly. The sender takes the unsafe run's value in the safe run; every attention and MLP output between
sender and receiver, in both towers, stays what it was, and the projector is free; what the receiver then writes goes into the safe run, and
all that follows is free to change. Between sender and receiver of one tower this is :func:`~care_lens.mediation.path_effects`, by head.

:func:`circuit_faithfulness` keeps the heads and MLPs on the leading k edges as they are in the unsafe run, and gives all others the safe
twin's activations. Faithfulness is the share of the total effect that is left: 1 where the circuit does it all, about 0 where nothing of it
does. Beside it stand random circuits with as many heads and MLPs of each tower. What enters (embeddings of words and patches) and the
projector stay in every circuit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from care_lens.core import Outcome, PairedExamples, Site, examples_digest, ratio_of_means
from care_lens.core.details import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.edges import (
    ATTN,
    END,
    MLP,
    PROJECTOR,
    EdgeResult,
    Node,
    edge_batches,
    nodes,
    position_of,
)
from care_lens.mediation.errors import MediationError
from care_lens.mediation.mediators import HEADS
from care_lens.mediation.pairs import PairBatch, logits_needed
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.replay import Replay
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import require_options
from care_lens.mediation.verification import _measures

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = ("kind", "metric", "effect", "value", "ci_low", "ci_high", "n", "seed")
EDGE_COLUMNS = ("sender", "receiver", "kind", "top", "estimate", "value", "ci_low", "ci_high", "n")
CURVE_COLUMNS = (
    "kind",
    "edges",
    "nodes",
    "metric",
    "effect",
    "value",
    "ci_low",
    "ci_high",
    "chance",
    "chance_low",
    "chance_high",
    "n",
    "seed",
)
CURVE_DETAILS = ("kind", "edges", "pair", "group", "value")


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


@dataclass(frozen=True)
class FaithfulnessResult(DetailedResult):
    """Faithfulness of circuits by size.

    Attributes:
        frame: One row a number of edges: kind ("leading"), edges, nodes (heads and MLPs in the circuit), metric, effect ("faithfulness"), value
            (share of the total effect that is left), ci_low, ci_high, chance (mean of random circuits with as many nodes), chance_low,
            chance_high (the smallest and largest of them), n (pairs), seed.
        settings: TE, number of random circuits, and what made it.
        details: One row a circuit and pair: kind ("leading" or "random 3"), edges, pair, group, value (the outcome with the circuit).
    """

    def plot(self) -> "go.Figure":
        """Faithfulness by size, beside random circuits."""
        from care_lens.plots.edges import plot_faithfulness

        return plot_faithfulness(self)


def verify_edges(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    edges: EdgeResult,
    *,
    outcome: Outcome,
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
    batches = edge_batches(lvlm, pairs, outcome, batch_size)
    with tqdm(total=len(batches) * len(chosen), desc="patching edges", disable=not progress) as bar:
        for batch in batches:
            run = _Exact(lvlm, batch, outcome, batch_size)
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
        for effect, (value, low, high), n in _measures(part, size, n_boot, seed):
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


def circuit_faithfulness(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    edges: EdgeResult,
    *,
    outcome: Outcome,
    sizes: Sequence[int] = (0, 5, 10, 20, 50, 100, 200),
    random: int = 10,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessResult:
    """How much of the total effect the heads and MLPs on the leading edges carry, beside random ones.

    Args:
        lvlm: The model.
        pairs: Pairs: those that the scores are of, or better others.
        edges: What :func:`~care_lens.mediation.edge_attribution` gave.
        outcome: The outcome.
        sizes: Numbers of leading edges.
        random: Random circuits a size.
        batch_size: Sequences in a forward pass, at least 2.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Of the resamples and of the random circuits.
        progress: Whether to show a progress bar.

    Returns:
        Faithfulness by size.

    Raises:
        MediationError: If a number is none that it can be run with.
        ValueError: If the pairs are none that edges can be measured on.
    """
    require_options(random=random, batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    if not sizes or min(sizes) < 0:
        raise MediationError(f"sizes must be numbers of edges, 0 or more, got {list(sizes)}")
    batches = edge_batches(lvlm, pairs, outcome, batch_size)
    senders, _ = nodes(lvlm)
    pool = [
        node for node in senders if node.site != PROJECTOR and (batches[0].has_images or node.site.tower == "language")
    ]
    by_name = {node.name: node for node in pool}
    names = edges.frame[["sender", "receiver"]].to_numpy().tolist()
    generator = np.random.default_rng(seed)
    circuits: list[tuple[str, int, frozenset[Node]]] = []
    for size in dict.fromkeys(min(size, len(names)) for size in sizes):
        leading = frozenset(by_name[name] for edge in names[:size] for name in edge if name in by_name)
        circuits.append(("leading", size, leading))
        circuits += [(f"random {i}", size, _like(leading, pool, generator)) for i in range(random)]
    values = np.full((len(pairs), len(circuits)), np.nan)
    ends = np.full((2, len(pairs)), np.nan)
    with tqdm(total=len(batches), desc="running circuits", disable=not progress) as bar:
        for batch in batches:
            index = list(batch.index)
            ends[:, index], values[index] = _with_circuits(
                lvlm, batch, outcome, pool, [one[2] for one in circuits], batch_size
            )
            bar.update()
    total, groups = ends[1] - ends[0], list(pairs.groups)
    kept = np.nan_to_num(values - ends[0][:, None])
    share = ratio_of_means(kept, np.repeat(total[:, None], kept.shape[1], axis=1), groups, n_boot=n_boot, seed=seed)
    rows, details = [], []
    for at, (kind, size, members) in enumerate(circuits):
        details += [
            {"kind": kind, "edges": size, "pair": i, "group": groups[i], "value": values[i, at]}
            for i in range(len(pairs))
        ]
        if kind != "leading":
            continue
        others = [float(share.estimate[i]) for i, one in enumerate(circuits) if one[1] == size and one[0] != "leading"]
        rows.append(
            {
                "kind": kind,
                "edges": size,
                "nodes": len(members),
                "metric": metric_name(outcome),
                "effect": "faithfulness",
            }
            | {
                "value": share.estimate[at],
                "ci_low": share.low[at],
                "ci_high": share.high[at],
                "chance": float(np.mean(others)),
            }
            | {"chance_low": min(others), "chance_high": max(others), "n": len(pairs), "seed": seed}
        )
    settings = {
        "TE": float(total.mean()),
        "random": random,
        "nodes": len(pool),
        "outcome": describe_outcome(outcome),
        "examples": examples_digest([*pairs.safe, *pairs.unsafe]),
        **sampling(len(pairs), groups, n_boot, seed),
    }
    return FaithfulnessResult(tidy(rows, CURVE_COLUMNS), settings, tidy(details, CURVE_DETAILS))


def _kind(sender: Node, receiver: Node) -> str:
    first = "vision" if sender.site.tower != "language" else "language"
    return receiver.site.tower if first == receiver.site.tower else f"{first} to {receiver.site.tower}"


def _size(frame: pd.DataFrame, by_name: dict[str, Node], kind: str) -> int:
    return sum(_kind(by_name[a], by_name[b]) == kind for a, b in frame[["sender", "receiver"]].to_numpy().tolist())


def _like(circuit: frozenset[Node], pool: Sequence[Node], generator: np.random.Generator) -> frozenset[Node]:
    """A random circuit with as many heads and as many MLPs of each tower."""
    out: list[Node] = []
    for tower, component in dict.fromkeys((node.site.tower, node.site.component) for node in pool):
        some = [node for node in pool if (node.site.tower, node.site.component) == (tower, component)]
        size = sum((node.site.tower, node.site.component) == (tower, component) for node in circuit)
        out += [some[i] for i in generator.choice(len(some), size=size, replace=False).tolist()]
    return frozenset(out)


def _bound(outcome: Any, logits: Tensor, batch: PairBatch, rows: range) -> Any:
    if hasattr(outcome, "with_reference"):
        outcome = outcome.with_reference(logits, batch.inputs, 2 * list(range(batch.n)))
    return outcome.for_rows(list(rows)) if hasattr(outcome, "for_rows") else outcome


def _with_circuits(
    lvlm: HookedLVLM,
    batch: PairBatch,
    outcome: Any,
    pool: Sequence[Node],
    circuits: Sequence[frozenset[Node]],
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """[2, n] outcomes of the twins, and [n, circuit] of the unsafe ones with all but the circuit as in the safe ones."""
    keep, n = logits_needed(outcome, batch.inputs), batch.n
    sites = list(dict.fromkeys(node.site for node in pool))
    with torch.no_grad():
        logits, cache = lvlm.run_with_cache(batch.inputs, sites=sites, logits_to_keep=keep)
    every = _bound(outcome, logits, batch, range(2 * n))
    both = read_outcome(every, logits, batch.inputs)
    own = {site: cache[str(site)][n:] for site in sites}
    donor = {site: cache[str(site)][:n] for site in sites}
    patches = []
    for circuit in circuits:
        patch = {}
        for site in sites:
            units = tuple(node.head for node in pool if node.site == site and node not in circuit)
            if units:
                rows, length = own[site].shape[:2]
                patch[site] = Swap.everything(rows, length, units=units if units != (-1,) else None)
        patches.append(patch)
    unsafe = batch.inputs.rows(range(n, 2 * n))
    inner = [i for i, patch in enumerate(patches) if patch]
    values = np.repeat(both[n:].numpy()[None], len(patches), axis=0)
    values[inner] = patched_outcomes(
        lvlm,
        unsafe,
        patches=[patches[i] for i in inner],
        own=own,
        donor=donor,
        untouched=both[n:],
        outcome=_bound(outcome, logits, batch, range(n, 2 * n)),
        batch_size=batch_size,
        logits_to_keep=keep,
    ).numpy()
    return both.numpy().reshape(2, n), values.T


class _Exact:
    """Exact effects of edges on the safe rows of one batch."""

    def __init__(self, lvlm: HookedLVLM, batch: PairBatch, outcome: Any, batch_size: int) -> None:
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
            self._outcome = _bound(outcome, logits, batch, range(batch.n))
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
