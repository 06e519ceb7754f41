"""Defences that are frozen dataclasses: described, saved and loaded by their fields.

A class is known by its name as soon as it is defined, in the one registry of :mod:`care_lens.repair.kinds`, so that
:func:`load_defence` reads files of a user's own classes too, once the module that defines them is imported, and a defence may hold
readers, gates and writers as parts. ``defence.json`` holds the fields, ``defence.safetensors`` the tensors, both
checked by their sums when loaded.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from care_lens.core import files
from care_lens.core.display import ShortRepr
from care_lens.core.errors import ArtifactError, CareLensError
from care_lens.core.examples import Example
from care_lens.core.results import package_versions
from care_lens.core.site import Site
from care_lens.lvlm import HookedLVLM
from care_lens.repair import Attachment, attach, load_repair
from care_lens.repair.base import HookRepair
from care_lens.repair.errors import KindError
from care_lens.repair.explaining import Explainable
from care_lens.repair.kinds import RESERVED, declare_kind, kind_of, name_of
from care_lens.subspace import ModelIdentity

_NAME, _SCHEMA = "defence", 2
"""Schema 1 named no modules; its files are read as they are."""

Stored = TypeVar("Stored", bound="StoredDefence")


class WrongModelError(CareLensError, ValueError):
    """A defence cannot work on this model; the message says why."""


class FitError(CareLensError, ValueError):
    """A defence cannot be fitted on these examples; the message says why."""


class StoredPart(ShortRepr):
    """Mix-in for a frozen dataclass that is a field of a defence and is stored with it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        declare_kind(cls)


class StoredDefence(Explainable, StoredPart):
    """Base of defences that are frozen dataclasses. As it stands it changes neither requests nor model.

    Fields may be numbers, texts, tensors, sites, tuples, mappings and data frames of these, and other registered dataclasses.
    """

    name: str

    def __post_init__(self) -> None:
        """Refuse numbers that would make every answer meaningless: that would look like a defence that stops all attacks.

        A subclass with checks of its own calls it.

        Raises:
            ValueError: If a number is NaN, or the strength infinite.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, float) and (math.isnan(value) or (field.name == "alpha" and math.isinf(value))):
                raise ValueError(f"{field.name} must be a finite number, got {value}")

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
        return _encode(self, _summary, stored=False)

    def save(self, directory: str | Path) -> None:
        """Write ``defence.json`` and ``defence.safetensors`` into a directory, made if it does not exist.

        Raises:
            KindError: If a field is of a kind that cannot be stored, or the class is no frozen dataclass.
            OSError: If a file cannot be written.
        """
        tensors: dict[str, Tensor] = {}

        def keep(tensor: Tensor) -> dict[str, Any]:
            tensors[str(len(tensors))] = tensor
            return {"tensor": str(len(tensors) - 1)}

        content = {"versions": package_versions(), "fields": _encode(self, keep, stored=True)}
        data = {"safetensors": files.tensor_bytes(tensors)}
        files.save_artifact(directory, _NAME, kind="Defence", schema=_SCHEMA, data=data, content=content)

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
    """Read a defence of any registered class, or a repair; on the CPU.

    Args:
        directory: What :meth:`StoredDefence.save` or ``repair.save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ArtifactError: If it is damaged, holds what makes no defence, or is of a class that is not known; the message says which
            module to import.
    """
    if not (Path(directory) / f"{_NAME}.json").exists() and (Path(directory) / "repair.json").is_file():
        return load_repair(HookRepair, directory)
    if not (Path(directory) / f"{_NAME}.json").exists():
        what = "has neither" if Path(directory).is_dir() else "is no folder"
        raise FileNotFoundError(
            f"{directory} must be a folder with {_NAME}.json or repair.json, as a defence's save writes it; it {what}"
        )
    data, content = files.load_artifact(directory, _NAME, kind="Defence", schema=_SCHEMA)
    path = Path(directory) / f"{_NAME}.json"
    tensors = files.tensors_of(data, where=path.with_suffix(".safetensors"))
    try:
        return _decode(content["fields"], tensors)
    except ArtifactError:
        raise
    except (CareLensError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} must hold a defence, got one that cannot be made: {error}") from error


def _summary(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "norm": round(float(tensor.double().norm()), 6)}


def _encode(value: Any, on_tensor: Callable[[Tensor], Any], *, stored: bool) -> Any:
    """JSON-able form; where it is stored, with each kind's module and numbers that JSON lacks."""

    def encode(part: Any) -> Any:
        return _encode(part, on_tensor, stored=stored)

    if isinstance(value, float) and not math.isfinite(value) and stored:
        return files.packed(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Tensor):
        return on_tensor(value)
    if isinstance(value, Site):
        return {"site": str(value)}
    if isinstance(value, ModelIdentity):
        return {"model": value.to_dict()}
    if isinstance(value, pd.DataFrame):
        return {"frame": value.to_json(orient="split")}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"mapping": [[encode(part) for part in pair] for pair in value.items()]}
    own = dataclasses.is_dataclass(value) or isinstance(value, StoredPart)
    if not own or isinstance(value, type):
        raise KindError(
            "fields of a defence must be numbers, texts, tensors, sites, tuples, mappings, frames or registered kinds to be saved or "
            f"described, got a {type(value).__name__}; give it in one of these forms, or see care_lens.repair.register_kind"
        )
    named = {"kind": name_of(value), **({"module": type(value).__module__} if stored else {})}
    fields: Any = dataclasses.fields(value)  # pyright: ignore[reportArgumentType]  # name_of has refused others
    return {**named, **{f.name: encode(getattr(value, f.name)) for f in fields if f.init}}


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, tensors) for item in value)
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        kind = kind_of(value["kind"], value.get("module"))
        return kind(**{name: _decode(item, tensors) for name, item in value.items() if name not in RESERVED})
    ((form, held),) = value.items()
    if form == "tensor":
        return tensors[held]
    if form == "site":
        return Site.parse(held)
    if form == "model":
        return ModelIdentity(**held)
    if form == "frame":
        return pd.DataFrame(**json.loads(held))
    if form == "mapping":
        return {_decode(key, tensors): _decode(part, tensors) for key, part in held}
    return files.unpacked(value)


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
