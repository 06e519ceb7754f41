"""Arguments of the wrong type are refused where they come in, by name, before anything has run.

The rooms of the package call :func:`checked` on what they export. Types are those of the annotations; the check is beartype's, which looks at
one item of a sequence, so that it costs microseconds. Numpy's numbers count as Python's, and whole numbers as floats. A list is taken
where a tuple is asked for, and handed on as a tuple; a single text is not taken for a sequence of texts. Where a class refuses the
arguments of its constructor itself, its own message is shown. Sizes of axes are not compared between arguments here: the functions do
that, in their own words.
"""

import functools
import inspect
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

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
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            bound = None
        if bound is None:
            if elsewhere := [name for name in _ELSEWHERE if name in kwargs and name not in signature.parameters]:
                raise ArgumentError(f"{shown} has no argument {elsewhere[0]}; {_ELSEWHERE[elsewhere[0]]}")
            return call(*args, **kwargs)  # Python's own words are best
        known, turned = hints(), False
        for name, value in bound.arguments.items():
            kind = signature.parameters[name].kind
            if name in known and kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                if (wrong := _wrong(shown, name, value, known[name])) is None:
                    continue
                if type(value) is list and _wrong(shown, name, tuple(value), known[name]) is None:
                    bound.arguments[name], turned = tuple(value), True
                    continue
                if call.__name__ == "__init__":
                    _in_its_own_words(call, args, kwargs)
                raise wrong
        return call(*bound.args, **bound.kwargs) if turned else call(*args, **kwargs)

    checking.__care_lens_checked__ = True  # type: ignore[attr-defined]
    return checking


def _plainly(value: Any, hint: Any) -> bool:
    """Whether an ordinary class, or one of a union, is met at once; most arguments are, and beartype costs ten times as much."""
    if isinstance(hint, types.UnionType):
        return any(_plainly(value, one) for one in hint.__args__)
    return type(hint) is type and isinstance(value, hint)


def _in_its_own_words(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let a class that refuses the arguments of its constructor itself say so: its own message knows what to do instead."""
    try:
        call(*args, **kwargs)
    except CareLensError:
        raise
    except Exception:  # not meant for the user: the caller goes on to name the argument and its type
        return


#: What to write instead of arguments that TransformerLens's functions have.
_ELSEWHERE = {
    "names_filter": "name the sites: sites=['blocks.3.hook_resid_post']",
    "prepend_bos": "the processor decides that",
    "remove_batch_dim": "activations keep their batch axis; cache[site][0] is the first row",
    "stop_at_layer": "the whole model is run; sites=[...] says what is kept",
    "return_type": "lvlm(inputs) returns logits, and care_lens.core.ResponseLogProb the log-probability of a response",
    "bwd_hooks": "for gradients let a forward hook call activation.retain_grad() and return the activation",
    "incl_bwd": "for gradients let a forward hook call activation.retain_grad() and return the activation",
}
#: What to do about a value of another type, by the name of the argument.
_BY_NAME = {
    "fwd_hooks": "write a list of pairs, [(site, function), ...]",
    "pairs": "write PairedExamples.from_pairs([(safe, unsafe), ...])",
    "suites": "write a dict, {'my channel': examples}",
    "defences": "write a dict, {'none': None, 'mine': defence}",
    "methods": "write a dict, {'mine': function}",
}
#: What to do about a value of another type, by a class in the annotation.
_ADVICE = {
    "Example": "write Example(prompt, image=picture)",
    "BaseOutcome": "write a function of logits and inputs, or take care_lens.core.UnsafeMargin",
    "LVLMInputs": "make the batch with lvlm.prepare(examples)",
    "HookedLVLM": "make it with HookedLVLM.from_pretrained(name), or with organism.load()",
    "Judge": "take study.judge, or one of care_lens.evaluation such as SubstringRefusalJudge()",
    "Repair": "a defence has a name and the methods on(lvlm), a context manager, and describe()",
    "Region": "write positions as texts ('5', 'image', 'last')",
}
#: What to do about a value of some class, by its name and a class in the annotation.
_BY_KINDS = {
    ("ndarray", "Tensor"): "write torch.from_numpy(array)",
    ("list", "Tensor"): "write torch.tensor(values)",
    ("tuple", "Tensor"): "write torch.tensor(values)",
    ("TransformerBridge", "HookedLVLM"): "give the HookedLVLM that has this bridge",
    ("HookedLVLM", "Module"): "give the plain Hugging Face model, lvlm.unwrap()",
}


def _advice(name: str, wanted: str, value: Any, hint: Any) -> str:
    named, kind = re.findall(r"\w+", wanted), type(value).__name__
    if not isinstance(value, (list, tuple, bool)) and (_fits([value], hint) or _fits((value,), hint)):
        return f"; write [{cut(one_line(repr(value)), 60)}]"
    if isinstance(value, (list, tuple)) and len(value) == 1 and _fits(value[0], hint):
        return f"; write {cut(one_line(repr(value[0])), 60)}, without a list"
    if callable(value) and name == "sites":
        return "; name the sites, or choose among them: [site for site in lvlm.sites() if ...]"
    if name == "defences" and isinstance(value, Mapping):
        for key, one in value.items():
            if isinstance(one, (str, os.PathLike)):
                return f"; {key!r} is a path: read what is saved there, care_lens.defences.load_defence({str(one)!r})"
    if "Figure" in named and hasattr(value, "plot"):
        return "; give its figure, .plot()"
    advice = [text for (given, asked), text in _BY_KINDS.items() if given == kind and asked in named]
    if name in _BY_NAME:
        advice.append(_BY_NAME[name])
    advice += [text for asked, text in _ADVICE.items() if asked in named]
    if choices := _choices(hint):
        advice.append(f"give {' or '.join(map(repr, choices))}")
    return f"; {advice[0]}" if advice else ""


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values that a ``Literal`` names, if the annotation is one, or one beside None."""
    arms = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is Union else (hint,)
    named = [arm for arm in arms if arm is not type(None)]
    return get_args(named[0]) if len(named) == 1 and get_origin(named[0]) is Literal else ()


def _fits(value: Any, hint: Any) -> bool:
    with jaxtyped("context"):  # sizes that a caller's own checks hold are not these
        return is_bearable(value, hint, conf=_CONF)


def _several(hint: Any) -> bool:
    """Whether an annotation takes several things, and a text only because a text is a sequence of its characters."""
    arms = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is Union else (hint,)
    kinds = [get_origin(arm) for arm in arms]
    of_texts = [kind in _CONTAINERS and get_args(arm)[:1] != (Any,) for arm, kind in zip(arms, kinds, strict=True)]
    return any(of_texts) and not any(
        not listed and arm is not type(None) and is_bearable("text", arm, conf=_CONF)
        for arm, listed in zip(arms, of_texts, strict=True)
    )


_CONTAINERS = (Sequence, Iterable, Collection)


def _wrong(call: str, name: str, value: Any, hint: Any) -> ArgumentError | None:
    """The refusal of a value, or None where it fits the annotation."""
    if _plainly(value, hint):
        return None
    probe = value.tolist() if type(value).__module__.startswith("pandas") and hasattr(value, "tolist") else value
    try:
        if isinstance(value, str) and _fits(value, hint) and _several(hint):
            shown = cut(one_line(repr(value)), 60)
            return ArgumentError(f"{name} of {call} must be several, got the text {shown}; write [{shown}]")
        fits = _fits(value, hint) or (probe is not value and _fits(probe, hint))
    except BeartypeException:  # an annotation that cannot be checked
        return None
    if fits:
        return None
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    wanted = wanted.replace("collections.abc.", "").replace("typing.", "").replace("care_lens.", "")
    got = f"{type(value).__name__} {cut(one_line(repr(value)), 60)}"
    return ArgumentError(f"{name} of {call} must be {wanted}, got {got}{_advice(name, wanted, value, hint)}")
