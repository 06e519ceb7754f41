"""Digests that say whether a stored answer belongs to the same model, defence, settings and example."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from care_lens.core.digests import content_digest, examples_digest, held_digest, picture_bytes, some_values
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair

__all__ = [
    "content_digest",
    "digest",
    "example_fingerprint",
    "examples_digest",
    "held_fingerprint",
    "model_fingerprint",
    "repair_fingerprint",
]

_LENGTH = 16
#: Fields that say what an example is and what is compared with its answer; the model is given the others.
_ABOUT = {"response", "harmful", "channel", "id", "group", "meta", "behaviour"}
_GIVEN = {"prompt", "image", "more_images"}


def digest(value: Any) -> str:
    """A short digest of a JSON-able value; the order of keys does not matter.

    Raises:
        TypeError: If the value is not JSON-able.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def example_fingerprint(example: Example) -> str:
    """A digest of what the model is given: the prompt, the pictures' pixels, and fields beyond those that are set."""
    content = hashlib.sha256(json.dumps(example.prompt).encode())
    for picture in example.images:
        content.update(picture_bytes(picture))
    for field in dataclasses.fields(example):
        if field.name not in _ABOUT | _GIVEN and (value := getattr(example, field.name)):
            content.update(f"{field.name} {content_digest(value)}".encode())
    return content.hexdigest()[:_LENGTH]


def model_fingerprint(model: nn.Module) -> str:
    """A digest of a model's class, parameter names and shapes, and of some values of each parameter.

    It tells models and checkpoints apart; a change of single weights can escape it. Cost: a few numbers are
    copied from each parameter. Parameters that are off the device (``meta``) count by name and shape only. Names are those of the
    state dict, so that a model in a bridge is the same model as outside of it.
    """
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter):
            named.setdefault(id(value), (name, value))
    return _fingerprint(model, named.values())


def held_fingerprint(model: nn.Module) -> str:
    """The digest that :func:`model_fingerprint` gave at first, by which a model in a bridge was not the same as outside of
    it. Repairs that were saved then hold it."""
    return _fingerprint(model, model.named_parameters())


def _fingerprint(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> str:
    content = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in named:
        content.update(f"{name}:{tuple(parameter.shape)}:{parameter.dtype}".encode())
        if not parameter.is_meta:
            content.update(some_values(parameter))
    return content.hexdigest()[:_LENGTH]


def repair_fingerprint(repair: Repair) -> str:
    """A digest of a repair's description, of every number in its tensors and of every setting, nested ones included.

    Descriptions may give tensors by their norms alone, and two projectors of one rank have the same. So all that the
    repair holds counts, see :func:`care_lens.core.digests.held_digest`; a repair that keeps a cache in an attribute changes
    its fingerprint as it fills.
    """
    return digest([repair.describe(), held_digest(repair)])
