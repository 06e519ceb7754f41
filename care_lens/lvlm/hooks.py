"""What a hook is, what it is handed, and what it may return; and points without their hooks for a while."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor

from care_lens.core.site import Site
from care_lens.core.verdicts import require_call
from care_lens.lvlm.blocks import Block
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.seams import HonestConversion

HookFn: TypeAlias = Callable[..., Any]
"""``fn(activation, hook)``: returns a new tensor of the same shape, or None to leave things as they are; never writes into
the activation. ``hook.name`` is TransformerLens's own name of the point, which an ``LVLMCache`` understands too."""

FwdHooks: TypeAlias = Sequence[tuple[Site | str | Callable[[str], bool], HookFn]]
"""Pairs of a place (a site, any hook name of the bridge, or a filter of names) and a hook function. A filter sees the sites'
names and, of the language tower, the bridge's other names; each hook point it accepts runs the function once."""


def owned(fn: HookFn, block: Block) -> HookFn:
    """A hook that acts in its block's threads alone, and whose returns are checked where the hook point does not do so itself."""

    def hook_of_its_thread(activation: Any, hook: Any) -> Any:
        if not block.acts:
            return None
        if isinstance(hook.hook_conversion, HonestConversion) or not isinstance(activation, Tensor):
            return fn(activation, hook=hook)
        # At TransformerLens's own points what is written into an activation would be lost, or would change what others read of it (the
        # batch itself among them): the hook has a copy, which stands in for the activation once it was written into.
        given = activation.clone()
        before = None if given.is_inference() else given._version
        returned = fn(given, hook=hook)
        if returned is None:
            written = not torch.equal(given, activation) if before is None else given._version != before
            return given if written or given.requires_grad else None
        if not isinstance(returned, Tensor):
            raise HookError(f"a hook at {hook.name} must return a tensor or None, got {type(returned).__name__}")
        kinds = [(value.shape, value.device, value.is_floating_point()) for value in (returned, activation)]
        if kinds[0] != kinds[1]:
            raise HookError(
                f"a hook at {hook.name} must return what it was given, {activation.dtype} {tuple(activation.shape)} on "
                f"{activation.device}, got {returned.dtype} {tuple(returned.shape)} on {returned.device}"
            )
        return returned

    return wraps(fn)(hook_of_its_thread) if hasattr(fn, "__name__") else hook_of_its_thread


def hook_pairs(fwd_hooks: Any) -> list[tuple[Any, HookFn]]:
    """The pairs, if they are pairs of a place and a function."""
    if isinstance(fwd_hooks, (str, bytes, dict)) or not isinstance(fwd_hooks, Sequence):
        raise HookError(
            f"fwd_hooks must be a list of pairs of a place and a function, got {type(fwd_hooks).__name__}; write "
            "[(site, function), ...]"
        )
    if len(fwd_hooks) == 2 and callable(fwd_hooks[1]):
        raise HookError("fwd_hooks must be a list of pairs of a place and a function, got one pair; put it in a list")
    for pair in fwd_hooks:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not callable(pair[1]):
            raise HookError(
                f"fwd_hooks must be a list of pairs of a place and a function, got {pair!r} in it; write (site, function)"
            )
        require_call(pair[1], "activation", what=f"a hook at {pair[0]}", error=HookError, hook="point")
    return [(place, fn) for place, fn in fwd_hooks]


@contextmanager
def without_hooks(points: Iterable[Any]) -> Iterator[None]:
    """Hook points without hooks, but for permanent ones, in a ``with`` block; all are back after it, in their order."""
    taken = []
    try:
        for point in {id(point): point for point in points}.values():
            ours = {handle.hook.id for handle in point.fwd_hooks if not handle.is_permanent}
            hooks = point._forward_hooks
            if ours & hooks.keys():
                taken.append((hooks, list(hooks.items())))
                for key in ours & hooks.keys():
                    del hooks[key]
        yield
    finally:
        for hooks, items in taken:
            hooks.clear()
            hooks.update(items)
