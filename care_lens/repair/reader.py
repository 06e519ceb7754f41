"""Readers: what a repair looks at to decide whether a request is unsafe.

A reader gives every row of a batch a score, larger where the request looks more harmful, from activations at
one site (:class:`EnergyReader`, :class:`LinearReader`) or at several (:class:`MaxReader`, and those of
:mod:`care_lens.repair.combined`). At a site each
token has a score; the prompt's are pooled over the positions that are read, a generated token counts by
itself, and what holds from a token on is the largest so far. A token whose score is NaN or -inf (activations or sums that are
not finite) makes the row's score NaN from there on, and a gate opens on it. A score is ``(raw - location) / scale``;
:meth:`Reader.standardised` takes the two from benign scores, so that readers of different units can be
compared and combined.

Reader and writer of a correction may differ in site and subspace: generalised eigenvectors read well and
write badly, the difference of means is the reverse.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.core.site import Site
from care_lens.repair.checks import require_number, require_tensor
from care_lens.repair.errors import FlatScoresError, RepairError
from care_lens.repair.kinds import register_kind
from care_lens.repair.placed import PlacedTensors, compute_dtype
from care_lens.repair.positions import Positions, check_positions, check_site
from care_lens.subspace import SafetySubspace

AnyReader = TypeVar("AnyReader", bound="Reader")


@dataclass(frozen=True, eq=False, kw_only=True)
class Reader(ShortRepr, ABC):
    """A score for every row of a batch.

    Attributes:
        location: Subtracted from the raw score.
        scale: Divides it after that; above 0.

    Raises:
        RepairError: If the scale is not above 0, or one of them is not finite.
    """

    location: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        require_number(self.location, name="location")
        require_number(self.scale, name="scale", above=0)

    @property
    @abstractmethod
    def leaves(self) -> tuple["SiteReader", ...]:
        """The readers of single sites that this one is made of."""

    @abstractmethod
    def combine(self, scores: Mapping["SiteReader", Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
        """The reader's score from those of its leaves."""

    def standardised(self: AnyReader, benign: Float[Tensor, "n"]) -> AnyReader:
        """The same reader in units of the spread of benign scores.

        Args:
            benign: Scores of this reader on benign examples, none of which calibrates the gate.

        Returns:
            The reader whose scores on those examples have mean 0 and standard deviation 1.

        Raises:
            FlatScoresError: If the scores do not vary or are not finite.
        """
        mean, spread = float(benign.double().mean()), float(benign.double().std())
        if not (0 < spread < float("inf") and math.isfinite(mean)):
            raise FlatScoresError(
                f"benign scores must be finite and vary, got {len(benign)} of standard deviation {spread}"
            )
        return replace(self, location=self.location + self.scale * mean, scale=self.scale * spread)

    def with_threshold(self: AnyReader, threshold: float, *, zero: float = 0.0) -> AnyReader:
        """The same reader in the unit of its threshold, so that readers with thresholds of their own can be combined.

        Args:
            threshold: A score of this reader, which becomes 1.
            zero: A score below it, which becomes 0, such as the mean over benign prompts.

        Returns:
            The reader with scores ``(score - zero) / (threshold - zero)``.

        Raises:
            RepairError: If one of the two is not finite, or the threshold is not above zero's score.

        Example:
            >>> import torch
            >>> from care_lens import Site
            >>> from care_lens.repair import LinearReader
            >>> reader = LinearReader(site=Site.parse("blocks.0.hook_mlp_out"), direction=torch.ones(1), centre=torch.zeros(1))
            >>> reader.with_threshold(5.0, zero=1.0).tokens(torch.tensor([[[1.0], [5.0], [9.0]]])).tolist()
            [[0.0, 1.0, 2.0]]
        """
        require_number(zero, name="zero")
        require_number(threshold, name="threshold", above=zero)
        location = self.location + self.scale * float(zero)
        return replace(self, location=location, scale=self.scale * (float(threshold) - float(zero)))


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteReader(Reader, PlacedTensors):
    """A reader of one site.

    Attributes:
        site: Where it reads; a [batch, pos, d] site of the language tower.
        positions: Which tokens it reads. "last", the default, is the last prompt token, where the whole
            request is known.
        pooling: How the prompt's tokens make one score: "max" or "mean".

    Raises:
        RepairError: If site, positions or pooling are not such.
    """

    site: Site
    positions: Positions = "last"
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_site(self.site, name="site of a reader")
        check_positions(self.positions, name="positions")
        if self.pooling not in ("max", "mean"):
            raise RepairError(f"pooling must be 'max' or 'mean', got {self.pooling!r}")

    @property
    @abstractmethod
    def width(self) -> int:
        """Size of the last axis of the activations it reads."""

    @abstractmethod
    def raw(self, activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
        """The score of each token, before location and scale."""

    @property
    def leaves(self) -> tuple["SiteReader", ...]:
        """Itself."""
        return (self,)

    def combine(self, scores: Mapping["SiteReader", Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
        """Its own score."""
        return scores[self]

    def tokens(self, activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
        """The score of each token.

        Args:
            activation: [batch, pos, d] at the site.

        Returns:
            [batch, pos] scores in float32 (float64 for a float64 activation); NaN where one is NaN or -inf.

        Raises:
            RepairError: If the activation's width is not the reader's, or its dtype is not floating.
        """
        if not activation.is_floating_point():
            raise RepairError(
                f"activation at {self.site} must be floating point, got {activation.dtype}; give it as float32"
            )
        if activation.shape[-1] != self.width:
            raise RepairError(
                f"activation at {self.site} must be {self.width} wide for this reader, got "
                f"{activation.shape[-1]}; fit it on this model and site"
            )
        scores = (self.raw(activation.to(compute_dtype(activation.dtype))) - self.location) / self.scale
        # -inf means "nothing was read", which a token that overflowed must not pass for.
        return scores.masked_fill(scores == -torch.inf, torch.nan)

    def score(
        self, activation: Float[Tensor, "batch pos d"], mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch"]:
        """The score of each row, its tokens pooled.

        Args:
            activation: [batch, pos, d] at the site.
            mask: [batch, pos] the tokens to pool.

        Returns:
            [batch] scores; -inf for a row without such tokens.
        """
        return pool(self.tokens(activation), mask, self.pooling)


def pool(scores: Float[Tensor, "batch pos"], mask: Bool[Tensor, "batch pos"], pooling: str) -> Float[Tensor, "batch"]:
    """Maximum or mean of a row's scores under a mask; -inf for a row where the mask is empty."""
    if pooling == "max":
        return scores.masked_fill(~mask, -torch.inf).amax(dim=1)
    count = mask.sum(dim=1)
    mean = scores.masked_fill(~mask, 0.0).sum(dim=1) / count.clamp(min=1)
    return mean.masked_fill(count == 0, -torch.inf)


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class EnergyReader(SiteReader):
    """Energy of a subspace: raw score ``||read^T (h - centre)||^2``, in units of benign variance summed over
    the rank.

    Attributes:
        read: [d, k] directions, scaled so that benign activations have unit variance along each.
        centre: [d] benign mean.

    Raises:
        RepairError: If a tensor is not floating, finite and of that shape.
    """

    read: Float[Tensor, "d k"]
    centre: Float[Tensor, "d"]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tensor(self.read, name="read", shape=(None, None), where=self.site)
        require_tensor(self.centre, name="centre", shape=(self.width,), where=self.site)

    @classmethod
    def from_subspace(
        cls,
        subspace: SafetySubspace,
        *,
        positions: Positions = "last",
        pooling: Literal["max", "mean"] = "max",
    ) -> "EnergyReader":
        """Read a fitted subspace at the site it was fitted on.

        Args:
            subspace: The subspace.
            positions: Which tokens to read.
            pooling: "max" or "mean" over the prompt's tokens.

        Returns:
            The reader.

        Raises:
            ValueError: If the subspace does not say which site it belongs to.
        """
        site = fitted_site(subspace)
        return cls(site=site, read=subspace.read, centre=subspace.mean_benign, positions=positions, pooling=pooling)

    @property
    def width(self) -> int:
        """Size of the last axis of the activations it reads."""
        return self.read.shape[0]

    def raw(self, activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
        """The energy of each token."""
        (read,) = self.placed("read", like=activation)
        return (self.centred(activation, "centre") @ read).square().sum(dim=-1)


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class LinearReader(SiteReader):
    """Coordinate along a direction: raw score ``(h - centre) . direction``, signed.

    Attributes:
        direction: [d] points from benign to malicious.
        centre: [d] where the score is 0.

    Raises:
        RepairError: If a tensor is not floating, finite and of that shape.
    """

    direction: Float[Tensor, "d"]
    centre: Float[Tensor, "d"]

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tensor(self.direction, name="direction", shape=(None,), where=self.site)
        require_tensor(self.centre, name="centre", shape=(self.width,), where=self.site)

    @classmethod
    def from_subspace(
        cls,
        subspace: SafetySubspace,
        *,
        positions: Positions = "last",
        pooling: Literal["max", "mean"] = "max",
    ) -> "LinearReader":
        """Read the first direction of a fitted subspace, on whose positive side the malicious mean is.

        With ``contrast="mean"`` and the benign metric this is linear discriminant analysis with the benign
        covariance.

        Args:
            subspace: The subspace.
            positions: Which tokens to read.
            pooling: "max" or "mean" over the prompt's tokens.

        Returns:
            The reader.

        Raises:
            ValueError: If the subspace does not say which site it belongs to.
        """
        return cls(
            site=fitted_site(subspace),
            direction=subspace.read[:, 0],
            centre=subspace.mean_benign,
            positions=positions,
            pooling=pooling,
        )

    @property
    def width(self) -> int:
        """Size of the last axis of the activations it reads."""
        return self.direction.shape[0]

    def raw(self, activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
        """The coordinate of each token."""
        (direction,) = self.placed("direction", like=activation)
        return self.centred(activation, "centre") @ direction


@dataclass(frozen=True, eq=False, kw_only=True)
class CombinedReader(Reader):
    """A reader whose score is made of those of several readers, of one site or of several.

    Attributes:
        readers: The readers.

    Raises:
        RepairError: If there are none, or one is no reader.
    """

    readers: tuple[Reader, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.readers, (tuple, list)) or not all(isinstance(one, Reader) for one in self.readers):
            raise RepairError(f"readers must be a tuple of readers, got {self.readers!r}")
        object.__setattr__(self, "readers", tuple(self.readers))
        if not self.readers:
            raise RepairError("readers must hold at least one reader, got none")

    @property
    def leaves(self) -> tuple[SiteReader, ...]:
        """The leaves of all its readers, each once."""
        return tuple(dict.fromkeys(leaf for reader in self.readers for leaf in reader.leaves))

    def combine(self, scores: Mapping[SiteReader, Float[Tensor, "*shape"]]) -> Float[Tensor, "*shape"]:
        """The score made of its readers' scores; NaN where one of them is."""
        own = self.joined(torch.stack([reader.combine(scores) for reader in self.readers]))
        return (own - self.location) / self.scale

    @abstractmethod
    def joined(self, scores: Float[Tensor, "reader *shape"]) -> Float[Tensor, "*shape"]:
        """One score from those of the readers. It must not fall where one of them grows, so that a gate that has opened stays
        open; and be NaN where one of them is.

        Args:
            scores: [reader, ...]; -inf where a reader had nothing to read.

        Returns:
            [...] before location and scale.
        """


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class MaxReader(CombinedReader):
    """The largest score of several readers, of one site or of several; also called ``AnyOf``, the sibling of
    :class:`~care_lens.repair.AllOf`.

    Attributes:
        readers: The readers; standardise them first, so that their scores are of one unit.

    Raises:
        RepairError: If there are none, or one is no reader.
    """

    def joined(self, scores: Float[Tensor, "reader *shape"]) -> Float[Tensor, "*shape"]:
        """The largest; NaN where one of them is."""
        return scores.amax(dim=0)


def fitted_site(subspace: SafetySubspace) -> Site:
    """The site a subspace was fitted on.

    Raises:
        ValueError: If it does not say.
    """
    site: Any = subspace.site
    if site is None:
        raise RepairError("subspace must say which site it was fitted on, got None; fit it with site=...")
    return Site.parse(site)
