"""Eager attention whose pattern is a hook point.

Transformers lets attention functions be registered by name. Ours runs the eager function of the module's own file, so that
nothing changes by a bit; where the module's hook point has hooks, the pattern that they leave is multiplied with the
values again.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "care_lens_eager"
"""Name of the attention implementation in transformers."""

POINT, EAGER = "_care_lens_pattern", "_care_lens_eager"


def hooked_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Eager attention of the module's own model file, with the pattern at the module's hook point.

    Args:
        module: The attention module; its hook point, if any, is in its attribute ``_care_lens_pattern``.
        query: [batch, head, query, d_head].
        key: [batch, key-value head, key, d_head].
        value: As ``key``.
        attention_mask: Added to the scores.
        **kwargs: scaling, dropout and so on.

    Returns:
        [batch, query, head, d_head], and the pattern.
    """
    eager = getattr(sys.modules[type(module).__module__], module.__dict__.get(EAGER, "eager_attention_forward"))
    out, pattern = eager(module, query, key, value, attention_mask, **kwargs)
    point = module.__dict__.get(POINT)
    if point is None or pattern is None:
        return out, pattern
    if not point.has_hooks():
        return out, pattern
    edited = point(pattern)  # what the hooks left, in place or not
    values = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
    return torch.matmul(edited, values).transpose(1, 2).contiguous(), edited


AttentionInterface.register(NAME, hooked_eager)
AttentionMaskInterface.register(NAME, eager_mask)
