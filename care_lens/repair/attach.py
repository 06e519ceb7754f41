"""Put a repair on a plain Hugging Face model: no bridge, no HookedLVLM, the model's own ``generate``.

    with repair.attach(model, processor):
        model.generate(**processor(text=text, images=picture, return_tensors="pt"))

    handle = repair.attach(model, processor)  # or for as long as one likes
    handle.remove()

The repair acts through plain torch forward hooks on the model's own modules, which are there only while a call runs. Which token is
an image token, a word or padding, and where a prompt ends, is taken from the ``input_ids`` and the ``attention_mask`` of each call. So
whatever calls the model with a processor's outputs (an evaluation harness) is answered by the repaired model, token for token as
``with repair.on(lvlm): lvlm.generate(inputs)`` answers; a call about which the repair cannot know what each position is is refused.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import nn

from care_lens.core.outcome import Repair
from care_lens.lvlm.attached import AttachedLVLM, acquire, release
from care_lens.repair.errors import AttachError


class Attachment:
    """A repair on a plain model, until it is removed. Also a context manager that removes it.

    Attributes:
        lvlm: The model with the interface of a HookedLVLM: ``prepare``, ``generate``, ``run_with_cache``, by site. It can be used
            until the attachment is removed.
    """

    def __init__(self, lvlm: AttachedLVLM, undo: ExitStack) -> None:
        self.lvlm = lvlm
        self._undo: ExitStack | None = undo

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.lvlm.hf_model

    @property
    def active(self) -> bool:
        """Whether it is still on the model."""
        return self._undo is not None

    def remove(self) -> None:
        """Take this repair off the model; others stay. Removing twice does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            self.lvlm.held.discard(self)
            undo.close()

    def carry(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function for another thread that runs the model with this thread's repairs; see ``HookedLVLM.carry_hooks``."""
        return self.lvlm.carry_hooks(function)

    def __enter__(self) -> "Attachment":
        if not self.active:
            raise AttachError("the repair must still be on the model, got one that was removed; call attach again")
        return self

    def __exit__(self, *raised: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<Attachment on a {type(self.model).__name__}, {'on' if self.active else 'removed'}>"


def attach(repair: Repair, model: nn.Module, processor: Any, *, every_thread: bool = False) -> Attachment:
    """Put a repair or a defence on a plain Hugging Face model.

    Prefill, decoding with a cache, batches with padding on either side (``generate`` wants it on the left), sampling,
    ``num_return_sequences``, streaming, a ``device_map`` and any attention implementation work. Refused, with the reason, are beams,
    assisted and contrastive decoding, prompt lookup, continuous batching, decoding without a cache, embeddings in place of token
    ids, videos, and a model that was compiled.

    Several repairs on one model act one after the other, in the order in which they were attached, and may be removed in any order.

    Args:
        repair: A HybridFusion, another repair, or a defence whose parts are at sites.
        model: The model, of a family that care_lens knows. It is not modified: no module is replaced, and the attention stays.
        processor: Its processor.
        every_thread: Whether the repair acts whichever thread runs the model, as it must where a harness runs it in a thread of its
            own. By default it belongs to this thread, and a run in another one is refused (ThreadError).

    Returns:
        A handle with ``remove()``, which is also a context manager.

    Raises:
        AttachError: If the defence has no hooks, so that a call of the model cannot be defended by it (it rewrites requests).
        ValueError: If the repair does not fit the model, a site of it cannot be hooked on a plain model, or the family is not known;
            each says why.
    """
    lvlm = acquire(model, processor)
    with ExitStack() as stack:
        stack.callback(release, lvlm)
        before = lvlm.blocks_open
        with lvlm.for_every_thread() if every_thread else nullcontext():
            stack.enter_context(repair.on(lvlm))
        if lvlm.blocks_open == before:
            raise AttachError(
                f"a defence must act through hooks to be attached, got {repair.name}, which has none: it rewrites requests, and a call of "
                "the model holds tokens; give the model what defence.examples(examples) returns"
            )
        made = Attachment(lvlm, stack.pop_all())
        lvlm.held.add(made)  # a repair whose handle nobody keeps stays on
        return made
