"""What resample ablation puts in a component's place: activations of another example, at random positions.

Every example has draws of its own, made from the seed and the example, so that batch size and order change nothing.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from care_lens.core import Example, Site, examples_digest
from care_lens.core.details import groups_of
from care_lens.core.draws import example_generator
from care_lens.lvlm import HookedLVLM, LVLMInputs

BANK = 32
"""Positions of each reference example that are kept to draw from."""


def donors(examples: Sequence[Example], reference: Sequence[Example], seed: int) -> list[int]:
    """For each example the index of a reference example: of another group if there is one, else another, else any.

    Each reference example gets a number from the seed and both; the smallest is taken, so that neither order nor other
    examples have a part in it.
    """
    theirs = groups_of(reference)
    names = [f"{other.id} {examples_digest([other])}" for other in reference]
    out = []
    for example, group in zip(examples, groups_of(examples), strict=True):
        own = f"{seed} {example.id} {examples_digest([example])}"
        away = [i for i, other in enumerate(theirs) if other != group]
        away = away or [i for i, other in enumerate(reference) if other is not example] or list(range(len(reference)))
        out.append(min(away, key=lambda i: hashlib.sha256(f"{own} {names[i]}".encode()).digest()))
    return out


def bank_of(
    lvlm: HookedLVLM, site: Site, reference: Sequence[Example], batch_size: int, seed: int
) -> list[Tensor | None]:
    """For each reference example [<= BANK, ...] activations at random positions; None for one without an image."""
    if site.tower != "language":
        pictured = [i for i, example in enumerate(reference) if example.image is not None]
    else:
        pictured = list(range(len(reference)))
    bank: list[Tensor | None] = [None] * len(reference)
    for start in range(0, len(pictured), batch_size):
        some = pictured[start : start + batch_size]
        inputs = lvlm.prepare([reference[i] for i in some])
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=[site], logits_to_keep=1)
        held = cache[str(site)]
        if site.tower == "language":
            where, rows = inputs.spans.mask("all").to(held.device), range(len(some))
        else:
            where, rows = lvlm.patch_mask(site, held, class_tokens=True), inputs.image_rows
        for entry, row in enumerate(rows):
            tokens = held[entry][where[entry]]
            if (before := bank[some[row]]) is not None:
                tokens = torch.cat([before, tokens])  # another tile of the same example
            generator = example_generator(seed, reference[some[row]], site)
            drawn = torch.randperm(len(tokens), generator=generator)[:BANK]
            bank[some[row]] = tokens[drawn.to(tokens.device)]
    return bank


class _Draws:
    """The numbers that one row draws, a position after the other; drawn in blocks, so that how many are asked for at once
    changes nothing."""

    def __init__(self, high: int, generator: torch.Generator) -> None:
        self._high, self._generator, self._left = high, generator, torch.empty(0, dtype=torch.long)

    def take(self, count: int) -> Tensor:
        while len(self._left) < count:
            block = torch.randint(self._high, (256,), generator=self._generator)
            self._left = torch.cat([self._left, block])
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def resampled(
    bank: Sequence[Tensor | None],
    chosen: Sequence[int],
    examples: Sequence[Example],
    inputs: LVLMInputs,
    site: Site,
    seed: int,
) -> Callable[..., Tensor]:
    """A hook that puts random activations of one reference example at every position of a row, padding apart."""
    filled = [i for i, part in enumerate(bank) if part is not None]
    if not filled:
        raise ValueError("reference must include an example with an image to resample the vision tower, got text alone")
    rows = list(range(len(examples))) if site.tower == "language" else list(inputs.image_rows)
    padding = inputs.spans.padding.sum(dim=1).tolist() if site.tower == "language" else [0] * len(examples)
    parts: list[Tensor] = []
    draws: list[_Draws] = []
    for entry, row in enumerate(rows):
        donor = chosen[row] if bank[chosen[row]] is not None else filled[chosen[row] % len(filled)]
        part = bank[donor]
        assert part is not None
        parts.append(part)
        tile = entry - rows.index(row)
        draws.append(_Draws(len(part), example_generator(seed, examples[row], site, tile)))
    before = True

    def replace_all(activation: Tensor, hook: Any) -> Tensor:
        nonlocal before
        drawn = []
        for entry, (part, own) in enumerate(zip(parts, draws, strict=True)):
            # Left padding, of the prompt alone, is what differs between batches: it takes no draws.
            pad = padding[rows[entry]] if before else 0
            index = torch.cat([torch.zeros(pad, dtype=torch.long), own.take(activation.shape[1] - pad)])
            drawn.append(part[index.to(part.device)])
        before = False
        return torch.stack(drawn).to(activation.device, activation.dtype)

    return replace_all
