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
from functools import partial
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from care_lens.core import BaseOutcome, Outcome, PairedExamples, Site, SiteLike, examples_digest
from care_lens.core.details import DetailedResult, describe_outcome, metric_name, sampling, tidy
from care_lens.core.outcome import logits_outcome
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.mediators import HEADS, Mediator
from care_lens.mediation.pairs import PairBatch, bound_to_rows, pair_batches, require_shared
from care_lens.mediation.patching import read_outcome
from care_lens.mediation.path_places import Path, paths_between
from care_lens.mediation.path_runs import PathRuns
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import Part, Sweep, one_cell, require_options, require_positions, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

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


def path_effects(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome | BaseOutcome,
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
    own = logits_outcome(outcome)
    require_options(batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    positions = require_positions(positions)
    paths = paths_between(lvlm, senders, receivers, positions)
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    spans = tuple(dict.fromkeys(path.position for path in paths if path.sender.in_language))
    require_shared(batches, spans)
    if not any(batch.has_images for batch in batches) and any(path.needs_image for path in paths):
        raise ValueError("pairs must have images for senders of the vision tower and image positions, got text alone")
    sweep = Sweep(checkpoint, settings=_made(lvlm, pairs, outcome, batch_size))
    safe, values = np.full(len(pairs), np.nan), np.full((len(pairs), len(paths)), np.nan)

    def parts() -> Iterator[Part[tuple[list[int], list[int] | None]]]:
        """Of each batch the outcomes of the safe rows, then those with each sender's paths."""
        for batch in batches:
            index, run = list(batch.index), PathRuns(lvlm, batch, own, batch_size)
            yield Part((index, None), [f"untouched from {index[0]}"], one_cell(run.untouched), 0)
            for sender, position in dict.fromkeys((path.sender, path.position) for path in paths):
                mine = [i for i, path in enumerate(paths) if (path.sender, path.position) == (sender, position)]
                if not batch.has_images and paths[mine[0]].needs_image:
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
    outcome: Outcome | BaseOutcome,
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
    own = logits_outcome(outcome)
    require_options(batch_size=batch_size, n_boot=n_boot, seed=seed, least={"batch_size": 2})
    if component not in get_args(Component):
        raise ValueError(f"component must be one of {get_args(Component)}, got {component!r}")
    depth, dims = lvlm.n_layers("language"), lvlm.family.language.dims(lvlm.hf_model.config)
    if not (0 <= layer < depth - 1 and 0 <= head < dims.heads):
        raise ValueError(f"layer must be in [0, {depth - 1}) and head in [0, {dims.heads}), got {layer} and {head}")
    sender = Mediator((Site("language", layer, HEADS),), (head,))
    later = [(m, h) for m in range(layer + 1, depth) for h in range(dims.heads)]
    paths = [Path(sender, f"blocks.{m}.attn.{component}[{h}]", "all") for m, h in later]
    batches = pair_batches(lvlm, pairs, outcome=outcome, batch_size=batch_size)
    require_shared(batches, ("all",))
    place = {"layer": layer, "head": head, "component": component}
    sweep = Sweep(checkpoint, settings={**_made(lvlm, pairs, outcome, batch_size), **place})
    safe, values = np.full(len(pairs), np.nan), np.full((len(pairs), len(paths)), np.nan)

    def parts() -> Iterator[Part[list[int]]]:
        for batch in batches:
            make = partial(_to_heads, lvlm, batch, own, sender, place)
            yield Part(list(batch.index), [f"from {batch.index[0]}"], one_cell(make))

    for index, (found,) in sweep.run(parts(), total=len(batches), desc="tracing paths", progress=progress):
        safe[index], values[index] = found
    return _result(pairs, paths, safe, values, outcome, ["all"], n_boot, seed, spacing(lvlm))


def _to_heads(
    lvlm: HookedLVLM, batch: PairBatch, outcome: BaseOutcome, sender: Mediator, place: dict[str, Any]
) -> tuple[list[float], list[list[float]]]:
    """[n] outcomes of the safe rows, and [n, head] with one path each."""
    from transformer_lens.patching import get_act_patch_direct_path

    inputs = batch.inputs.rows(range(batch.n))
    with torch.no_grad():
        logits, cache = lvlm.run_with_cache(batch.inputs, sites=sender.sites)
        own = bound_to_rows(outcome, batch, logits, range(batch.n))
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


def _made(lvlm: HookedLVLM, pairs: PairedExamples, outcome: Outcome | BaseOutcome, batch_size: int) -> dict[str, Any]:
    """What a checkpoint must agree with."""
    return sweep_settings(lvlm, outcome=outcome, examples=[*pairs.safe, *pairs.unsafe], batch_size=batch_size)


def _result(
    pairs: PairedExamples,
    paths: Sequence[Path],
    safe: np.ndarray,
    values: np.ndarray,
    outcome: Outcome | BaseOutcome,
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
