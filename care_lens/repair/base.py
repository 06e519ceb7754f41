"""What repairs that act through hooks have in common: they are put on a model for a while, for any batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from care_lens.core.blocks import with_block
from care_lens.core.examples import Example
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.attach import Attachment, attach
from care_lens.repair.bake import BakeCertificate, bake
from care_lens.repair.errors import BakeError
from care_lens.repair.explaining import Explainable
from care_lens.repair.linear import LinearPart
from care_lens.repair.plan import PlanPart

HookPair = tuple[str, Callable[..., Any]]
"""A TransformerLens hook: the name of a hook point, and ``fn(activation, hook)``."""


class HookRepair(Explainable, ABC):
    """A repair that is a set of forward hooks. Satisfies :class:`care_lens.core.Repair`."""

    name: str

    @abstractmethod
    def fwd_hooks(self, inputs: LVLMInputs) -> list[HookPair]:
        """Hooks for one batch: its forward passes, and generation from it with a key-value cache.

        Every whole-batch pass starts afresh, so the same hooks may be used again on the same batch.

        Args:
            inputs: The batch.

        Returns:
            TransformerLens ``(name, fn)`` pairs. Where they meet other hooks at one place, each sees what
            those before it returned.
        """

    @abstractmethod
    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that this repair was not made for.

        Raises:
            ValueError: If a site is not there, or of another width.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON-able values."""

    @with_block("repair.on(lvlm)")
    def on(self, lvlm: HookedLVLM) -> Iterator[HookedLVLM]:
        """Put the repair on a model: all it runs and generates is repaired until the block is left.

        Hooks are made anew for every batch. They come before the hooks given to a call, so caches and
        interventions see the repaired model. Calls of ``lvlm.hf_model`` and ``lvlm.hf_model.generate`` with a processor's
        outputs are repaired too. Blocks may be left in any order. The repair belongs to this thread: while the block is open,
        another thread that has none is refused (ThreadError); ``lvlm.carry_hooks(function)`` takes the repair there.

        Args:
            lvlm: The model.

        Yields:
            The model.

        Raises:
            ValueError: If the model does not fit.

        Warns:
            UnusedBlockWarning: If it is called without ``with``, which does nothing.
        """
        self.check(lvlm)
        with lvlm.hooks_for_each_batch(self.fwd_hooks):
            yield lvlm

    def attach(self, model: nn.Module, processor: Any, *, every_thread: bool = False) -> Attachment:
        """Put it on a plain Hugging Face model, by plain torch hooks; see :func:`care_lens.repair.attach`.

        Args:
            model: The model.
            processor: Its processor.
            every_thread: Whether it acts whichever thread runs the model.

        Returns:
            A handle with ``remove()``, which is also a context manager.

        Raises:
            ValueError: If the model does not fit, or a site cannot be hooked there; the message says why.

        Example:
            >>> with repair.attach(model, processor):  # doctest: +SKIP
            ...     model.generate(**processor(text=text, images=picture, return_tensors="pt"))
        """
        return attach(self, model, processor, every_thread=every_thread)

    def linear_parts(self) -> list[LinearPart]:
        """What of it is one affine map of every token, and what is not, for :meth:`bake`.

        Returns:
            Its parts.

        Raises:
            BakeError: If nothing is known about it, as is the case here.
        """
        raise BakeError(
            f"{self.name} must be known to be linear to be baked, and a {type(self).__name__} is not; attach it instead "
            "(repair.attach(model, processor)), or define linear_parts"
        )

    def bake(
        self,
        model: HookedLVLM | nn.Module,
        directory: str | Path,
        *,
        examples: Sequence[Example],
        processor: Any = None,
        batch_size: int = 8,
    ) -> BakeCertificate:
        """Fold it into the weights and save an ordinary checkpoint with a certificate; see :func:`care_lens.repair.bake`.

        Args:
            model: The model; a HookedLVLM or a plain Hugging Face model. It is not changed.
            directory: Where to; it must not exist, or be empty.
            examples: What the baked model is compared on with the one with hooks.
            processor: The processor of a plain model.
            batch_size: Examples a forward pass.

        Raises:
            BakeError: If a part is not linear or not at a linear map; the reason of every part is named.
        """
        return bake(self, model, directory, examples=examples, processor=processor, batch_size=batch_size)


class NoRepair(HookRepair):
    """The model as it is: the first row of a defence table."""

    name = "none"

    def fwd_hooks(self, inputs: LVLMInputs) -> list[HookPair]:
        """None."""
        return []

    def check(self, lvlm: HookedLVLM) -> None:
        """Fits every model."""

    def plan_parts(self) -> list[PlanPart]:
        """None."""
        return []

    def linear_parts(self) -> list[LinearPart]:
        """None: the model stays as it is."""
        return []

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name}
