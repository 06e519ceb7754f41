"""Arguments of the wrong type are refused where they come in, by name, before anything has run.

The rooms of the package call :func:`checked` on what they export. Types are those of the annotations; the check is beartype's, which looks at
one item of a sequence, so that it costs microseconds. Numpy's numbers count as Python's, and whole numbers as floats. Sizes of axes
are not compared between arguments here: the functions do that, in their own words.
"""

import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import numpy as np
from beartype import BeartypeConf, FrozenDict
from beartype.door import is_bearable
from beartype.roar import BeartypeException
from jaxtyping import jaxtyped

from care_lens.core.display import cut, one_line
from care_lens.core.errors import CareLensError

OFF = "CARE_LENS_UNCHECKED"
"""An environment variable: where it is set nothing is checked. The test suite sets it, since it checks types itself."""

_overrides: Any = FrozenDict
_CONF = BeartypeConf(
    hint_overrides=_overrides(
        {int: int | np.integer, float: float | int | np.floating | np.integer, bool: bool | np.bool_}
    ),
)


class ArgumentError(CareLensError, TypeError, ValueError):
    """An argument is of another type than the function's signature says. The message names both."""


def checked(namespace: dict[str, Any], names: Iterable[str]) -> None:
    """Check the arguments of what a room exports: its functions there, and the methods of its own classes.

    Args:
        namespace: The room's ``globals()``; the functions in it are replaced.
        names: What it exports.
    """
    if os.environ.get(OFF):
        return
    room = namespace["__name__"]
    for name in names:
        value = namespace[name]
        if not getattr(value, "__module__", "").startswith(room):
            continue
        if inspect.isfunction(value):
            namespace[name] = _checking(value, name)
        elif inspect.isclass(value) and not getattr(value, "_is_protocol", False) and not issubclass(value, Exception):
            _check_methods(value)


def _check_methods(cls: type) -> None:
    for name, member in list(vars(cls).items()):
        if name.startswith("_") and name != "__init__":
            continue
        shown = cls.__name__ if name == "__init__" else f"{cls.__name__}.{name}"
        if inspect.isfunction(member):
            setattr(cls, name, _checking(member, shown))
        elif isinstance(member, (classmethod, staticmethod)) and inspect.isfunction(member.__func__):
            setattr(cls, name, type(member)(_checking(member.__func__, shown)))


def _checking(call: Callable[..., Any], shown: str) -> Callable[..., Any]:
    if hasattr(call, "__care_lens_checked__") or inspect.isgeneratorfunction(call):
        return call
    signature = inspect.signature(call)

    @functools.cache
    def hints() -> dict[str, Any]:
        try:
            return get_type_hints(call, include_extras=True)
        except (NameError, TypeError):  # a name that only type checkers import
            return {}

    @functools.wraps(call)
    def checking(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            given = None
        if given is None:
            if elsewhere := [name for name in _ELSEWHERE if name in kwargs and name not in signature.parameters]:
                raise ArgumentError(f"{shown} has no argument {elsewhere[0]}; {_ELSEWHERE[elsewhere[0]]}")
            return call(*args, **kwargs)  # Python's own words are best
        known = hints()
        for name, value in given.items():
            kind = signature.parameters[name].kind
            if name in known and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                _require(shown, name, value, known[name])
        return call(*args, **kwargs)

    checking.__care_lens_checked__ = True  # type: ignore[attr-defined]
    return checking


def _plainly(value: Any, hint: Any) -> bool:
    """Whether an ordinary class, or one of a union, is met at once; most arguments are, and beartype costs ten times as much."""
    if isinstance(hint, types.UnionType):
        return any(_plainly(value, one) for one in hint.__args__)
    return type(hint) is type and isinstance(value, hint)


#: What to write instead of arguments that TransformerLens's functions have.
_ELSEWHERE = {
    "names_filter": "name the sites: sites=['blocks.3.hook_resid_post']",
    "prepend_bos": "the processor decides that",
}
#: What to do about a value of another type, by a class in the annotation.
_ADVICE = {
    "Example": "write Example(prompt, image=picture)",
    "LVLMInputs": "make the batch with lvlm.prepare(examples)",
    "Region": "write positions as texts ('5', 'image', 'last')",
}


def _advice(wanted: str) -> str:
    named = re.findall(r"\w+", wanted)
    return next((f"; {advice}" for name, advice in _ADVICE.items() if name in named), "")


def _require(call: str, name: str, value: Any, hint: Any) -> None:
    if _plainly(value, hint):
        return
    probe = value.tolist() if type(value).__module__.startswith("pandas") and hasattr(value, "tolist") else value
    try:
        with jaxtyped("context"):  # sizes that a caller's own checks hold are not these
            fits = is_bearable(value, hint, conf=_CONF) or (probe is not value and is_bearable(probe, hint, conf=_CONF))
    except BeartypeException:  # an annotation that cannot be checked
        return
    if not fits:
        wanted = hint.__name__ if isinstance(hint, type) else str(hint)
        wanted = wanted.replace("collections.abc.", "").replace("typing.", "").replace("care_lens.", "")
        raise ArgumentError(
            f"{name} of {call} must be {wanted}, got {type(value).__name__} {cut(one_line(repr(value)), 60)}{_advice(wanted)}"
        )
