"""Combining readers: several signs of harm in one score, and pictures and words read apart.

Four combinations never fall as one of their scores grows, so that a gate behind them keeps the rule that what has opened stays open:

- :class:`~care_lens.repair.MaxReader`, also ``AnyOf``: the largest score. It opens where one sign is enough.
- :class:`AllOf`: the smallest score. It opens where every sign is there. Put each reader in the unit of its own threshold first
  (:func:`in_threshold_units`, or ``reader.with_threshold``); then all of them exceed their thresholds exactly where the smallest exceeds 1.
- :class:`WeightedReader`: the weighted mean.
- :class:`SumReader`: the sum. Of linear readers of one token after several blocks it is one linear reader of all of them
  (:class:`~care_lens.repair.ReaderPlan` with a depth).

The signs need not be there at one token: each reader's score is the largest so far, so "the prompt asks for harm, and the answer
complies" is ``AllOf(readers=(prompt_reader, answer_reader))``.

    asks, complies = in_threshold_units((prompt_reader, answer_reader), read_scores(lvlm, benign, [prompt_reader, answer_reader]), epsilon=0.05)
    reader = AllOf(readers=(asks, complies))
    gate = ConformalGate.calibrate(read_scores(lvlm, other_benign, [reader])[:, 0], epsilon=0.01)

:func:`modality_detector` makes such a reader of two that see image tokens and words apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.repair.checks import require_number
from care_lens.repair.errors import RepairError
from care_lens.repair.gate import ConformalGate
from care_lens.repair.kinds import register_kind
from care_lens.repair.reader import CombinedReader, MaxReader, Reader

AnyOf = MaxReader
"""The largest score of several readers: it opens where one of them does. The class is :class:`~care_lens.repair.MaxReader`."""

Combination = Literal["max", "min", "both", "weighted"]


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class AllOf(CombinedReader):
    """The smallest score of several readers, of one site or of several: it opens where all of them do.

    A reader that had nothing to read (there is no picture) has -inf, so that the whole stays closed; one whose reading broke has NaN, and so
    has the whole, on which a gate opens.

    Attributes:
        readers: The readers, each in the unit of its own threshold (``reader.with_threshold``), so that the smallest exceeds 1 where each exceeds its
            threshold.

    Raises:
        RepairError: If there are none, or one is no reader.

    Example:
        >>> import torch
        >>> from care_lens import Site
        >>> from care_lens.repair import AllOf, LinearReader
        >>> reads = [
        ...     LinearReader(site=Site.parse("blocks.0.hook_mlp_out"), direction=axis, centre=torch.zeros(2)).with_threshold(2.0)
        ...     for axis in torch.eye(2)
        ... ]
        >>> states = torch.tensor([[[4.0, 1.0], [4.0, 3.0]]])  # the first token exceeds one threshold of 2, the second both
        >>> AllOf(readers=tuple(reads)).combine({one: one.tokens(states) for one in reads}).tolist()
        [[0.5, 1.5]]
    """

    def joined(self, scores: Float[Tensor, "reader *shape"]) -> Float[Tensor, "*shape"]:
        """The smallest; NaN where one of them is."""
        return scores.amin(dim=0)


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class WeightedReader(CombinedReader):
    """The weighted mean of several readers' scores.

    A score below ``floor`` counts as ``floor``, and so does a reader that had nothing to read, as long as another one had: so a
    request without a picture is judged by its words, and the mean never falls when there is more to read.

    Attributes:
        readers: The readers; standardise them first, so that their scores are of one unit.
        weights: One for each reader, 0 or more, not all 0.
        floor: The least that a score counts as, in the readers' unit; 0 is the benign mean of standardised ones.

    Raises:
        RepairError: If there are no readers, one is none, or weights or floor are not as said.
    """

    weights: tuple[float | int, ...]
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.weights, (tuple, list)) or len(self.weights) != len(self.readers):
            raise RepairError(f"weights must be one for each of the {len(self.readers)} readers, got {self.weights!r}")
        for weight in self.weights:
            require_number(weight, name="a weight", least=0)
        object.__setattr__(self, "weights", tuple(map(float, self.weights)))
        if not sum(self.weights) > 0:
            raise RepairError(f"weights must not all be 0, got {self.weights}; give one above 0")
        require_number(self.floor, name="floor")

    def joined(self, scores: Float[Tensor, "reader *shape"]) -> Float[Tensor, "*shape"]:
        """The weighted mean; -inf where no reader had anything to read."""
        used = [i for i, weight in enumerate(self.weights) if weight > 0]
        total = sum(self.weights)
        # clamp keeps NaN; a reader of weight 0 would turn a score of inf into NaN.
        terms = [self.weights[i] / total * scores[i].clamp(min=self.floor) for i in used]
        mean = torch.stack(terms).sum(dim=0)
        nothing = (scores[used] == -torch.inf).all(dim=0)
        broken = scores.isnan().any(dim=0)
        return mean.masked_fill(nothing, -torch.inf).masked_fill(broken, torch.nan)


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class SumReader(CombinedReader):
    """The sum of several readers' scores: one linear reader of several places, if they are linear and each reads one token.

    Of readers that look at many tokens it is the sum of their largest scores, which may be those of different tokens.

    Attributes:
        readers: The readers.

    Raises:
        RepairError: If there are none, or one is no reader.

    Example:
        >>> import torch
        >>> from care_lens import Site
        >>> from care_lens.repair import LinearReader, SumReader
        >>> reads = [
        ...     LinearReader(site=Site.parse(f"blocks.{layer}.hook_resid_post"), direction=torch.ones(2), centre=torch.zeros(2))
        ...     for layer in (0, 1)
        ... ]
        >>> SumReader(readers=tuple(reads)).combine({reads[0]: torch.tensor([1.0]), reads[1]: torch.tensor([2.0])}).tolist()
        [3.0]
    """

    def joined(self, scores: Float[Tensor, "reader *shape"]) -> Float[Tensor, "*shape"]:
        """The sum; -inf where one of them had nothing to read, NaN where one of them is or the sum is below what its dtype holds."""
        nothing, broken = (scores == -torch.inf).any(dim=0), scores.isnan().any(dim=0)
        total = scores.sum(dim=0)
        # A finite sum may leave the range of its dtype: that is no sign that there was nothing to read.
        broken = broken | (~nothing & (total == -torch.inf))
        return total.masked_fill(nothing, -torch.inf).masked_fill(broken, torch.nan)


def in_threshold_units(
    readers: Sequence[Reader], benign: Float[Tensor, "n reader"], *, epsilon: float
) -> tuple[Reader, ...]:
    """Readers each in the unit of its own threshold, for :class:`AllOf`: 1 is what at most a share epsilon of benign prompts exceed, 0
    their mean.

    A benign prompt then exceeds 1 for all of them with probability at most epsilon, as it does for each (split conformal, see
    :class:`~care_lens.repair.ConformalGate`).

    Args:
        readers: The readers.
        benign: [n, reader] each benign prompt's largest score (:func:`~care_lens.repair.read_scores`); a reader's mean is over the prompts that it
            could read.
        epsilon: Share of benign prompts that may exceed 1, for each reader.

    Returns:
        The readers, in order.

    Raises:
        RepairError: If there is not one column for each reader, a threshold is not finite or not above the mean, or a score is NaN.
        TooFewCalibrationError: If n < 1/epsilon - 1.
    """
    if benign.ndim != 2 or benign.shape[1] != len(readers):
        raise RepairError(
            f"benign must be [n, {len(readers)}], one column for each reader, got {list(benign.shape)}; read_scores gives it"
        )
    made: list[Reader] = []
    for i, reader in enumerate(readers):
        scores = benign[:, i]
        threshold = ConformalGate.calibrate(scores, epsilon=epsilon).threshold
        made.append(reader.with_threshold(threshold, zero=float(scores[scores.isfinite()].double().mean())))
    return tuple(made)


def modality_detector(
    image: Reader,
    text: Reader,
    *,
    combine: Combination = "max",
    thresholds: tuple[float, float] | None = None,
    weights: tuple[float, float] = (0.5, 0.5),
) -> CombinedReader:
    """A detector that reads pictures and words apart and combines what it finds.

    Args:
        image: A reader of image tokens (``positions="image"``).
        text: A reader of words (``positions="text"``, "last" or "generated").
        combine: "max": one of the two is enough. "min": the smaller score counts, in the unit that the readers have. "both": each must exceed
            its own threshold; the score is 1 where the lower of the two is at its threshold. "weighted": the weighted mean, in which a request without a
            picture counts 0 for its picture.
        thresholds: Of image and text, for "both".
        weights: Of image and text, for "weighted".

    Returns:
        The reader. Under "min" and "both" a request without a picture scores -inf, which leaves the gate closed.

    Raises:
        RepairError: If an option is not known, thresholds are missing or given without "both", or a reader reads the other modality.

    Example:
        >>> import torch
        >>> from care_lens import Site
        >>> from care_lens.repair import LinearReader, modality_detector
        >>> seen, said = [
        ...     LinearReader(site=Site.parse("blocks.1.hook_resid_post"), direction=torch.ones(4), centre=torch.zeros(4), positions=p)
        ...     for p in ("image", "text")
        ... ]
        >>> both = modality_detector(seen, said, combine="both", thresholds=(4.0, 2.0))
        >>> [float(one.scale) for one in both.readers]
        [4.0, 2.0]
    """
    if combine not in get_args(Combination):
        raise RepairError(f"combine must be one of {get_args(Combination)}, got {combine!r}")
    if (thresholds is not None) != (combine == "both"):
        raise RepairError(
            f'thresholds must be given with combine="both" and with nothing else, got {thresholds} with {combine!r}'
        )
    for name, reader, own in (("image", image, True), ("text", text, False)):
        for leaf in reader.leaves:
            named = (leaf.positions,) if isinstance(leaf.positions, str) else leaf.positions
            if ({*named} != {"image"}) if own else not {"image", "all", "prompt"}.isdisjoint(named):
                wanted = 'positions="image"' if own else 'positions such as "text", "last" or "generated"'
                raise RepairError(f"{name} must read at {wanted}, got {leaf.positions!r} at {leaf.site}")
    if thresholds is not None:
        image, text = image.with_threshold(thresholds[0]), text.with_threshold(thresholds[1])
    pair = (image, text)
    if combine == "weighted":
        return WeightedReader(readers=pair, weights=weights)
    return MaxReader(readers=pair) if combine == "max" else AllOf(readers=pair)
