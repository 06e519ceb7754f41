"""Ablation by layer and component, scored by what the model then answers.

At one layer at a time a component's output is replaced at every position, of the prompt and of every new
token, while the model generates; a judge reads the answers. With attention output and MLP output as
components this is the paper's comparison of FFN and attention by attack success rate.

- "mean": the mean over reference examples of the mean over their positions (each example counts once), the
  same vector everywhere. Of these it leaves the model nearest to what it is used to.
- "resample": at each position the output at a random position of another example, the same example for a row
  everywhere and of another group where there is one. It keeps the component's own distribution, and takes what it
  says about this example away. Every example has draws of its own, made from the seed and the example: batch size and order
  change nothing, and the other examples only as far as they are the reference.
- "zero": zeros.
- "skip": the component writes nothing to the residual stream; at the outputs of attention and MLP that is
  zeros as well. With ``components=("block",)`` whole blocks are left out, ``window`` of them together: the paper's scan skips {l, l + 1},
  ``window=2``.

Shares are of judged answers: missing ones are counted apart. Intervals are those of rates whose trials share groups
(Clopper-Pearson where every example has its own); changes from the baseline are paired. None is a point because all
answers came out alike.

Source: Fu et al. 2026 (arXiv:2603.27240).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from care_lens.capture import capture
from care_lens.core import (
    Example,
    Interval,
    Judge,
    Site,
    Tower,
    Verdict,
    clustered_rate,
    examples_digest,
    package_versions,
    paired_difference,
    require_verdicts,
)
from care_lens.core.details import DetailedResult, groups_of, site_columns, tidy
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.mediation.checkpoint import made_by
from care_lens.mediation.resampling import bank_of, donors, resampled
from care_lens.mediation.skipping import BLOCK, Blocks, left_out
from care_lens.mediation.sweep import Part, Sweep, require_options

if TYPE_CHECKING:
    import plotly.graph_objects as go

Mode = Literal["mean", "resample", "zero", "skip"]
MODES: tuple[str, ...] = ("mean", "resample", "zero", "skip")
WRITERS = ("hook_attn_out", "hook_mlp_out")
"""Components that write to the residual stream."""

BASELINE = "none"
COLUMNS = (
    "tower",
    "layer",
    "component",
    "mode",
    "metric",
    "effect",
    "value",
    "ci_low",
    "ci_high",
    "n",
    "seed",
)
DETAIL_COLUMNS = ("tower", "layer", "component", "id", "group", "channel", "text", "verdict")
_JUDGED = (Verdict.COMPLIED, Verdict.REFUSED, Verdict.OTHER)


Cell = Site | Blocks | None
Hook = tuple[Site, Callable[..., Any]]


@dataclass(frozen=True)
class AblationResult(DetailedResult):
    """Answers by layer and ablated component.

    Attributes:
        frame: tower, layer (missing in the baseline), component ("none" in the baseline), mode, metric,
            effect, value, ci_low, ci_high, n, seed. With effect "share", metric "complied" (the attack
            success rate of harmful requests), "refused" and "other" are shares of the judged answers and
            "missing" of all, in [0, 1]. With effect "difference", metric "complied change" and so on are
            shares minus the baseline's, over the same examples.
        settings: Mode, number of examples and of reference examples, max_new_tokens, n_boot, seed, versions.
        details: One row a cell and example: id, group, channel, text of the answer, verdict.
    """

    def plot(self) -> "go.Figure":
        """Share complied by layer, one curve a component."""
        from care_lens.plots import plot_ablation

        return plot_ablation(self)


def ablate(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    judge: Judge,
    components: Sequence[str] = WRITERS,
    tower: Tower = "language",
    layers: Sequence[int] | None = None,
    mode: Mode = "mean",
    window: int = 1,
    reference: Sequence[Example] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> AblationResult:
    """Ablate each component of each layer in turn, generate, and judge the answers.

    Args:
        lvlm: The model; a repair that is on it acts.
        examples: The requests.
        judge: Says what each answer is.
        components: Components of a block; "block" is the whole of it, which can be skipped.
        tower: "language" or "vision".
        layers: Which layers; None: all that have sites.
        mode: What takes the place of the component's output.
        window: How many blocks are skipped together, from each layer on (as many as there are at the end); for "block" alone.
        reference: Examples that the mean is over or that are drawn from; None: the examples themselves.
        max_new_tokens: Most tokens of an answer.
        batch_size: Examples generated from together.
        n_boot: Bootstrap resamples.
        seed: Seed of the bootstrap and of what is drawn; decoding is greedy.
        progress: Whether to show a progress bar.
        checkpoint: A file in which finished cells are kept; a stopped sweep goes on from it.

    Returns:
        The answers' shares for the baseline and every layer and component.

    Raises:
        MediationError: If a number is none that it can be run with, before anything is run. It is a ValueError.
        ValueError: If an option is out of range, the model has no such site or it cannot be edited, no
            example has an image for an ablation of the vision tower, or the checkpoint is of another sweep.
    """
    require_options(batch_size=batch_size, max_new_tokens=max_new_tokens, n_boot=n_boot, seed=seed)
    sites = _sites(lvlm, components, tower, layers, mode, window)
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    if tower == "vision" and all(example.image is None for example in examples):
        raise ValueError("examples must include one with an image to ablate the vision tower, got text alone")
    reference = examples if reference is None else reference
    settings = {
        "mode": mode,
        **({} if window == 1 else {"window": window}),
        "max_new_tokens": max_new_tokens,
        "examples": examples_digest(examples),
        "reference": examples_digest(reference) if mode in ("mean", "resample") else None,
        "judge": getattr(judge, "name", type(judge).__name__),
        "batch_size": batch_size,
        **made_by(lvlm, outcome=judge),
    }
    if mode == "resample":
        settings |= {"seed": seed, "draws": "of each example"}
    sweep = Sweep(checkpoint, settings=settings, probe=lambda: _probe(lvlm, examples[:batch_size]))
    cells: list[Cell] = [None, *sites]
    left = sweep.todo(map(_key, cells))
    replaced = [site for site in sites if isinstance(site, Site) and _key(site) in left]
    means = _means(lvlm, replaced, reference, batch_size, progress) if mode == "mean" else {}
    chosen = donors(examples, reference, seed) if mode == "resample" else []
    starts = range(0, len(examples), batch_size)

    def hooks_of(cell: Cell, bank: Sequence[Tensor | None] | None, inputs: LVLMInputs, start: int) -> list[Hook]:
        if cell is None:
            return []
        if isinstance(cell, Blocks):
            return left_out(cell)
        if bank is None:
            return [(cell, _replace(means.get(cell)))]
        batch = range(start, min(start + batch_size, len(examples)))
        own = [examples[i] for i in batch]
        return [(cell, resampled(bank, [chosen[i] for i in batch], own, inputs, cell, seed))]

    def answers(cell: Cell, bar: Any) -> dict[str, list[str]]:
        texts: list[str] = []
        drawn = isinstance(cell, Site) and mode == "resample"
        bank = bank_of(lvlm, cell, reference, batch_size, seed) if isinstance(cell, Site) and drawn else None
        for start in starts:
            inputs = lvlm.prepare(examples[start : start + batch_size])
            hooks = hooks_of(cell, bank, inputs, start)
            made = lvlm.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False, fwd_hooks=hooks)
            texts += made.answers
            bar.update()
        verdicts = [v.value for v in require_verdicts(judge(examples, texts), len(examples), judge=judge)]
        return {"texts": texts, "verdicts": verdicts}

    def parts() -> Iterator[Part[Cell]]:
        for cell in cells:

            def run(todo: Sequence[str], bar: Any, cell: Cell = cell) -> Iterator[dict[str, Any]]:
                yield {todo[0]: answers(cell, bar)}

            yield Part(cell, [_key(cell)], run, len(starts))

    total = len(cells) * len(starts)
    done = {_key(cell): found for cell, (found,) in sweep.run(parts(), total=total, desc="ablating", progress=progress)}
    settings |= {
        "n": len(examples),
        "n_reference": len(reference) if mode in ("mean", "resample") else 0,
        "n_boot": n_boot,
        "seed": seed,
        "confidence": 0.95,
        "versions": package_versions(),
    }
    return _result(examples, cells, done, tower, mode, n_boot, seed, settings)


def _sites(
    lvlm: HookedLVLM,
    components: Sequence[str],
    tower: Tower,
    layers: Sequence[int] | None,
    mode: Mode,
    window: int,
) -> list["Site | Blocks"]:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    skippable = (*WRITERS, BLOCK)
    if mode == "skip" and (others := [name for name in components if name not in skippable]):
        raise ValueError(
            f"components must be some of {skippable} to be skipped, got {others}; use mode 'zero' or 'mean'"
        )
    if mode != "skip" and BLOCK in components:
        raise ValueError(f"mode must be 'skip' for whole blocks, got {mode!r}; or ablate {WRITERS} one by one")
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ValueError(f"window must be a number of blocks, 1 or more, got {window!r}")
    if window > 1 and tuple(components) != (BLOCK,):
        raise ValueError(f"window is of whole blocks, components=({BLOCK!r},), got components={tuple(components)!r}")
    depth = lvlm.n_layers(tower)
    layers = range(depth) if layers is None else layers
    cells: list[Site | Blocks] = [
        Blocks(tower, layer, min(layer + window, depth) - 1) if component == BLOCK else Site(tower, layer, component)
        for layer in layers
        for component in components
    ]
    for cell in cells:
        for site in (cell,) if isinstance(cell, Site) else cell.ends:
            if not lvlm.site_info(site).editable:
                raise ValueError(f"components must be editable, got {site}: {lvlm.site_info(site).note}")
    vectors = [site for site in cells if not isinstance(site, Site) or len(lvlm.site_info(site).axes) == 3]
    if mode == "mean" and (others := [str(site) for site in cells if site not in vectors]):
        raise ValueError(
            f"components must hold one vector for each token to be replaced by its mean, got {others[0]}; use mode 'zero', or exchange single "
            "heads with mediate(..., sites=heads(lvlm))"
        )
    if mode == "resample" and "attn.hook_pattern" in components:
        raise ValueError("components must have positions to be resampled, got attn.hook_pattern; use mode 'zero'")
    return cells


def _key(cell: Cell) -> str:
    return BASELINE if cell is None else str(cell)


def _probe(lvlm: HookedLVLM, examples: Sequence[Example]) -> list[float]:
    """Largest logit of each row's first new token: other models and examples have others."""
    with torch.no_grad():
        logits = lvlm(lvlm.prepare(examples), logits_to_keep=1)
    return logits[:, -1].float().amax(dim=-1).tolist()


def _means(
    lvlm: HookedLVLM, sites: Sequence[Site], reference: Sequence[Example], batch_size: int, progress: bool
) -> dict[Site, Tensor]:
    """[d] mean of each site over the reference examples' position means."""
    if not sites:
        return {}
    held = capture(lvlm, reference, sites, positions=("all",), batch_size=batch_size, progress=progress)
    return {site: held.subset(held.has(site, "all")).rows(site, "all").mean(dim=0) for site in sites}


def _replace(mean: Tensor | None) -> Callable[..., Tensor]:
    """A hook that puts one vector, or zeros, at every position, at prefill and at every new token."""

    def replace_all(activation: Tensor, hook: Any) -> Tensor:
        if mean is None:
            return torch.zeros_like(activation)
        return mean.to(activation.device, activation.dtype).expand_as(activation).contiguous()

    return replace_all


def _result(
    examples: Sequence[Example],
    cells: Sequence[Cell],
    done: Mapping[str, Any],
    tower: Tower,
    mode: Mode,
    n_boot: int,
    seed: int,
    settings: dict[str, Any],
) -> AblationResult:
    groups = groups_of(examples)
    rows: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    baseline = np.array(done[BASELINE]["verdicts"])
    for cell in cells:
        place = {"tower": tower, "layer": None, "component": BASELINE}
        if isinstance(cell, Blocks):
            place = {"tower": tower, "layer": cell.first, "component": BLOCK}
        elif cell is not None:
            place = site_columns(cell)
        verdicts = np.array(done[_key(cell)]["verdicts"])
        shared = {**place, "mode": mode, "seed": seed}
        for metric, effect, (value, low, high), n in _measures(verdicts, baseline, groups, cell is None, n_boot, seed):
            rows.append(
                {
                    **shared,
                    "metric": metric,
                    "effect": effect,
                    "value": value,
                    "ci_low": low,
                    "ci_high": high,
                    "n": n,
                }
            )
        for example, group, text, verdict in zip(
            examples, groups, done[_key(cell)]["texts"], verdicts.tolist(), strict=True
        ):
            details.append(
                {
                    **place,
                    "id": example.id,
                    "group": group,
                    "channel": example.channel,
                    "text": text,
                    "verdict": verdict,
                }
            )
    return AblationResult(tidy(rows, COLUMNS), settings, tidy(details, DETAIL_COLUMNS))


def _measures(
    verdicts: np.ndarray,
    baseline: np.ndarray,
    groups: Sequence[str],
    is_baseline: bool,
    n_boot: int,
    seed: int,
) -> list[tuple[str, str, Interval, int]]:
    """Metric, effect, interval and number of answers of each row of a cell."""
    labels = np.array(groups)
    judged = verdicts != Verdict.MISSING.value
    both = judged & (baseline != Verdict.MISSING.value)
    rows = []
    for verdict in _JUDGED:
        hits = verdicts == verdict.value
        rows.append((verdict.value, "share", _share(hits[judged], labels[judged]), int(judged.sum())))
        if not is_baseline:
            change = Interval(np.nan, np.nan, np.nan)
            if both.any():
                before = baseline == verdict.value
                change = paired_difference(hits[both], before[both], labels[both].tolist(), n_boot=n_boot, seed=seed)
            rows.append((f"{verdict.value} change", "difference", change, int(both.sum())))
    rows.append((Verdict.MISSING.value, "share", _share(~judged, labels), len(verdicts)))
    return rows


def _share(hits: np.ndarray, labels: np.ndarray) -> Interval:
    if len(hits) == 0:
        return Interval(np.nan, np.nan, np.nan)
    return clustered_rate(hits, labels.tolist())
