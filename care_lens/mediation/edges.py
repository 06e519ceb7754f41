"""Edges: what each head and MLP of both towers reads of what each earlier one writes, all at once.

A sender (an attention head, an MLP, or the projector) writes to the residual stream of its tower; a receiver (a later head or MLP, or the
end of the language tower) reads it there directly. From a sender of the vision tower to a receiver of the language tower the way goes
through the end of the vision stream and the projector. To first order the effect of an edge on the outcome is

    Y(x with the edge of x*) - Y(x)  ~  (what the sender writes in x* - what it writes in x) . (gradient of Y by what the receiver reads)

where the gradient goes through the receiver alone: of an attention head through its own queries, keys and values. Gradients are averaged
over runs whose inputs lie between the twins (``care_lens.mediation.attribution``, "integrated": EAP-IG over both towers), or taken at the
safe run ("gradient"). Scores are sums over positions; in the vision tower over patches.

Scores are estimates: :func:`verify_edges` patches the leading edges, and as many drawn at random, exactly, and :func:`circuit_faithfulness`
says how much of the effect the heads and MLPs on the leading edges carry, beside random ones.

    found = edge_attribution(lvlm, pairs, outcome=outcome)
    verify_edges(lvlm, pairs, found, outcome=outcome, top=20, random=20)

Where a model adds picture features to later language blocks (DeepStack) or its projector reads several vision layers, the ways beside the
end of the vision stream are not in the scores.

Cost: two runs a batch, and for each point one forward pass, one backward pass for all receivers' gradients, and for each receiver one
short backward pass through the attentions' output projections below it. Memory: the graph of half a batch.

Source: Syed et al. 2023, "Attribution patching outperforms automated circuit discovery"; Hanna et al. 2024, "Have faith in faithfulness"
(EAP-IG). Neither goes through a vision tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from care_lens.core import BaseOutcome, Outcome, PairedExamples, cluster_bootstrap, examples_digest
from care_lens.core.details import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.core.progress import Steps
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.attribution import FIRST_POINTS, Method, check_options
from care_lens.mediation.edge_nodes import Node, edge_columns, nodes, position_of
from care_lens.mediation.edge_scores import EdgeScores
from care_lens.mediation.errors import MediationError
from care_lens.mediation.interpolation import PATCHES, nodes_of
from care_lens.mediation.pairs import PairBatch, misaligned, pair_batches, require_whole_pictures
from care_lens.mediation.sweep import require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = (
    "tower", "layer", "component", "head", "sender", "receiver_tower", "receiver_layer", "receiver_component", "receiver_head", "receiver",
    "metric", "effect", "value", "ci_low", "ci_high", "n", "seed",
)  # fmt: skip
DETAIL_COLUMNS = ("sender", "receiver", "pair", "group", "value")
ESTIMATE = "edge estimate"


@dataclass(frozen=True)
class EdgeResult(DetailedResult):
    """Attributions of edges.

    Attributes:
        frame: One row an edge: tower, layer, component and head of the sender, sender (its name), receiver_tower, receiver_layer,
            receiver_component, receiver_head, receiver (its name, or "end"), metric, effect ("edge estimate"), value (mean over pairs,
            in the outcome's unit), ci_low, ci_high, n (pairs), seed; the largest in size first.
        settings: Method, points, nodes, mean total effect ("TE"), and what made it.
        details: One row an edge and pair, of the leading edges: sender, receiver, pair, group, value.
    """

    def plot(self) -> "go.Figure":
        """The leading edges, with intervals."""
        from care_lens.plots.edges import plot_edges

        return plot_edges(self)


def edge_attribution(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome | BaseOutcome,
    receivers: Sequence[str] | None = None,
    method: Method = "integrated",
    points: int = FIRST_POINTS,
    batch_size: int = 16,
    keep: int = 200,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> EdgeResult:
    """Attribution of the total effect to every edge between heads and MLPs of both towers.

    Args:
        lvlm: The model; a repair that is on it acts.
        pairs: Pairs of twins that are aligned, all with a picture in both twins or all without any.
        outcome: Larger where the model is less safe; differentiable in the logits.
        receivers: Names of receivers ("blocks.3.attn.hook_z[2]", "blocks.3.hook_mlp_out", "end"); None: all.
        method: "integrated" or "gradient".
        points: Runs between the twins, for "integrated".
        batch_size: Sequences in a forward pass without gradients, at least 2; half as many with.
        keep: Of how many edges (the largest in size) ``details`` has every pair, and the frame intervals by bootstrap.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Their seed.
        progress: Whether to show a progress bar.

    Returns:
        The scores, the largest in size first.

    Raises:
        MediationError: If a number is none that it can be run with, a receiver is not known, or the model's heads cannot be told apart.
        ValueError: If twins are not aligned, or the outcome has no gradient.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> found = edge_attribution(
        ...     lvlm, organism.picture_pairs("fit")[:2], outcome=organism.outcome(), method="gradient", receivers=["end"], progress=False
        ... )
        >>> found.frame.receiver.unique().tolist()
        ['end']
    """
    require_options(
        batch_size=batch_size, points=points, keep=keep, n_boot=n_boot, seed=seed, least={"batch_size": 2, "keep": 0}
    )
    own = check_options(outcome, method, points, "inputs")
    senders, able = nodes(lvlm)
    wanted = able if receivers is None else [node for node in able if node.name in set(receivers)]
    if receivers is not None and (unknown := set(receivers) - {node.name for node in able}):
        raise MediationError(
            f"receivers must be heads, MLPs or 'end', got {sorted(unknown)[:3]}; such as {able[0].name!r}"
        )
    batches = edge_batches(lvlm, pairs, outcome, batch_size)
    nodes_between = nodes_of(points) if method == "integrated" else ((0.0, 1.0),)
    if not batches[0].has_images:
        senders = [node for node in senders if node.site.tower == "language"]
        wanted = [node for node in wanted if node.site.tower == "language"]
    edges = [(s, r) for r in wanted for s in senders if position_of(s) < position_of(r)]
    if not edges:
        raise MediationError("receivers must come after a sender, got none that does; leave receivers out for all")
    column = {edge: i for i, edge in enumerate(edges)}
    values, total = np.zeros((len(pairs), len(edges))), np.zeros(len(pairs))
    with Steps(total=len(batches) * len(nodes_between), desc="attributing edges", disable=not progress) as bar:
        for batch in batches:
            run = EdgeScores(lvlm, batch, own, senders, wanted)
            total[list(batch.index)] = run.total
            for at, weight in nodes_between:
                for (sender, receiver), score in run.scores(at):
                    values[list(batch.index), column[sender, receiver]] += weight * score
                bar.update()
    return _result(pairs, edges, values, total, outcome, method, len(nodes_between), keep, n_boot, seed)


def edge_batches(
    lvlm: HookedLVLM, pairs: PairedExamples, outcome: Outcome | BaseOutcome, batch_size: int
) -> list[PairBatch]:
    """The pairs as batches, if edges can be measured on them.

    Raises:
        ValueError: If twins are not aligned, some pairs have pictures and some not, or pictures are cut in tiles.
    """
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    if bad := misaligned(batches):
        raise ValueError(
            f"pairs must be aligned (same length, same image positions) for edges, got twins that differ in pairs {bad}"
        )
    if len({batch.has_images for batch in batches}) > 1:
        raise ValueError(
            "pairs must all have pictures in both twins, or none, for edges; measure the two kinds by themselves"
        )
    if batches[0].has_images:
        require_whole_pictures(batches, [PATCHES])
    return batches


def _result(
    pairs: PairedExamples,
    edges: Sequence[tuple[Node, Node]],
    values: np.ndarray,
    total: np.ndarray,
    outcome: Outcome | BaseOutcome,
    method: str,
    points: int,
    keep: int,
    n_boot: int,
    seed: int,
) -> EdgeResult:
    groups = list(pairs.groups)
    means = values.mean(axis=0)
    order = np.argsort(-np.abs(means), kind="stable").tolist()
    estimate, low, high = cluster_bootstrap(values[:, order], groups, kind="numbers", n_boot=n_boot, seed=seed)
    rows, details = [], []
    for rank, at in enumerate(order):
        sender, receiver = edges[at]
        rows.append(
            {
                **edge_columns(sender, receiver),
                "metric": metric_name(outcome),
                "effect": ESTIMATE,
                "value": estimate[rank],
            }
            | {"ci_low": low[rank], "ci_high": high[rank], "n": len(pairs), "seed": seed}
        )
        if rank < keep:
            details += [
                {
                    "sender": sender.name,
                    "receiver": receiver.name,
                    "pair": pair,
                    "group": groups[pair],
                    "value": values[pair, at],
                }
                for pair in range(len(pairs))
            ]
    settings: dict[str, Any] = {
        "method": method,
        "points": points,
        "edges": len(edges),
        "TE": float(total.mean()),
        "outcome": describe_outcome(outcome),
        "examples": examples_digest([*pairs.safe, *pairs.unsafe]),
        **sampling(len(pairs), groups, n_boot, seed),
    }
    return EdgeResult(tidy(rows, COLUMNS), settings, tidy(details, DETAIL_COLUMNS))
