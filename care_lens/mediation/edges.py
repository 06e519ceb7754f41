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
import torch
from torch import Tensor
from tqdm.auto import tqdm

from care_lens.core import Outcome, PairedExamples, Site, cluster_bootstrap, examples_digest
from care_lens.core.details import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.core.site import Tower
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.attribution import FIRST_POINTS, Method, check_options
from care_lens.mediation.errors import MediationError
from care_lens.mediation.interpolation import PATCHES, WORDS, _enter, _twins, nodes_of, owners
from care_lens.mediation.mediators import HEADS
from care_lens.mediation.pairs import PairBatch, logits_needed, misaligned, pair_batches, require_whole_pictures
from care_lens.mediation.sweep import require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

ATTN, MLP, MID, PRE, POST = "hook_attn_out", "hook_mlp_out", "hook_resid_mid", "hook_resid_pre", "hook_resid_post"
END = "end"
PROJECTOR = Site("projector", None, "hook_out")
COLUMNS = (
    "tower", "layer", "component", "head", "sender", "receiver_tower", "receiver_layer", "receiver_component", "receiver_head", "receiver",
    "metric", "effect", "value", "ci_low", "ci_high", "n", "seed",
)  # fmt: skip
DETAIL_COLUMNS = ("sender", "receiver", "pair", "group", "value")
ESTIMATE = "edge estimate"


@dataclass(frozen=True, order=True)
class Node:
    """A head, an MLP, the projector or the end of the language tower.

    Attributes:
        site: ``attn.hook_z``, ``hook_mlp_out``, the projector's output; of the end the last ``hook_resid_post``.
        head: The head; -1 where it is none.
    """

    site: Site
    head: int = -1

    @property
    def name(self) -> str:
        """As results write it."""
        if self.site.component == POST:
            return END
        return f"{self.site}[{self.head}]" if self.head >= 0 else str(self.site)


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


def nodes(lvlm: HookedLVLM) -> tuple[list[Node], list[Node]]:
    """Senders and receivers of a model, in the order of the forward pass.

    Raises:
        MediationError: If attention heads cannot be told apart in a tower, or its residual stream between attention and MLP not be read.
    """
    listed = set(lvlm.sites())
    found: list[Node] = []
    for tower in ("vision", "language"):
        dims = (lvlm.family.vision if tower == "vision" else lvlm.family.language).dims(lvlm.hf_model.config)
        for layer in range(lvlm.n_layers(tower)):
            needed = [Site(tower, layer, name) for name in (PRE, HEADS, ATTN, MID, MLP)]
            if lacking := [str(site) for site in needed if site not in listed]:
                raise MediationError(
                    f"edges must have {lacking[0]} in every layer, which this model has not; use path_effects"
                )
            found += [Node(Site(tower, layer, HEADS), head) for head in range(dims.heads)]
            found.append(Node(Site(tower, layer, MLP)))
        if tower == "vision":
            found.append(Node(PROJECTOR))
    end = Node(Site("language", lvlm.n_layers() - 1, POST))
    receivers = [node for node in found if node.site.tower != "projector"]
    return found, [*receivers, end]


def position_of(node: Node) -> tuple[int, int, int]:
    """Where a node stands in the forward pass: heads of a layer together, its MLP after them."""
    tower = {"vision": 0, "projector": 1, "language": 2}[node.site.tower]
    layer = -1 if node.site.layer is None else node.site.layer
    return tower, layer, {HEADS: 0, MLP: 1, POST: 2}.get(node.site.component, 0)


def edge_attribution(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome,
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
    check_options(outcome, method, points, "inputs")
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
    with tqdm(total=len(batches) * len(nodes_between), desc="attributing edges", disable=not progress) as bar:
        for batch in batches:
            run = _Run(lvlm, batch, outcome, senders, wanted)
            total[list(batch.index)] = run.total
            for at, weight in nodes_between:
                for (sender, receiver), score in run.scores(at):
                    values[list(batch.index), column[sender, receiver]] += weight * score
                bar.update()
    return _result(pairs, edges, values, total, outcome, method, len(nodes_between), keep, n_boot, seed)


def edge_batches(lvlm: HookedLVLM, pairs: PairedExamples, outcome: Any, batch_size: int) -> list[PairBatch]:
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


class _Run:
    """The runs of one batch: both ends once, then a graph a node."""

    def __init__(
        self, lvlm: HookedLVLM, batch: PairBatch, outcome: Any, senders: Sequence[Node], receivers: Sequence[Node]
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
            if hasattr(outcome, "with_reference"):
                outcome = outcome.with_reference(logits, batch.inputs, 2 * list(range(batch.n)))
            untouched = outcome(logits, batch.inputs).double().cpu().numpy()
        self.total = untouched[batch.n :] - untouched[: batch.n]
        self._starts: dict[Site, Tensor] = {}
        self._differences: dict[Site, Tensor] = {}
        for site in sites:
            safe, unsafe = _twins(cache[str(site)], site)
            self._differences[site] = unsafe - safe
            if site in self._entries:
                self._starts[site] = safe.clone()
        self._outcome = outcome.for_rows(list(range(batch.n))) if hasattr(outcome, "for_rows") else outcome
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
            (site, _enter(self._starts[site] + at * self._differences[site], image if site == WORDS else None))
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
            value = self._outcome(logits, self._inputs).sum()
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


def _result(
    pairs: PairedExamples,
    edges: Sequence[tuple[Node, Node]],
    values: np.ndarray,
    total: np.ndarray,
    outcome: Any,
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


def edge_columns(sender: Node, receiver: Node) -> dict[str, Any]:
    """The place of an edge, for a frame."""
    return {
        "tower": sender.site.tower,
        "layer": sender.site.layer,
        "component": sender.site.component,
        "head": sender.head if sender.head >= 0 else None,
        "sender": sender.name,
        "receiver_tower": receiver.site.tower,
        "receiver_layer": receiver.site.layer,
        "receiver_component": receiver.site.component,
        "receiver_head": receiver.head if receiver.head >= 0 else None,
        "receiver": receiver.name,
    }
