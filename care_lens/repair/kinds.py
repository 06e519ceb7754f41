"""The kinds of readers, gates, writers and defences that a repair may be made of, so that files of foreign ones load.

A kind is a frozen dataclass whose fields are tensors, sites, numbers, texts, None, mappings of JSON-able values, other kinds, or
tuples of these. Once it is registered it is described, saved and loaded like the package's own:

    from care_lens.repair import Reader, register_kind

    @register_kind
    @dataclass(frozen=True, eq=False, kw_only=True)
    class ProbeReader(SiteReader): ...

Whoever loads a file with a foreign kind imports the module that registers it first; the error says which module that is. No
module is imported by loading a file. There is one registry: :mod:`care_lens.defences` uses this one, and subclasses of
:class:`~care_lens.defences.StoredPart` (so of ``HookDefence`` and ``StoredDefence``) are registered as they are defined.
"""

import dataclasses
import re
from typing import Any, TypeVar

from care_lens.repair.errors import KindError, RepairFileError

Kind = TypeVar("Kind", bound=type)

RESERVED = ("kind", "module")
"""Keys that the files need beside a kind's fields."""

_KINDS: dict[str, type] = {}


def register_kind(cls: Kind) -> Kind:
    """Make a class known to :func:`~care_lens.repair.store.save_repair` and to ``describe``; use it as a decorator.

    Args:
        cls: A frozen dataclass. Fields with ``init=False`` are not stored: ``__post_init__`` makes them from the others.

    Returns:
        The class.

    Raises:
        KindError: If it is no frozen dataclass, a field is called "kind" or "module", or another class has its name. (The same
            class made anew, as by running a notebook's cell again, takes the place of the old one.)

    Example:
        >>> import dataclasses
        >>> import torch
        >>> from care_lens.repair import register_kind
        >>> @register_kind
        ... @dataclasses.dataclass(frozen=True)
        ... class Half:
        ...     def __call__(self, score):
        ...         return torch.full_like(score, 0.5)
        >>> Half()(torch.zeros(2)).tolist()
        [0.5, 0.5]
    """
    _require_storable(cls)
    declare_kind(cls)
    return cls


def declare_kind(cls: type) -> None:
    """Register a class that is not finished: for bases whose subclasses are registered as they are defined, before the decorator
    that makes them dataclasses has run. That they are frozen dataclasses is checked when they are described, saved or loaded.

    Args:
        cls: The class.

    Raises:
        KindError: If another class has its name.
    """
    known = _KINDS.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise KindError(
            f"kind must have a name of its own, {cls.__name__} is {known.__module__}.{known.__qualname__}; rename "
            f"{cls.__module__}.{cls.__qualname__}"
        )
    _KINDS[cls.__name__] = cls


def registered() -> tuple[str, ...]:
    """The names of the kinds that are known."""
    return tuple(sorted(name for name, cls in _KINDS.items() if dataclasses.is_dataclass(cls)))


def name_of(value: Any) -> str:
    """The name a part's class is registered by.

    Raises:
        KindError: If it is not, or is no frozen dataclass.
    """
    name = type(value).__name__
    if _KINDS.get(name) is not type(value):
        raise KindError(
            f"parts of a repair must be one of {list(registered())} to be saved or described, got {name}; decorate the class "
            "with care_lens.repair.register_kind"
        )
    _require_storable(type(value))
    return name


def kind_of(name: Any, module: Any) -> type:
    """The class of a name that a file gives.

    Args:
        name: The kind.
        module: Module that registered it when the file was written, or None.

    Raises:
        RepairFileError: If it is not registered; the message names the module to import.
    """
    if isinstance(name, str) and dataclasses.is_dataclass(_KINDS.get(name)):
        return _KINDS[name]
    if isinstance(module, str) and re.fullmatch(r"[\w.]+", module) and not module.startswith("care_lens."):
        cell = "run the script or the notebook's cell" if module == "__main__" else f"import {module}"
        raise RepairFileError(f"kind must be one of {list(registered())}, got {name!r}; {cell} that registers it first")
    first = "import the module that registers it first, or " if module is None else ""
    raise RepairFileError(f"kind must be one of {list(registered())}, got {name!r}; {first}update care_lens")


def _require_storable(cls: Any) -> None:
    """Refuse what is no frozen dataclass, or has a field that the files need for themselves.

    Raises:
        KindError: Saying which.
    """
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or not _frozen(cls):
        raise KindError(f"a kind must be a frozen dataclass, got {cls!r}; decorate it with @dataclass(frozen=True)")
    if taken := {field.name for field in dataclasses.fields(cls)} & {*RESERVED}:
        raise KindError(f"fields of {cls.__name__} must not be called {sorted(taken)}; name them otherwise")


def _frozen(cls: type) -> bool:
    return bool(getattr(cls, "__dataclass_params__").frozen)  # noqa: B009  # not in the stubs of every checker
