"""Mixed precision: under ``torch.autocast`` the bridge must give the numbers that plain Hugging Face gives.

TransformerLens's components cast twice where Hugging Face leaves types to autocast. Its attention casts the float32 mask to the
dtype of the scores, in which the most negative float32 number is minus infinity, so that a row that is masked everywhere (a padded
position) becomes NaN; its norms cast their result back to the dtype of their input, which rounds what Hugging Face keeps
in float32. Without autocast neither changes a bit.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import AttentionBridge
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

_NORM = "_hf_autograd_forward_with_hooks"


def keep_precision(bridge: nn.Module) -> Iterator[Callable[[], Any]]:
    """Have the attention and the norms of a bridge do without those casts.

    Args:
        bridge: A TransformerBridge; it is changed.

    Yields:
        For each change, what undoes it.
    """
    for module in bridge.modules():
        if isinstance(module, AttentionBridge):
            yield module.register_forward_pre_hook(_finite_mask, with_kwargs=True).remove
        elif isinstance(module, NormalizationBridge) and module.original_component is not None:
            yield _keep_result(module)


def _finite_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or not mask.is_floating_point() or not torch.is_autocast_enabled(mask.device.type):
        return None
    lowest = torch.finfo(torch.get_autocast_dtype(mask.device.type)).min
    return args, {**kwargs, "attention_mask": mask.clamp(min=lowest)}


def _keep_result(norm: NormalizationBridge) -> Callable[[], Any]:
    """Return the wrapped norm's own result where no hook has edited the norm's inside."""
    inner, forward = norm.original_component, getattr(norm, _NORM)
    assert isinstance(inner, nn.Module)

    def native(x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return forward(x)
        if not norm.hook_scale.has_hooks() and not norm.hook_normalized.has_hooks():
            return inner(x)
        result, own = forward(x), inner(x)
        return own if torch.equal(own.to(result.dtype), result) else result.to(own.dtype)

    object.__setattr__(norm, _NORM, native)
    return lambda: object.__delattr__(norm, _NORM)
