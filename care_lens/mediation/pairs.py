"""Pairs as batches: both twins of each pair in one batch, and which positions of one answer to which of the
other.

Twins are aligned when they have the same length, the same image positions and the same prompt. Then every
position has a meaning in both. Otherwise only the image span (if it is equally long) and the last prompt
token have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from care_lens.core import BaseOutcome, Example, Outcome, PairedExamples, Site, as_outcome
from care_lens.core.display import ShortRepr
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.mediation.errors import MediationError
from care_lens.mediation.patching import Swap
from care_lens.mediation.regions import Region, patch_region, region_mask

ALWAYS_SHARED = ("image", "last")
"""Positions that have a meaning in both twins even where they are not aligned."""


@dataclass(frozen=True, eq=False)
class PairBatch(ShortRepr):
    """Some pairs, as one batch of 2n rows: the n safe twins, then the n unsafe ones.

    Attributes:
        inputs: The batch, padded on the left to one length.
        index: Which pairs they are.
        has_images: Whether both twins of every pair have an image; otherwise no pair here has two.
        examples: What each row was made of.
        regions: Regions of the picture by name, which count as positions.
    """

    inputs: LVLMInputs
    index: tuple[int, ...]
    has_images: bool
    examples: tuple[Example, ...] = ()
    regions: Mapping[str, Region] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.index)

    @property
    def twins(self) -> list[int]:
        """For each row, the row of its twin."""
        return [*range(self.n, 2 * self.n), *range(self.n)]

    @cached_property
    def misaligned(self) -> Bool[Tensor, " n"]:
        """[n] pairs whose twins differ in length, image positions or prompt length."""
        spans = self.inputs.spans
        kinds = torch.stack([spans.padding, spans.image, spans.response, spans.last])
        return (kinds[:, : self.n] != kinds[:, self.n :]).any(dim=0).any(dim=1).cpu()

    @cached_property
    def unequal_images(self) -> Bool[Tensor, " n"]:
        """[n] pairs whose twins have different numbers of image tokens."""
        counts = self.inputs.spans.image.sum(dim=1)
        return (counts[: self.n] != counts[self.n :]).cpu()

    @property
    def length(self) -> int:
        """Tokens of the longest row, padding not counted."""
        return int((~self.inputs.spans.padding).sum(dim=1).max())

    def mask(self, position: str) -> Bool[Tensor, "rows pos"]:
        """Each row's positions of that name.

        Args:
            position: A span name, the name of a region, or the index of a token, counted from the row's first token, as a string.

        Returns:
            [2n, pos]; all false in rows that are not as long as that.

        Raises:
            ValueError: If there is no such span.
        """
        spans = self.inputs.spans
        if position in self.regions:
            return self._region_masks[position]
        if not is_index(position):
            return spans.mask(position).cpu()
        tokens = ~spans.padding
        return (tokens & (tokens.cumsum(dim=1) == int(position) + 1)).cpu()

    @cached_property
    def _region_masks(self) -> dict[str, Bool[Tensor, "rows pos"]]:
        return {name: region_mask(self.inputs, region, 2 * self.index) for name, region in self.regions.items()}

    def patches(self, position: str, picture: Bool[Tensor, "entry pos"]) -> Bool[Tensor, "entry pos"]:
        """Where a region's patches are in an activation of the vision tower or the projector.

        Args:
            position: The name of a region.
            picture: [entry, pos] which entries of the activation are patches.
        """
        return patch_region(self.inputs, self.regions[position], 2 * self.index, picture)

    def swap(self, position: str, units: tuple[int, ...] | None = None) -> Swap:
        """Each row's positions of that name, and where its twin has them.

        Args:
            position: As in :meth:`mask`.
            units: Heads or neurons; None: all of the activation.

        Returns:
            Masks and sources [2n, pos].
        """
        mask = self.mask(position)
        source = torch.arange(mask.shape[1]).repeat(len(mask), 1)
        if bool(self.misaligned.any()):
            for row, twin in enumerate(self.twins):
                source[row, mask[row]] = mask[twin].nonzero()[:, 0]
        return Swap(mask, source, units)


def is_index(position: str) -> bool:
    """Whether a position is a token's index rather than the name of a span."""
    return position.isdecimal()


def pair_batches(
    lvlm: HookedLVLM,
    pairs: PairedExamples,
    *,
    outcome: Outcome | BaseOutcome,
    batch_size: int,
    regions: Mapping[str, Region] | None = None,
) -> list[PairBatch]:
    """Pairs as batches of at most ``batch_size`` rows, pairs with images apart from the others.

    Args:
        lvlm: The model.
        pairs: The pairs.
        outcome: Batches hold the examples' responses if it is of these.
        batch_size: Rows of a batch, both twins counted; at least 2.
        regions: Regions of the pictures by name, which count as positions.

    Returns:
        The batches; all pixels are held in memory.

    Raises:
        ValueError: If there are no pairs, or the batch size is below 2.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size must be 2 or more, got {batch_size}; a pair is two sequences")
    if len(pairs) == 0:
        raise ValueError("pairs must hold at least one pair, got none")
    pictured = [safe.image is not None and unsafe.image is not None for safe, unsafe in pairs]
    responses = as_outcome(outcome).responses
    size = max(1, batch_size // 2)
    batches = []
    for has_images in (True, False):
        members = [i for i, found in enumerate(pictured) if found == has_images]
        for start in range(0, len(members), size):
            index = members[start : start + size]
            rows = [pairs.safe[i] for i in index] + [pairs.unsafe[i] for i in index]
            inputs = lvlm.prepare(rows, responses=responses)
            batches.append(PairBatch(inputs, tuple(index), has_images, tuple(rows), dict(regions or {})))
    _require_regions(batches)
    return batches


def _require_regions(batches: Sequence[PairBatch]) -> None:
    """Refuse regions that mean something else in one twin than in the other, or nothing in any pair."""
    if not batches or not batches[0].regions:
        return
    pictured = [batch for batch in batches if batch.has_images]
    if not pictured:
        raise MediationError(
            "pairs must have pictures in both twins for regions, got text alone; use spans as positions"
        )
    for batch in pictured:
        for at, pair in enumerate(batch.index):
            sizes = [[image.size for image in batch.examples[row].images] for row in (at, batch.n + at)]
            if sizes[0] != sizes[1]:
                raise MediationError(
                    f"twins must have pictures of one size for regions, which are in pixels, got {sizes[0]} and {sizes[1]} in pair {pair}; "
                    "resize one"
                )
    for name in batches[0].regions:
        if not any(bool(batch.mask(name).any()) for batch in pictured):
            raise MediationError(
                f"region {name!r} must overlap image tokens of a picture, got none in any pair; lower cover, or give edges inside the "
                "pictures"
            )


def misaligned(batches: Sequence[PairBatch]) -> list[int]:
    """Indices of the pairs whose twins are not aligned, in order."""
    return sorted(
        pair for batch in batches for pair, bad in zip(batch.index, batch.misaligned.tolist(), strict=True) if bad
    )


def unequal_images(batches: Sequence[PairBatch]) -> list[int]:
    """Indices of the pairs whose twins have different numbers of image tokens, in order."""
    return sorted(
        pair
        for batch in batches
        if batch.has_images
        for pair, differ in zip(batch.index, batch.unequal_images.tolist(), strict=True)
        if differ
    )


def shared_positions(batches: Sequence[PairBatch], positions: Sequence[str]) -> tuple[str, ...]:
    """Those of the positions that have a meaning in both twins of every pair; see :func:`require_shared`."""
    if not misaligned(batches):
        return tuple(positions)
    image = not unequal_images(batches)
    return tuple(name for name in positions if name in ALWAYS_SHARED and (image or name != "image"))


def require_shared(batches: Sequence[PairBatch], positions: Sequence[str]) -> None:
    """Refuse positions that do not have a meaning in both twins of every pair.

    Raises:
        ValueError: If they have not; the message names the pairs.
    """
    regions = batches[0].regions if batches else {}
    bad, needs = misaligned(batches), [name for name in positions if name not in ALWAYS_SHARED and name not in regions]
    if bad and needs:
        raise ValueError(
            f"pairs must be aligned (same length, same image positions) for positions {needs}, got twins "
            f"that differ in pairs {bad}; use positions={ALWAYS_SHARED}, or prompts of equal length"
        )
    unequal = unequal_images(batches)
    about = [name for name in positions if name == "image" or name in regions]
    if unequal and about:
        raise ValueError(
            f"twins must have the same number of image tokens for position {about[0]!r}, got twins that differ "
            f"in pairs {unequal}; use pictures of one size, or positions=('last',)"
        )


def require_whole_pictures(batches: Sequence[PairBatch], sites: Sequence[Site]) -> None:
    """Refuse sites outside the language tower where patches of twins do not correspond.

    Raises:
        ValueError: If pictures are cut in tiles, a twin has several, or the pictures of twins have grids of other shapes.
    """
    outside = [str(site) for site in sites if site.tower != "language"]
    if not outside:
        return
    for batch in (batch for batch in batches if batch.has_images):
        if (found := len(batch.inputs.image_rows)) != batch.inputs.batch_size:
            raise ValueError(
                f"every twin must have one picture that is not cut in tiles for {outside[0]}, got {found} entries of the "
                f"vision tower for {batch.inputs.batch_size} twins; use sites of the language tower"
            )
        shapes = [[(grid.rows, grid.cols) for grid in grids] for grids in batch.inputs.spans.grids]
        if bad := [pair for at, pair in enumerate(batch.index) if shapes[at] != shapes[batch.n + at]]:
            raise ValueError(
                f"twins must have pictures of one size for {outside[0]}, got grids of other shapes in pairs {bad}; resize the "
                "pictures, or use positions=('last',) in the language tower"
            )


def bound(outcome: BaseOutcome, batch: PairBatch, logits: Tensor | None) -> BaseOutcome:
    """The outcome, told what it needs to know of the batch: its examples, or the safe twins' untouched logits.

    Args:
        outcome: The outcome.
        batch: The batch.
        logits: [2n, kept, vocab] of the untouched batch, or None where there are none yet.
    """
    own = outcome.with_examples(batch.examples)
    return own if logits is None else own.with_reference(logits, batch.inputs, 2 * list(range(batch.n)))


def bound_to_rows(outcome: BaseOutcome, batch: PairBatch, logits: Tensor, rows: Sequence[int]) -> BaseOutcome:
    """The outcome for some rows of a batch, told the safe twins' untouched logits if it reads differences from them.

    Args:
        outcome: The outcome.
        batch: The batch.
        logits: [2n, kept, vocab] of the untouched batch.
        rows: The rows.
    """
    return bound(outcome, batch, logits).for_rows(list(rows))


def logits_needed(outcome: BaseOutcome, inputs: LVLMInputs) -> int:
    """How many last positions' logits an outcome needs; 0 stands for all of them.

    Those that are ``from_last`` read nothing before the last prompt token; of others nothing is known.
    """
    if not outcome.from_last:
        return 0
    return inputs.input_ids.shape[1] - min(inputs.spans.last_index())
