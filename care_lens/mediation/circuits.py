"""Circuits checked: how much of the effect the heads and MLPs on the leading edges carry.

:func:`circuit_faithfulness` keeps the heads and MLPs on the leading k edges as they are in the unsafe run, and gives all others the safe
twin's activations. Faithfulness is the share of the total effect that is left: 1 where the circuit does it all, about 0 where nothing of it
does. Beside it stand random circuits with as many heads and MLPs of each tower. What enters (embeddings of words and patches) and the
projector stay in every circuit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from care_lens.core import BaseOutcome, Outcome, PairedExamples, examples_digest, ratio_of_means
from care_lens.core.details import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.core.outcome import logits_outcome
from care_lens.core.progress import Steps
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.edge_nodes import PROJECTOR, Node, nodes
from care_lens.mediation.edges import EdgeResult, edge_batches
from care_lens.mediation.errors import MediationError
from care_lens.mediation.pairs import PairBatch, bound_to_rows, logits_needed
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.sweep import require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

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


def circuit_faithfulness(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    edges: EdgeResult,
    *,
    outcome: Outcome | BaseOutcome,
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
    own = logits_outcome(outcome)
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
    with Steps(total=len(batches), desc="running circuits", disable=not progress) as bar:
        for batch in batches:
            index = list(batch.index)
            ends[:, index], values[index] = _with_circuits(
                lvlm, batch, own, pool, [one[2] for one in circuits], batch_size
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


def _like(circuit: frozenset[Node], pool: Sequence[Node], generator: np.random.Generator) -> frozenset[Node]:
    """A random circuit with as many heads and as many MLPs of each tower."""
    out: list[Node] = []
    for tower, component in dict.fromkeys((node.site.tower, node.site.component) for node in pool):
        some = [node for node in pool if (node.site.tower, node.site.component) == (tower, component)]
        size = sum((node.site.tower, node.site.component) == (tower, component) for node in circuit)
        out += [some[i] for i in generator.choice(len(some), size=size, replace=False).tolist()]
    return frozenset(out)


def _with_circuits(
    lvlm: HookedLVLM,
    batch: PairBatch,
    outcome: BaseOutcome,
    pool: Sequence[Node],
    circuits: Sequence[frozenset[Node]],
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """[2, n] outcomes of the twins, and [n, circuit] of the unsafe ones with all but the circuit as in the safe ones."""
    keep, n = logits_needed(outcome, batch.inputs), batch.n
    sites = list(dict.fromkeys(node.site for node in pool))
    with torch.no_grad():
        logits, cache = lvlm.run_with_cache(batch.inputs, sites=sites, logits_to_keep=keep)
    every = bound_to_rows(outcome, batch, logits, range(2 * n))
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
        outcome=bound_to_rows(outcome, batch, logits, range(n, 2 * n)),
        batch_size=batch_size,
        logits_to_keep=keep,
    ).numpy()
    return both.numpy().reshape(2, n), values.T
