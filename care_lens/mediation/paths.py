"""Path effects: which later component reads what the unsafe run writes at an earlier one.

A sender (attention or MLP output of a layer, or a head of it) takes the value of the unsafe run, in the safe run. A receiver
(attention or MLP of a later layer, or the end of the tower) reads it through the residual stream directly: every attention
and MLP output between the two stays what it was in the safe run. What the receiver then writes goes into the safe run, and
all that follows is free to change:

    effect = Y(x with the receiver's output := its output on [x's residual stream + what the sender writes more in x*]) - Y(x)

At the end of the language tower that is what the sender adds to the logits by itself; at the end of the vision tower, what it
gives to the projector by itself, with the language tower free. On a linear model the effects of all receivers and of the
end add up to the sender's natural indirect effect, where each receiver's own readers are free.

A head's queries, keys or values alone as receivers are :func:`head_paths`, which is TransformerLens's
``get_act_patch_direct_path``.

Cost: the two runs of each pair, a forward pass a sender, in which all receivers are read, and one a sender and receiver.
Memory: attention and MLP outputs of one tower, for one batch.

Source: Wang et al. 2023, "Interpretability in the wild"; Goldowsky-Dill et al. 2023, "Localizing model behavior with path
patching".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from care_lens.core import Outcome, PairedExamples, PrefixMargin, Site, SiteLike, examples_digest
from care_lens.core.site import Tower
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.frames import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.mediation.mediators import HEADS, Mediator
from care_lens.mediation.pairs import PairBatch, logits_needed, pair_batches, require_shared, require_whole_pictures
from care_lens.mediation.patching import Swap, patched_outcomes, read_outcome
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import Part, Sweep, one_cell, require_options, require_positions, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

END = "end"
"""The tower's final residual stream, as a receiver."""

ATTN, MLP = "hook_attn_out", "hook_mlp_out"
WRITERS = (ATTN, MLP)
Component = Literal["q", "k", "v"]
_SENDER = ("tower", "layer", "component", "head")
COLUMNS = (
    *_SENDER,
    "sender",
    "receiver",
    "mediator",
    "position",
    "metric",
    "effect",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "seed",
)
PAIR_COLUMNS = (*_SENDER, "mediator", "position", "pair", "group", "safe", "safe_patched")


@dataclass(frozen=True)
class PathResult(DetailedResult):
    """Effects of direct paths.

    Attributes:
        frame: One row a path and position: tower, layer, component and head of the sender, sender and receiver (their
            names: a receiver is named by the site of its output, or "end", or "blocks.2.attn.q[3]"), mediator ("sender ->
            receiver"), position, metric (the outcome's name), effect ("path"), value (mean over pairs, in the outcome's
            unit), ci_low, ci_high, n (pairs that have the position; missing values with n = 0 where none has), seed.
        settings: Outcome, positions, number of pairs and groups, resolution (relative: effects that cannot be told from
            rounding are 0, see ``care_lens.mediation.resolution``), n_boot, seed, versions.
        details: One row a path, position and pair: pair (its index), group, safe = Y(x), safe_patched = Y with the path.
    """

    def plot(self) -> "go.Figure":
        """Senders by receivers."""
        from care_lens.plots.attribution import plot_paths

        return plot_paths(self)


@dataclass(frozen=True)
class _Path:
    sender: Mediator
    receiver: str
    position: str

    @property
    def name(self) -> str:
        return f"{self.sender.name} -> {self.receiver}"


def path_effects(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome,
    senders: Sequence[SiteLike | Mediator],
    receivers: Sequence[SiteLike] | None = None,
    positions: Sequence[str] = ("all",),
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | FilePath | None = None,
) -> PathResult:
    """Effects of the direct paths from senders to later components of the same tower.

    Args:
        lvlm: The model; a repair that is on it acts in every run.
        pairs: The pairs.
        outcome: Larger where the model is less safe.
        senders: Sites ``hook_attn_out`` or ``hook_mlp_out``, or heads (mediators at one ``attn.hook_z``).
        receivers: Components by the site of their output (``hook_attn_out``, ``hook_mlp_out``), and "end"; those that
            do not come after a sender are no paths of it. None: all of the sender's tower.
        positions: Span names or token indices at which a sender of the language tower is patched; receivers read at
            every position.
        batch_size: Sequences in a forward pass, at least 2.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        checkpoint: A file in which what is finished is kept; a stopped sweep goes on from it.

    Returns:
        The effects.

    Raises:
        MediationError: If positions or a number are none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If a sender or receiver is of another kind, the model has no such site or it cannot be edited, there
            is no path, twins are not aligned as the positions need, no pair has the pictures that are needed, or the
            checkpoint is of another sweep.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> found = path_effects(
        ...     lvlm,
        ...     organism.pairs("typographic", "fit", n=2),
        ...     outcome=organism.outcome(),
        ...     senders=["blocks.0.hook_attn_out"],
        ...     receivers=["blocks.0.hook_mlp_out", "end"],
        ...     progress=False,
        ... )
        >>> found.frame.mediator.tolist()
        ['blocks.0.hook_attn_out -> blocks.0.hook_mlp_out', 'blocks.0.hook_attn_out -> end']
    """
    _require_logits(outcome)
    require_options(batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    positions = require_positions(positions)
    paths = _paths(lvlm, senders, receivers, positions)
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    spans = tuple(dict.fromkeys(path.position for path in paths if path.sender.in_language))
    require_shared(batches, spans)
    if not any(batch.has_images for batch in batches) and any(_needs_image(path) for path in paths):
        raise ValueError("pairs must have images for senders of the vision tower and image positions, got text alone")
    sweep = Sweep(checkpoint, settings=_made(lvlm, pairs, outcome, batch_size))
    safe, values = np.full(len(pairs), np.nan), np.full((len(pairs), len(paths)), np.nan)

    def parts() -> Iterator[Part[tuple[list[int], list[int] | None]]]:
        """Of each batch the outcomes of the safe rows, then those with each sender's paths."""
        for batch in batches:
            index, run = list(batch.index), _Batch(lvlm, batch, outcome, batch_size)
            yield Part((index, None), [f"untouched from {index[0]}"], one_cell(run.untouched), 0)
            for sender, position in dict.fromkeys((path.sender, path.position) for path in paths):
                mine = [i for i, path in enumerate(paths) if (path.sender, path.position) == (sender, position)]
                if not batch.has_images and _needs_image(paths[mine[0]]):
                    yield Part((index, []), [], one_cell(list), len(mine))
                    continue
                ends = [paths[i].receiver for i in mine]
                make = partial(run.sent, sender, position, ends)
                key = f"{sender.key} {position} to {', '.join(ends)} from {index[0]}"
                yield Part((index, mine), [key], one_cell(make), len(mine))

    total = len(batches) * len(paths)
    for (index, mine), found in sweep.run(parts(), total=total, desc="tracing paths", progress=progress):
        if mine is None:
            safe[index] = found[0]
        elif mine:
            values[np.ix_(index, mine)] = found[0]
    return _result(pairs, paths, safe, values, outcome, list(positions), n_boot, seed, spacing(lvlm))


def head_paths(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome,
    layer: int,
    head: int,
    component: Component = "q",
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | FilePath | None = None,
) -> PathResult:
    """Effects of the direct paths from a head of the language tower to queries, keys or values of each later head.

    TransformerLens's ``get_act_patch_direct_path``, with the safe run as the corrupted one. The sender is patched at every
    position.

    Args:
        lvlm: The model.
        pairs: Pairs of twins that are aligned.
        outcome: Larger where the model is less safe.
        layer: The sender's layer.
        head: The sender.
        component: "q", "k" or "v"; the last two on models with as many key-value heads as heads.
        batch_size: Sequences in a forward pass, at least 2.
        n_boot: Bootstrap resamples of the pairs' groups.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        checkpoint: A file in which what is finished is kept; a stopped sweep goes on from it.

    Returns:
        The effects, by receiving head.

    Raises:
        MediationError: If a number is none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If there is no such head or no later layer, twins are not aligned, or TransformerLens does not define
            the path on this model.
        NotImplementedError: If its attention cannot be split by reader.
    """
    _require_logits(outcome)
    require_options(batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    if component not in get_args(Component):
        raise ValueError(f"component must be one of {get_args(Component)}, got {component!r}")
    depth, dims = lvlm.n_layers("language"), lvlm.family.language.dims(lvlm.hf_model.config)
    if not (0 <= layer < depth - 1 and 0 <= head < dims.heads):
        raise ValueError(f"layer must be in [0, {depth - 1}) and head in [0, {dims.heads}), got {layer} and {head}")
    sender = Mediator((Site("language", layer, HEADS),), (head,))
    later = [(m, h) for m in range(layer + 1, depth) for h in range(dims.heads)]
    paths = [_Path(sender, f"blocks.{m}.attn.{component}[{h}]", "all") for m, h in later]
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    require_shared(batches, ("all",))
    place = {"layer": layer, "head": head, "component": component}
    sweep = Sweep(checkpoint, settings={**_made(lvlm, pairs, outcome, batch_size), **place})
    safe, values = np.full(len(pairs), np.nan), np.full((len(pairs), len(paths)), np.nan)

    def parts() -> Iterator[Part[list[int]]]:
        for batch in batches:
            make = partial(_to_heads, lvlm, batch, outcome, sender, place)
            yield Part(list(batch.index), [f"from {batch.index[0]}"], one_cell(make))

    for index, (found,) in sweep.run(parts(), total=len(batches), desc="tracing paths", progress=progress):
        safe[index], values[index] = found
    return _result(pairs, paths, safe, values, outcome, ["all"], n_boot, seed, spacing(lvlm))


def _to_heads(
    lvlm: HookedLVLM, batch: PairBatch, outcome: Outcome, sender: Mediator, place: dict[str, Any]
) -> tuple[list[float], list[list[float]]]:
    """[n] outcomes of the safe rows, and [n, head] with one path each."""
    from transformer_lens.patching import get_act_patch_direct_path

    inputs = batch.inputs.rows(range(batch.n))
    with torch.no_grad():
        logits, cache = lvlm.run_with_cache(batch.inputs, sites=sender.sites)
        own = _part(_with_reference(outcome, logits, batch), batch.n)
        safe = read_outcome(own, logits[: batch.n], inputs)
        seen: list[np.ndarray] = []

        def metric(found: Tensor) -> Tensor:
            seen.append(read_outcome(own, found, inputs).numpy())
            return found.new_zeros(())

        name = str(sender.sites[0])
        get_act_patch_direct_path(
            lvlm.bind(inputs),  # type: ignore[arg-type]
            inputs.input_ids,
            {name: cache[name][batch.n :]},  # type: ignore[arg-type]
            {name: cache[name][: batch.n]},  # type: ignore[arg-type]
            metric,
            place["layer"],
            place["head"],
            place["component"],
            verbose=False,
        )
    return safe.tolist(), np.stack(seen, axis=1).tolist()


def _made(lvlm: HookedLVLM, pairs: PairedExamples, outcome: Outcome, batch_size: int) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    return sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size)


def _require_logits(outcome: Any) -> None:
    if isinstance(outcome, PrefixMargin) or hasattr(outcome, "generated"):
        raise ValueError(
            f"outcome must be read off the logits of one run, got {metric_name(outcome)}; use UnsafeMargin, "
            "LogitDifference or ResponseLogProb"
        )


def _needs_image(path: _Path) -> bool:
    return not path.sender.in_language or path.position == "image"


def _paths(
    lvlm: HookedLVLM,
    senders: Sequence[SiteLike | Mediator],
    receivers: Sequence[SiteLike] | None,
    positions: Sequence[str],
) -> list[_Path]:
    sources = list(dict.fromkeys(Mediator.of(sender) for sender in senders))
    for sender in sources:
        if len(sender.sites) != 1 or sender.sites[0].component not in (*WRITERS, HEADS):
            raise ValueError(
                f"senders must be one site of {(*WRITERS, HEADS)} each, or heads of one, got {sender.name}; take one layer "
                "at a time"
            )
        _require_editable(lvlm, sender.sites[0])
    if receivers is None:
        able = [site for site in lvlm.sites() if site.component in WRITERS and lvlm.site_info(site).editable]
        ends: list[Site | str] = [*able, END]
    else:
        ends = [END if name == END else Site.parse(name) for name in receivers]
    for end in ends:
        if isinstance(end, Site):
            if end.component not in WRITERS:
                raise ValueError(f"receivers must be named by their output, one of {WRITERS}, or {END!r}, got {end}")
            _require_editable(lvlm, end)
    found = [
        _Path(sender, str(end), position)
        for sender in sources
        for position in (positions if sender.in_language else ("all",))
        for end in ends
        if end == END or (isinstance(end, Site) and end.tower == sender.sites[0].tower and end in _after(lvlm, sender))
    ]
    if not found:
        raise ValueError("receivers must come after a sender, in its tower, got none that does")
    return found


def _require_editable(lvlm: HookedLVLM, site: Site) -> None:
    info = lvlm.site_info(site)
    if not info.editable:
        raise ValueError(f"senders and receivers must be editable, got {site}: {info.note}")


def _after(lvlm: HookedLVLM, sender: Mediator) -> list[Site]:
    """Attention and MLP outputs that come after what the sender writes; a head writes by its own layer's attention."""
    place = sender.sites[0]
    tower: Tower = place.tower
    own = Site(tower, place.layer, ATTN) if place.component == HEADS else place
    return [site for site in lvlm.sites(tower=tower) if site.component in WRITERS and site > own]


def _with_reference(outcome: Any, logits: Tensor, batch: PairBatch) -> Any:
    if hasattr(outcome, "with_reference"):
        return outcome.with_reference(logits, batch.inputs, 2 * list(range(batch.n)))
    return outcome


def _part(outcome: Any, n: int) -> Any:
    """The outcome for the safe rows alone."""
    return outcome.for_rows(list(range(n))) if hasattr(outcome, "for_rows") else outcome


class _Batch:
    """The safe rows of one batch, with what their components write, and the unsafe twins' activations."""

    def __init__(self, lvlm: HookedLVLM, batch: PairBatch, outcome: Any, batch_size: int) -> None:
        self._lvlm, self._batch, self._batch_size = lvlm, batch, batch_size
        self._keep = logits_needed(outcome, batch.inputs)
        self._inputs = batch.inputs.rows(range(batch.n))
        self._held: dict[Tower, dict[Site, Tensor]] = {}
        self._given = outcome

    @cached_property
    def _read(self) -> tuple[Any, Tensor]:
        """The outcome for the safe rows, and what it is of them untouched; run when it is first needed."""
        with torch.no_grad():
            logits = self._lvlm(self._batch.inputs, logits_to_keep=self._keep)
        outcome = _part(_with_reference(self._given, logits, self._batch), self._batch.n)
        return outcome, read_outcome(outcome, logits[: self._batch.n], self._inputs)

    def untouched(self) -> list[float]:
        """[n] outcomes of the safe rows."""
        return self._read[1].tolist()

    def sent(self, sender: Mediator, position: str, receivers: Sequence[str]) -> list[list[float]]:
        """[n, receiver] outcomes of the safe rows with one path each."""
        place, n = sender.sites[0], self._batch.n
        frozen = {site: self._activations(site)[:n] for site in _after(self._lvlm, sender)}
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


def _result(
    pairs: PairedExamples,
    paths: Sequence[_Path],
    safe: np.ndarray,
    values: np.ndarray,
    outcome: Outcome,
    positions: list[str],
    n_boot: int,
    seed: int,
    resolution: float,
) -> PathResult:
    groups = pairs.groups
    rows: list[dict[str, Any]] = []
    pair_rows: list[dict[str, Any]] = []
    for at, path in enumerate(paths):
        kept = np.flatnonzero(np.isfinite(values[:, at]))
        columns = {name: value for name, value in path.sender.columns().items() if name in _SENDER}
        place = {**columns, "mediator": path.name, "position": path.position}
        effects = resolved(values[kept, at] - safe[kept], values[kept, at], safe[kept], spacing=resolution)
        value, low, high = mean_effect(effects, [groups[i] for i in kept.tolist()], n_boot=n_boot, seed=seed)
        rows.append(
            {**place, "sender": path.sender.name, "receiver": path.receiver, "metric": metric_name(outcome)}
            | {"effect": "path", "value": value, "ci_low": low, "ci_high": high, "n": len(kept), "seed": seed}
        )
        pair_rows += [
            {**place, "pair": i, "group": groups[i], "safe": safe[i], "safe_patched": values[i, at]}
            for i in kept.tolist()
        ]
    settings: dict[str, Any] = {
        "outcome": describe_outcome(outcome),
        "examples": examples_digest([*pairs.safe, *pairs.unsafe]),
        "positions": positions,
        "resolution": resolution,
        **sampling(len(pairs), groups, n_boot, seed),
    }
    return PathResult(tidy(rows, COLUMNS), settings, tidy(pair_rows, PAIR_COLUMNS))
