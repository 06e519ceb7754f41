"""The way back: a wrapped model as plain Hugging Face, for its state dict and its files, or for good.

Bridge components stand in for submodules of the model and hold them; here they make way for what they hold, so that keys are
those of plain Hugging Face.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from care_lens.lvlm.attention import NAME as ATTENTION

_ATTENTION = "_care_lens_attention_before"
KEYED = ("state_dict", "load_state_dict", "save_pretrained")
"""Methods of the model that speak of its weights by name."""

COPYING = (
    "write the weights with lvlm.hf_model.save_pretrained(folder) and load them again with HookedLVLM.from_pretrained, or take the "
    "plain model with lvlm.unwrap()"
)
"""What to do instead of copying a wrapped model."""


@dataclass(frozen=True)
class _Swap:
    """A submodule that a component of the bridge stands in for."""

    owner: nn.Module
    name: str
    plain: nn.Module
    component: nn.Module


def _swaps(module: nn.Module) -> Iterator[_Swap]:
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        inside = child
        while isinstance(inside, GeneralizedComponent) and isinstance(inside.original_component, nn.Module):
            inside = inside.original_component
        if inside is not child:
            yield _Swap(module, name, inside, child)
        yield from _swaps(inside)


@contextmanager
def plain(model: nn.Module) -> Iterator[nn.Module]:
    """A wrapped model without bridge components, for as long as the block lasts.

    Args:
        model: The model.

    Yields:
        The same model, whose names and weights are those of plain Hugging Face.
    """
    swaps = list(_swaps(model))
    for swap in swaps:
        swap.owner._modules[swap.name] = swap.plain
    biases = _without_zero_bias(swaps)
    try:
        yield model
    finally:
        for linear, bias in biases:
            del linear._parameters["bias"]
            linear._buffers["bias"] = bias
        for swap in swaps:
            swap.owner._modules[swap.name] = swap.component


def make_plain(model: nn.Module) -> None:
    """Take bridge components out of a model for good, and give it the attention that it had."""
    swaps = list(_swaps(model))
    for swap in swaps:
        swap.owner._modules[swap.name] = swap.plain
    _without_zero_bias(swaps)
    for config, before in model.__dict__.pop(_ATTENTION, []):
        config._attn_implementation = before


def _without_zero_bias(swaps: list[_Swap]) -> list[tuple[nn.Linear, Tensor]]:
    """Take away the bias of zeros, a buffer, that TransformerLens gives an unembedding which has none."""
    taken = []
    for linear in [swap.plain for swap in swaps if isinstance(swap.plain, nn.Linear)]:
        bias = linear._buffers.get("bias")
        if bias is not None and not bool(bias.any()):
            del linear._buffers["bias"]
            linear.register_parameter("bias", None)
            taken.append((linear, bias))
    return taken


def remember_attention(model: nn.Module) -> None:
    """Note the attention implementations of a plain model and its towers, for :func:`make_plain`."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    model.__dict__[_ATTENTION] = [
        (config, before)
        for config in configs.values()
        if (before := getattr(config, "_attn_implementation", None)) not in (None, ATTENTION)
    ]


def refuse_copies(what: str, instead: str) -> Callable[..., NoReturn]:
    """A method that stands where an object would be pickled or copied, and says what to do instead.

    Args:
        what: What the object is.
        instead: What to do.
    """

    def refuse(*args: Any) -> NoReturn:
        raise TypeError(
            f"{what} must not be pickled or copied, since it is tied to a model with hooks in it; {instead}"
        )

    return refuse
