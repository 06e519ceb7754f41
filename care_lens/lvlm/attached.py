"""A plain Hugging Face model with hook points on it, without a bridge: what a repair is attached to.

:class:`AttachedLVLM` does what a HookedLVLM does, by the same code, with plain torch hooks in place of a bridge. The model stays what
it was: the same modules, the same attention, the same class; its own ``forward`` and ``generate`` are what is called. Whoever attaches
to a model shares one AttachedLVLM with all others, and with the last of them it goes away.
"""

import threading
from typing import Any, ClassVar

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from care_lens.core.site import Site, SiteLike
from care_lens.lvlm.advice import ATTACHED as ATTACHED_ADVICE
from care_lens.lvlm.advice import Advice
from care_lens.lvlm.bridging import ATTACHED
from care_lens.lvlm.doors import Doors
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.families import family_of
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs
from care_lens.lvlm.loading import require_processor
from care_lens.lvlm.modules import PlainPoints
from care_lens.lvlm.plain import refuse_copies
from care_lens.lvlm.seams import Seams

_COPYING = "remove the repair first (handle.remove(), or leave the `with` block), copy the model, and attach the repair to the copy"
_lock = threading.RLock()


class AttachedLVLM(HookedLVLM):
    """A plain model and its processor. Make one with :func:`acquire`.

    Everything of a HookedLVLM works but ``bind`` and attention patterns, which need a bridge.

    Attributes:
        bridge: The hook points; no TransformerBridge.
        users: How many have acquired it and not yet released it.
        held: What must live as long as it is on the model, whether or not anyone else keeps it.
    """

    advice: ClassVar[Advice] = ATTACHED_ADVICE

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.users = 0
        self.held: set[Any] = set()
        super().__init__(PlainPoints(model, family_of(model)), processor)
        # On the model itself, not in a table beside it, so that a model that is dropped with a repair attached is freed.
        model.__dict__[ATTACHED] = self
        self._seams.on_remove(lambda: model.__dict__.pop(ATTACHED, None))

    def _installed(self) -> Seams:
        return self.bridge.seams

    def _keep_plain(self, doors: Doors) -> None:
        for name in ("generate_batch", "init_continuous_batching"):
            if hasattr(self.hf_model, name):
                doors.stand_in(self.hf_model, name, self._refuse_batching)
        self._refuse_copies(refuse_copies("a model with a repair attached", _COPYING))

    def _refuse_batching(self, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._blocks.open:
            raise HookError(
                f"a repair is on, and {original.__name__} packs the tokens of several requests in one row, which the repair cannot "
                "tell apart; call generate"
            )
        return original(*args, **kwargs)

    @property
    def first_block(self) -> nn.Module:
        """The first block of the language tower."""
        return self.bridge.first_block

    def unwrap(self) -> Any:
        """Take everything off the model and give it back.

        Returns:
            The plain model.
        """
        model = self.hf_model
        self.close()
        return model

    def bind(self, inputs: LVLMInputs) -> Any:
        """Not possible on a plain model.

        Raises:
            HookError: Always: TransformerLens's tools need a bridge.
        """
        raise HookError(
            "bind must be called on a model in a bridge, got a plain one; wrap it with HookedLVLM.from_hf(model, processor)"
        )

    def _require(self, site: SiteLike) -> Site:
        site = Site.parse(site)
        if (reason := self.bridge.missing.get(site)) is not None:
            raise HookError(f"this plain model has no hook point for the site {site}: {reason}")
        return super()._require(site)


def acquire(model: nn.Module, processor: Any) -> AttachedLVLM:
    """The one AttachedLVLM of a model, made if there is none; to be released once for every time.

    Args:
        model: A plain Hugging Face model of a known family.
        processor: Its processor.

    Raises:
        ValueError: If the family is not known or the processor is another model's.
        HookError: If the model is in a bridge, compiled, or laid out in another way than its family says.
    """
    with _lock:
        found = model.__dict__.get(ATTACHED)
        if found is None:
            _require_plain(model)
            found = AttachedLVLM(model, processor)
        else:
            require_processor(model, processor, found.family)
        found.users += 1
        return found


def release(lvlm: AttachedLVLM) -> None:
    """Give back what :func:`acquire` gave; with the last one the model is as it was before the first."""
    with _lock:
        lvlm.users -= 1
        if not lvlm.users:
            lvlm.close()


def _require_plain(model: nn.Module) -> None:
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise HookError(
            "the model must be plain Hugging Face, got one that is in a bridge; put the repair on its HookedLVLM (`with repair.on(lvlm)`), or "
            "take the plain model with lvlm.unwrap()"
        )
    compiled = getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod")
    if compiled:
        raise HookError(
            "the model must not be compiled, got a torch.compile'd one: compiled code does not notice hooks that come later; attach to "
            "the model before it was compiled"
        )
