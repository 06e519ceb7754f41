"""Digests that say whether a stored answer belongs to the same model, defence, settings and example."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from care_lens.core.content import content_digest
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair

_LENGTH = 16
_SAMPLES = 32


def digest(value: Any) -> str:
    """A short digest of a JSON-able value; the order of keys does not matter.

    Raises:
        TypeError: If the value is not JSON-able.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def example_fingerprint(example: Example) -> str:
    """A digest of what the model is given: the prompt and the pictures' pixels."""
    content = hashlib.sha256(json.dumps(example.prompt).encode())
    for picture in example.images:
        content.update(f"{picture.size}".encode() + picture.tobytes())
    return content.hexdigest()[:_LENGTH]


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's class, parameter names and shapes, and of some values of each parameter.

    It tells models and checkpoints apart; a change of single weights can escape it. Cost: a few numbers are
    copied from each parameter. Parameters that are off the device (``meta``) count by name and shape only.
    """
    content = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        content.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        if not parameter.is_meta:
            content.update(_some_values(parameter).numpy().tobytes())
    return content.hexdigest()[:_LENGTH]


def repair_fingerprint(repair: Repair) -> str:
    """A digest of a repair's description, of every number in its tensors and of every setting, nested ones included.

    Descriptions may give tensors by their norms alone, and two projectors of one rank have the same. So all that the
    repair holds counts, see :func:`care_lens.core.content.content_digest`; a repair that keeps a cache in an attribute changes
    its fingerprint as it fills.
    """
    return digest([repair.describe(), content_digest(repair)])


def _some_values(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    picks = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[picks.long().to(flat.device)].to("cpu", torch.float32)
