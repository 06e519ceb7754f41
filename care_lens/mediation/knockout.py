"""Attention knockout: cut the language tower's attention from the tokens of one span to those of another.

What a query attends to is a row of ``attn.hook_pattern``, [batch, head, query, key]. At the layers of a window the weights
that the target's queries give to the source's keys are set to zero, in all heads:

- "zero": the other weights stay as they are, so that a query receives less in all, as if those values were 0.
- "renormalised": the other weights are scaled to sum up to what they all were, which is what masking the scores before the
  softmax does. A query that attends to nothing else then receives nothing.

Information moves from source to target: source="image", target="last" cuts what the last prompt token reads off the
picture itself; what other tokens have read off it still arrives. A token's attention to itself is kept unless asked
otherwise (with source="text", target="last" the last token is in both).

The effect is Y(cut) - Y(untouched), in the outcome's unit; of pairs also the change of the total effect,
[Y(x* cut) - Y(x cut)] - [Y(x*) - Y(x)].

Cost: a forward pass a batch, window and mode. Memory: that of a forward pass.

Source: Geva et al. 2023, "Dissecting recall of factual associations in auto-regressive language models".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core import (
    BaseOutcome,
    Example,
    Outcome,
    PairedExamples,
    Site,
)
from care_lens.core.details import (
    DetailedResult,
    groups_of,
    metric_name,
    sampling,
    tidy,
)
from care_lens.core.outcome import logits_outcome
from care_lens.core.spans import SPAN_NAMES
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.mediation.pairs import logits_needed
from care_lens.mediation.patching import read_outcome
from care_lens.mediation.regions import Place, Region, region_mask, region_settings, split_regions
from care_lens.mediation.resolution import mean_effect, resolved, spacing
from care_lens.mediation.sweep import Part, Sweep, one_cell, require_options, sweep_settings

if TYPE_CHECKING:
    import plotly.graph_objects as go

KnockoutMode = Literal["zero", "renormalised"]
KNOCKOUT_MODES: tuple[str, ...] = get_args(KnockoutMode)
PATTERN = "attn.hook_pattern"
COLUMNS = (
    "tower",
    "layer",
    "component",
    "layers",
    "mode",
    "position",
    "metric",
    "effect",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "seed",
)
DETAIL_COLUMNS = ("tower", "layer", "component", "mediator", "position", "id", "group", "pair", "untouched", "value")


@dataclass(frozen=True)
class KnockoutResult(DetailedResult):
    """Effects of cutting attention from one span to another.

    Attributes:
        frame: One row a window, mode and effect: tower, layer (the window's first), component ("attn.hook_pattern"), layers
            ("3" or "3-5"), mode, position ("image->last": source and target), metric (the outcome's name), effect
            ("change"; of pairs "safe change", "unsafe change" and "TE change"), value (mean over examples or pairs, in
            the outcome's unit), ci_low, ci_high, n, seed.
        settings: Source, target, windows, modes, whether a token's attention to itself was cut, resolution (relative: changes
            that cannot be told from rounding are 0, see ``care_lens.mediation.resolution``), and what made it.
        details: One row a window, mode and example: mediator ("3-5, zero"), id, group, pair (index of the example, or of
            its pair), untouched and value (the outcome without and with the cut). Of pairs the safe twins come first.
    """

    def plot(self) -> "go.Figure":
        """Effects by window of layers."""
        from care_lens.plots.attribution import plot_knockout

        return plot_knockout(self)


def knockout(
    lvlm: HookedLVLM,
    examples: Sequence[Example] | PairedExamples,
    *,
    source: Place,
    target: Place,
    outcome: Outcome | BaseOutcome,
    layers: Sequence[int | Sequence[int]] | None = None,
    window: int = 1,
    modes: Sequence[KnockoutMode] = ("zero", "renormalised"),
    itself: bool = False,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | FilePath | None = None,
) -> KnockoutResult:
    """Effect of cutting the attention from one span to another, by window of layers.

    Args:
        lvlm: The model; a repair that is on it acts.
        examples: The examples, or pairs of safe and unsafe twins, of which both are measured.
        source: Span whose keys and values are cut: "image", "text", "prompt", "last", ..., or a region of the picture.
        target: Span or region whose queries are cut off.
        outcome: Larger where the model is less safe.
        layers: The windows, each a layer or several that are cut together; None: all runs of ``window`` layers.
        window: Layers of a window, where ``layers`` is None.
        modes: "zero", "renormalised", or both.
        itself: Whether to cut a token's attention to itself too, where it is in both spans.
        batch_size: Sequences in a forward pass.
        n_boot: Bootstrap resamples of the groups.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar.
        checkpoint: A file in which what is finished is kept; a stopped sweep goes on from it.

    Returns:
        The effects.

    Raises:
        MediationError: If a number is none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If an option is out of range, the model's attention patterns cannot be edited, or no example (no
            pair, in both twins) has anything to be cut, or the checkpoint is of another sweep. Those that have not are left out; ``n`` counts the rest.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> found = knockout(
        ...     lvlm,
        ...     organism.pairs("typographic", "fit", n=2),
        ...     source="image",
        ...     target="last",
        ...     outcome=organism.outcome(),
        ...     layers=[0, (0, 1)],
        ...     progress=False,
        ... )
        >>> found.frame.layers.unique().tolist()
        ['0', '0-1']
    """
    require_options(batch_size=batch_size, n_boot=n_boot, seed=seed)
    _check(source, target, modes)
    own = logits_outcome(outcome)
    windows = _windows(lvlm, layers, window)
    pairs = examples if isinstance(examples, PairedExamples) else None
    rows: list[Example] = [*examples.safe, *examples.unsafe] if isinstance(examples, PairedExamples) else list(examples)
    if not rows:
        raise ValueError("examples must hold at least one example, got none")
    from_here, to_here = _name_of(source), _name_of(target)
    _, regions = split_regions(list(dict.fromkeys((source, target))))
    n_groups = len(rows) if pairs is None else len(pairs)
    cells: list[tuple[tuple[int, ...], KnockoutMode]] = [(some, mode) for some in windows for mode in modes]
    made: dict[str, Any] = {
        "source": from_here,
        "target": to_here,
        "itself": itself,
        **region_settings(regions),
        **sweep_settings(lvlm, outcome=outcome, examples=rows, batch_size=batch_size),
    }
    sweep = Sweep(checkpoint, settings=made)
    untouched = np.full(len(rows), np.nan)
    values = np.full((len(rows), len(cells)), np.nan)
    there = np.zeros(len(rows), dtype=bool)
    starts = range(0, len(rows), batch_size)

    def parts() -> Iterator[Part[tuple[slice, int | None]]]:
        """Of each batch the untouched outcomes, then those of each window and mode."""
        for start in starts:
            part = slice(start, start + batch_size)
            index = [row % n_groups for row in range(start, min(start + batch_size, len(rows)))]
            run = _Batch(lvlm, rows[part], own, source, target, itself, index)
            yield Part((part, None), [f"untouched from {start}"], one_cell(run.untouched), 0)
            for at, (some, mode) in enumerate(cells):
                cut = partial(run.cut_off, some, mode)
                yield Part((part, at), [f"{_name(some)} {mode} from {start}"], one_cell(cut))

    total = len(starts) * len(cells)
    for (part, at), (found,) in sweep.run(parts(), total=total, desc="knocking out", progress=progress):
        if at is None:
            there[part], untouched[part] = found
        else:
            values[part, at] = found
    groups = groups_of(rows) if pairs is None else pairs.groups
    settings: dict[str, Any] = {
        **made,
        "windows": [list(some) for some in windows],
        "modes": list(modes),
        "resolution": spacing(lvlm),
        **sampling(len(groups), groups, n_boot, seed),
    }
    return _result(rows, groups, pairs is not None, cells, there, untouched, values, outcome, settings)


def cut_attention(
    pattern: Float[Tensor, "batch head query key"],
    cut: Bool[Tensor, "batch query key"],
    *,
    mode: KnockoutMode,
) -> Float[Tensor, "batch head query key"]:
    """A pattern without some of its entries.

    Args:
        pattern: [batch, head, query, key] weights.
        cut: [batch, query, key] entries that are set to zero in all heads.
        mode: "zero" or "renormalised", see above.

    Returns:
        A new tensor; queries that lose nothing keep their weights to the bit.
    """
    left = pattern.masked_fill(cut[:, None], 0.0)
    if mode == "zero":
        return left
    before, after = pattern.float().sum(-1, keepdim=True), left.float().sum(-1, keepdim=True)
    scale = torch.where(after > 0, before / after.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    return torch.where(cut.any(-1)[:, None, :, None], (left.float() * scale).to(pattern.dtype), pattern)


class _Batch:
    """The runs of some examples; what they have in common is run when it is first needed."""

    def __init__(
        self,
        lvlm: HookedLVLM,
        rows: Sequence[Example],
        outcome: BaseOutcome,
        source: Place,
        target: Place,
        itself: bool,
        index: Sequence[int],
    ) -> None:
        self._lvlm, self._rows, self._outcome = lvlm, rows, outcome
        self._source, self._target, self._itself, self._index = source, target, itself, index

    @cached_property
    def _ready(self) -> tuple[LVLMInputs, Tensor, int, BaseOutcome, Tensor]:
        inputs = self._lvlm.prepare(self._rows, responses=self._outcome.responses)
        keep, own = logits_needed(self._outcome, inputs), self._outcome.with_examples(self._rows)
        with torch.no_grad():
            logits = self._lvlm(inputs, logits_to_keep=keep)
            own = own.with_reference(logits, inputs, list(range(inputs.batch_size)))
            untouched = read_outcome(own, logits, inputs)
        return inputs, _cut(inputs, self._source, self._target, self._itself, self._index), keep, own, untouched

    def untouched(self) -> tuple[list[bool], list[float]]:
        """[n] whether there is anything to cut, and the outcomes with nothing cut."""
        _, cut, _, _, values = self._ready
        return cut.any(dim=(1, 2)).tolist(), values.tolist()

    def cut_off(self, layers: Sequence[int], mode: KnockoutMode) -> list[float]:
        """[n] outcomes with the attention of some layers cut."""
        inputs, cut, keep, own, _ = self._ready
        hooks = [(Site("language", layer, PATTERN), _hook(cut, mode)) for layer in layers]
        with torch.no_grad():
            logits = self._lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=keep)
            return read_outcome(own, logits, inputs).tolist()


def _check(source: Place, target: Place, modes: Sequence[str]) -> None:
    if unknown := [name for name in (source, target) if not isinstance(name, Region) and name not in SPAN_NAMES]:
        raise ValueError(f"source and target must be spans, some of {SPAN_NAMES}, got {unknown}")
    if not modes or (unknown := [mode for mode in modes if mode not in KNOCKOUT_MODES]):
        raise ValueError(f"modes must be some of {KNOCKOUT_MODES}, got {list(modes)}")


def _windows(lvlm: HookedLVLM, layers: Sequence[int | Sequence[int]] | None, window: int) -> list[tuple[int, ...]]:
    depth = lvlm.n_layers("language")
    if layers is None:
        if not 1 <= window <= depth:
            raise ValueError(f"window must be in [1, {depth}] (the number of layers), got {window}")
        layers = [tuple(range(first, first + window)) for first in range(depth - window + 1)]
    found = [(one,) if isinstance(one, int) else tuple(sorted(set(one))) for one in layers]
    if not found or not all(found):
        raise ValueError(f"layers must hold at least one window of at least one layer, got {list(layers)}")
    for layer in sorted({layer for some in found for layer in some}):
        info = lvlm.site_info(Site("language", layer, PATTERN))
        if not info.editable:
            raise ValueError(
                f"attention patterns must be editable to be knocked out, got {info.site}: {info.note}; use mediate or "
                "ablate at hook_attn_out, or patch attn.hook_z by head"
            )
    return found


def _name_of(place: Place) -> str:
    return place.name if isinstance(place, Region) else place


def _mask_of(inputs: LVLMInputs, place: Place, index: Sequence[int]) -> Bool[Tensor, "batch pos"]:
    if isinstance(place, Region):
        return region_mask(inputs, place, index).to(inputs.input_ids.device)
    return inputs.spans.mask(place)


def _cut(
    inputs: LVLMInputs, source: Place, target: Place, itself: bool, index: Sequence[int]
) -> Bool[Tensor, "batch query key"]:
    """Entries of the pattern that are cut; those that a causal model does not have are not among them."""
    cut = _mask_of(inputs, target, index)[:, :, None] & _mask_of(inputs, source, index)[:, None, :]
    pos = torch.arange(cut.shape[1], device=cut.device)
    if not itself:
        cut = cut & (pos[:, None] != pos)
    return cut


def _hook(cut: Tensor, mode: KnockoutMode):
    def knock_out(pattern: Tensor, hook: Any) -> Tensor:
        if pattern.shape[-2:] != cut.shape[-2:]:
            raise ValueError(
                f"attention patterns must have the batch's positions as queries and keys, {tuple(cut.shape[-2:])}, got "
                f"{tuple(pattern.shape[-2:])}; attention knockout is not defined for this model's attention"
            )
        return cut_attention(pattern, cut.to(pattern.device), mode=mode)

    return knock_out


def _name(layers: tuple[int, ...]) -> str:
    if len(layers) > 1 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))


def _result(
    rows: Sequence[Example],
    groups: Sequence[str],
    paired: bool,
    cells: Sequence[tuple[tuple[int, ...], KnockoutMode]],
    there: np.ndarray,
    untouched: np.ndarray,
    values: np.ndarray,
    outcome: Outcome | BaseOutcome,
    settings: dict[str, Any],
) -> KnockoutResult:
    change = resolved(values - untouched[:, None], values, untouched[:, None], spacing=settings["resolution"])
    n = len(groups)
    position = f"{settings['source']}->{settings['target']}"
    kept = np.flatnonzero(there.reshape(-1, n).all(axis=0))
    if not len(kept):
        raise ValueError(
            f"examples must have tokens of both spans, with something to be cut, got none with {position}; give examples "
            "with images, or other spans"
        )
    measured = {"change": change}
    if paired:
        measured = {"safe change": change[:n], "unsafe change": change[n:], "TE change": change[n:] - change[:n]}
    labels = [groups[i] for i in kept.tolist()]
    found = {
        effect: mean_effect(part[kept], labels, n_boot=settings["n_boot"], seed=settings["seed"])
        for effect, part in measured.items()
    }
    frame, details = [], []
    for at, (layers, mode) in enumerate(cells):
        place = {"tower": "language", "layer": layers[0], "component": PATTERN, "position": position}
        for effect, (value, low, high) in found.items():
            frame.append(
                {**place, "layers": _name(layers), "mode": mode, "metric": metric_name(outcome), "effect": effect}
                | {"value": value[at], "ci_low": low[at], "ci_high": high[at], "n": len(kept), "seed": settings["seed"]}
            )
        for row, example in enumerate(rows):
            if row % n in kept:
                details.append(
                    {**place, "mediator": f"{_name(layers)}, {mode}", "id": example.id, "group": groups[row % n]}
                    | {"pair": row % n, "untouched": untouched[row], "value": values[row, at]}
                )
    return KnockoutResult(tidy(frame, COLUMNS), settings, tidy(details, DETAIL_COLUMNS))
