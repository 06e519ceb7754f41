"""The base of defences that act through hooks, the undefended model, and what they share.

A defence of your own is a frozen dataclass with one method, ``edits``: from a batch to pairs of a hook point and a function.
Everything else (putting it on a model, checking widths, saving, the row of a table) comes with the base.

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Shrink(HookDefence):
        site: Site
        alpha: float = 0.1
        name: str = "shrink"

        def edits(self, batch):
            return [batch.edit(self.site, lambda h: (1 - self.alpha) * h, positions="last")]
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.capture import capture
from care_lens.core.blocks import with_block
from care_lens.core.examples import Example
from care_lens.core.renames import renamed
from care_lens.core.site import Site, SiteLike
from care_lens.defences.stored import FitError, StoredDefence, WrongModelError, require_examples
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.base import HookPair, HookRepair
from care_lens.repair.opening import Watch
from care_lens.repair.placed import compute_dtype
from care_lens.repair.plan import PlanPart
from care_lens.repair.positions import BatchView, Positions


class Batch(BatchView):
    """One batch as the hooks of a defence see it: where they are, and which forward pass runs.

    Args:
        inputs: The batch.
        lvlm: The model that the defence is on; None where the hooks were asked for without one.
    """

    def __init__(self, inputs: LVLMInputs, lvlm: HookedLVLM | None = None) -> None:
        super().__init__(inputs)
        self.inputs = inputs
        self._lvlm = lvlm

    @property
    def lvlm(self) -> HookedLVLM:
        """The model.

        Raises:
            WrongModelError: If the hooks were made without one.
        """
        if self._lvlm is None:
            raise WrongModelError(
                "this defence runs the model itself, so that it must be given it; use `with defence.on(lvlm)` or fwd_hooks(inputs, lvlm)"
            )
        return self._lvlm

    def examples(self) -> tuple[Example, ...]:
        """What the rows were prepared from.

        Raises:
            ValueError: If the batch does not say.
        """
        if not self.inputs.examples:
            raise ValueError("inputs must say which examples they are of, got none; make them with HookedLVLM.prepare")
        return self.inputs.examples

    def prepare(self, examples: Sequence[Example]) -> LVLMInputs:
        """Other requests about the same pictures, with the pixels of this batch (an attacker may have changed them).

        Args:
            examples: One for each row; with the row's pictures, or without any.
        """
        responses = bool((self.inputs.spans.response & ~self.inputs.spans.prefill).any())
        made = self.lvlm.prepare(examples, responses=responses)
        if made.pixel_values is None:
            return made
        return replace(made, pixel_values=self.inputs.pixel_values, extra=self.inputs.extra)

    @renamed(at="positions")
    def edit(self, site: SiteLike, change: Callable[[Tensor], Tensor], *, positions: Positions = "all") -> HookPair:
        """A hook that changes activations at some positions and leaves all others as they are, to the bit.

        Args:
            site: A site of the language tower.
            change: From [batch, pos, d] activations, in float32 or float64, to new ones of the same shape.
            positions: Which tokens; padding is never changed. Of generated tokens each is changed if "generated" (or "all",
                "text") is among them.

        Returns:
            A TransformerLens ``(name, fn)`` pair.
        """

        def hook_fn(activation: Tensor, hook: Any) -> Tensor:
            mask = self.mask(positions, prefill=self.is_prefill(activation.shape)).to(activation.device)[..., None]
            if not bool(mask.any()):
                return activation
            wide = activation.to(compute_dtype(activation.dtype))
            return torch.where(mask, change(wide).to(activation.dtype), activation)

        return str(site), hook_fn

    def read(self, site: SiteLike, see: Callable[[Tensor, bool], None]) -> HookPair:
        """A hook that looks and changes nothing.

        Args:
            site: A site of the language tower.
            see: Given [batch, pos, d] activations in float32 or float64, and whether they are of the whole batch.
        """

        def hook_fn(activation: Tensor, hook: Any) -> None:
            see(activation.to(compute_dtype(activation.dtype)), self.is_prefill(activation.shape))

        return str(site), hook_fn

    def at_last(self, activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch d"]:
        """The activation at the last prompt token of each row."""
        index = torch.tensor(self.inputs.spans.last_index(), device=activation.device)
        return activation[torch.arange(len(index), device=activation.device), index]


class HookDefence(StoredDefence, HookRepair):
    """Base of defences that are forward hooks, made anew for every batch.

    A subclass is a frozen dataclass that says in ``widths`` which sites it is about and in ``edits`` what it does. With
    ``alpha`` 0 it has no hooks, so that the model is the undefended one to the bit.
    """

    gated: ClassVar[bool] = False
    """Whether it leaves requests on which its gate stays closed as they are, to the bit, in one pass over a whole conversation as when it
    generates; evaluation then generates again only those that it touches (:mod:`care_lens.repair.opening`)."""

    def watch(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> Watch | None:
        """Its hooks for a batch, looking on beside the undefended model: which rows it would touch.

        Args:
            lvlm: The model, without the defence on it.
            inputs: The batch.

        Returns:
            The watch; None of a defence that is not ``gated``.

        Raises:
            ValueError: If it cannot work on the model.
        """
        if not self.gated or type(self).on is not HookDefence.on:
            return None
        self.check(lvlm)
        return Watch(self.fwd_hooks(inputs, lvlm), inputs)

    def widths(self) -> Mapping[Site, int]:
        """The sites it reads and writes, and how wide each must be; none by default."""
        return {}

    @abstractmethod
    def edits(self, batch: Batch) -> list[HookPair]:
        """The hooks for a batch: ``batch.edit`` and ``batch.read`` make them. State belongs into local variables of this method, and
        is reset where a whole batch comes in.

        Args:
            batch: The batch.
        """

    @property
    def off(self) -> bool:
        """Whether it does nothing: a field ``alpha`` that is 0."""
        return getattr(self, "alpha", None) == 0

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that the defence was not fitted on.

        Raises:
            WrongModelError: If a site is of another width.
            ValueError: If a site is not there; the message says why.
        """
        for site, width in self.widths().items():
            if (there := lvlm.width(site)) != width:
                raise WrongModelError(
                    f"{self.name} must be as wide as the model at {site} ({there}), got {width}; fit it on this model"
                )

    def fwd_hooks(self, inputs: LVLMInputs, lvlm: HookedLVLM | None = None) -> list[HookPair]:
        """Hooks for one batch: its forward passes, and generation from it with a key-value cache.

        Args:
            inputs: The batch.
            lvlm: The model, for defences that run it themselves.

        Returns:
            TransformerLens ``(name, fn)`` pairs.
        """
        if self.off:
            return []
        batch = Batch(inputs, lvlm)
        return [batch.guard(), *self.edits(batch)]

    @with_block("defence.on(lvlm)")
    def on(self, lvlm: HookedLVLM) -> Iterator[HookedLVLM]:
        """Put the defence on a model: all it runs and generates is defended until the block is left.

        Args:
            lvlm: The model.

        Raises:
            WrongModelError: If the defence cannot work on it.
        """
        self.check(lvlm)
        with lvlm.hooks_for_each_batch(partial(self.fwd_hooks, lvlm=lvlm)):
            yield lvlm


@dataclass(frozen=True, eq=False, kw_only=True)
class NoDefence(HookDefence):
    """The model as it is: the first row of a defence table."""

    name: str = "none"

    def edits(self, batch: Batch) -> list[HookPair]:
        """None."""
        return []

    @property
    def off(self) -> bool:
        """Always."""
        return True

    def plan_parts(self) -> list[PlanPart]:
        """None."""
        return []


def last_states(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[SiteLike],
    *,
    batch_size: int,
    positions: str = "last",
) -> dict[Site, Float[Tensor, "n d"]]:
    """Activations of examples, one row an example and site, in float64 on the CPU.

    Args:
        lvlm: The model, without a defence on it.
        examples: The requests.
        sites: Sites of the language tower.
        batch_size: Examples a forward pass.
        positions: The last prompt token, or another span, over which the mean is taken; with "response" the examples' responses
            are teacher-forced.

    Raises:
        FitError: If there are no examples, or an activation is not finite.
    """
    require_examples(examples=examples)
    held = capture(
        lvlm,
        examples,
        sites,
        positions=(positions,),
        responses=positions == "response",
        batch_size=batch_size,
        progress=False,
    )
    rows = {Site.parse(site): held.rows(site, positions).double() for site in sites}
    if bad := [str(site) for site, values in rows.items() if not bool(torch.isfinite(values).all())]:
        raise FitError(
            f"activations must be finite, got NaN or infinity at {bad[0]}; are there examples without {positions} tokens?"
        )
    return rows


def block_output(layer: int) -> Site:
    """The residual stream after a block of the language tower."""
    return Site("language", layer, "hook_resid_post")
