"""The kinds of attacks by name, so that a table, a file of settings or a command can name one.

    attack("pgd", epsilon=8, steps=20)
    registered_attacks()

An attack of one's own is a frozen dataclass with ``name``, ``run`` and ``describe``; ``@register_attack`` makes it known.
"""

import dataclasses
from typing import Any, TypeVar

from care_lens.core.errors import CareLensError

Kind = TypeVar("Kind", bound=type)

_KINDS: dict[str, type] = {}


class AttackKindError(CareLensError, ValueError, TypeError):
    """A class cannot be an attack, or no attack has the name."""


def register_attack(cls: Kind) -> Kind:
    """Make an attack known by its class's name, in any case; use it as a decorator.

    Args:
        cls: A frozen dataclass with ``run`` and ``describe``.

    Returns:
        The class.

    Raises:
        AttackKindError: If it is no such class, or another class has its name. (The same class made anew, as by running a
            notebook's cell again, takes the place of the old one.)
    """
    params = getattr(cls, "__dataclass_params__", None)
    if (
        params is None
        or not params.frozen
        or not all(callable(getattr(cls, name, None)) for name in ("run", "describe"))
    ):
        raise AttackKindError(
            f"an attack must be a frozen dataclass with run and describe, got {cls!r}; see the Attack protocol"
        )
    known = _KINDS.get(cls.__name__.lower())
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise AttackKindError(
            f"an attack must have a name of its own, {cls.__name__} is {known.__module__}.{known.__qualname__}; rename it"
        )
    _KINDS[cls.__name__.lower()] = cls
    return cls


def registered_attacks() -> tuple[str, ...]:
    """The names of the attacks that are known, in lower case."""
    return tuple(sorted(_KINDS))


def attack(name: str, /, **options: Any) -> Any:
    """An attack by the name of its class, in any case.

    Args:
        name: Such as "pgd" or "typographic".
        **options: Its fields, ``name`` (that of a row in tables) among them.

    Raises:
        AttackKindError: If there is none of that name, or it has no such option.

    Example:
        >>> attack("autopgd", epsilon=8).rho
        0.75
    """
    cls = _KINDS.get(name.lower())
    if cls is None:
        raise AttackKindError(
            f"name must be one of {list(registered_attacks())}, got {name!r}; import the module that registers it first (--import on the command line)"
        )
    if unknown := sorted({*options} - {field.name for field in dataclasses.fields(cls)}):
        raise AttackKindError(
            f"options of {cls.__name__} must be some of {[f.name for f in dataclasses.fields(cls)]}, got {unknown}; leave them out"
        )
    return cls(**options)
