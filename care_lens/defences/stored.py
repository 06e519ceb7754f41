"""Defences that are frozen dataclasses: described, saved and loaded by their fields.

A class is known by its name as soon as it is defined, so that :func:`load_defence` reads files of a user's own classes too,
once the module that defines them is imported. ``defence.json`` holds the fields, ``defence.safetensors`` the tensors, both
checked by their sums when loaded.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from care_lens.core.errors import ArtifactError, CareLensError
from care_lens.core.examples import Example
from care_lens.core.files import load_artifact, save_artifact
from care_lens.core.results import package_versions
from care_lens.core.site import Site
from care_lens.lvlm import HookedLVLM
from care_lens.repair import Attachment, attach

_NAME, _SCHEMA = "defence", 1
_KINDS: dict[str, type] = {}

Stored = TypeVar("Stored", bound="StoredDefence")


class WrongModelError(CareLensError, ValueError):
    """A defence cannot work on this model; the message says why."""


class FitError(CareLensError, ValueError):
    """A defence cannot be fitted on these examples; the message says why."""


def register_kind(kind: type) -> type:
    """Make a dataclass known by its name, so that defences with such parts are saved and loaded. Bases of
    defences call this by themselves.

    Args:
        kind: The class.

    Raises:
        ValueError: If another module has a class of that name already.
    """
    known = _KINDS.get(kind.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"kind must have a name of its own, got {kind.__name__!r}, which {known.__module__} has; rename the class"
        )
    _KINDS[kind.__name__] = kind
    return kind


class StoredPart:
    """Mix-in for a frozen dataclass that is a field of a defence and is stored with it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        register_kind(cls)


class StoredDefence(StoredPart):
    """Base of defences that are frozen dataclasses. As it stands it changes neither requests nor model.

    Fields may be numbers, texts, tensors, sites, tuples, mappings and data frames of these, and other registered dataclasses.
    """

    name: str

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """The requests as they are."""
        return list(examples)

    def on(self, lvlm: HookedLVLM) -> AbstractContextManager[HookedLVLM]:
        """Put the defence on a model: here the check alone.

        Raises:
            WrongModelError: If it cannot work on the model.
        """
        self.check(lvlm)
        return nullcontext(lvlm)

    def attach(self, model: nn.Module, processor: Any, *, every_thread: bool = False) -> Attachment:
        """Put the defence on a plain Hugging Face model; see :func:`care_lens.repair.attach`.

        Args:
            model: The model.
            processor: Its processor.
            every_thread: Whether it acts whichever thread runs the model.

        Raises:
            AttachError: If it has no hooks, since it rewrites requests.
        """
        return attach(self, model, processor, every_thread=every_thread)

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model on which the defence cannot work; here none."""

    def describe(self) -> dict[str, Any]:
        """Its class and its fields, as JSON-able values; tensors by shape and norm."""
        return _encode(self, _summary)

    def save(self, directory: str | Path) -> None:
        """Write ``defence.json`` and ``defence.safetensors`` into a directory, made if it does not exist.

        Raises:
            TypeError: If a field is of a kind that cannot be stored.
            OSError: If a file cannot be written.
        """
        tensors: dict[str, Tensor] = {}

        def keep(tensor: Tensor) -> dict[str, Any]:
            tensors[str(len(tensors))] = tensor.detach().cpu().contiguous().clone()
            return {"tensor": str(len(tensors) - 1)}

        content = {"versions": package_versions(), "fields": _encode(self, keep)}
        data = {"safetensors": bytes_of(tensors)}
        save_artifact(directory, _NAME, kind="Defence", schema=_SCHEMA, data=data, content=content)

    @classmethod
    def load(cls: type[Stored], directory: str | Path) -> Stored:
        """Read what :meth:`save` wrote; on the CPU.

        Raises:
            FileNotFoundError: If there is no such file.
            ArtifactError: If it is damaged, or holds a defence of another class.
        """
        defence = load_defence(directory)
        if not isinstance(defence, cls):
            raise ArtifactError(
                f"{directory} must hold a {cls.__name__}, got a {type(defence).__name__}; load it with that class"
            )
        return defence


def load_defence(directory: str | Path) -> Any:
    """Read a defence of any registered class; on the CPU.

    Args:
        directory: What :meth:`StoredDefence.save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtifactError: If it is damaged, or of a class that is not known.
    """
    data, content = load_artifact(directory, _NAME, kind="Defence", schema=_SCHEMA)
    return _decode(content["fields"], tensors_of(data["safetensors"]))


def _summary(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "norm": round(float(tensor.double().norm()), 6)}


def _encode(value: Any, on_tensor: Callable[[Tensor], Any]) -> Any:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Site):
        return {"site": str(value)}
    if isinstance(value, pd.DataFrame):
        return {"frame": value.to_json(orient="split")}
    if isinstance(value, (tuple, list)):
        return [_encode(item, on_tensor) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": [[_encode(part, on_tensor) for part in pair] for pair in value.items()]}
    name = type(value).__name__
    if dataclasses.is_dataclass(value) and _KINDS.get(name) is type(value):
        return {"kind": name, **{f.name: _encode(getattr(value, f.name), on_tensor) for f in dataclasses.fields(value)}}
    raise TypeError(
        f"fields of a defence must be numbers, texts, tensors, sites, tuples, mappings, frames or registered dataclasses, got {name}; "
        "see care_lens.defences.register_kind"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "site" in value and len(value) == 1:
        return Site.parse(value["site"])
    if "frame" in value:
        return pd.DataFrame(**json.loads(value["frame"]))
    if "mapping" in value:
        return {_decode(key, tensors): _decode(part, tensors) for key, part in value["mapping"]}
    kind = _KINDS.get(value["kind"])
    if kind is None:
        raise ArtifactError(
            f"kind must be one of {sorted(_KINDS)}, got {value['kind']!r}; import the module that defines it, or update care_lens"
        )
    return kind(**{name: _decode(item, tensors) for name, item in value.items() if name != "kind"})


def require_examples(**sets: Sequence[Example]) -> None:
    """Refuse an empty set of examples.

    Raises:
        FitError: Naming the sets that are empty.
    """
    if empty := [name for name, examples in sets.items() if not examples]:
        raise FitError(f"{' and '.join(empty)} must hold at least one example, got none")


def require_finite(**tensors: Tensor) -> None:
    """Refuse NaN and infinity in what was fitted.

    Raises:
        FitError: Naming the tensor.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FitError(
                f"{name} must be finite, got NaN or infinity; are the activations finite (half precision overflows)?"
            )
