"""Digests of whatever a step takes: two things with one digest give the same numbers, so that a stopped run may go on.

What counts: of an example every field, pictures by their pixels; of a function its code, its defaults, the values it closes over and
the globals of its module that it names; of an object its class's code and what it holds; of what a library defines, its name and the
library's version. A function, class or object may state ``version`` (a text or number), which then stands for its code: change it
where the code changes what comes out. Attributes whose names begin with an underscore and hold the word "cache" do not count, and
of an object with a stated version none that begins with an underscore.

:func:`held_digest` asks less of code and more of numbers: all of a repair's, and the names of its classes.

    examples_digest(examples) == examples_digest(again)  # the same prompts, pictures, responses, labels, ids, groups, meta
    content_digest(judge), content_digest(lambda logits, inputs: logits[:, -1, yes])
"""

import dataclasses
import dis
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from care_lens.core.libraries import is_library, library_version

_LENGTH = 16
_SAMPLES = 32
_PICTURES = ("image", "more_images")
#: Attributes that hold copies of others, made while an object is used.
_COPIES = frozenset({"_placed"})
#: Methods with names of the language that can change what comes out of an object.
_CALLED = (
    "__call__",
    "__init__",
    "__post_init__",
    "__new__",
    "__getattr__",
    "__getitem__",
    "__iter__",
    "__len__",
    "__enter__",
    "__exit__",
)
_PLAIN = (
    types.BuiltinFunctionType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    np.ufunc,
)


def content_digest(*values: Any) -> str:
    """16 hexadecimal digits of anything: values, containers, dataclasses, tensors, pictures, functions, objects.

    Equal in another process, on another machine, and where an example holds the same pictures in other objects. Modules of torch
    count by their class and by some values of each parameter.
    """
    feeder = _Feeder()
    for value in values:
        feeder.feed(value)
    return feeder.hexdigest()


def held_digest(value: Any) -> str:
    """The sha256 of all that a value holds, in hexadecimal digits: every number of its tensors, every setting, and which classes they
    are of.

    Two objects have one digest if they were made alike, on whatever device, in whatever process. Unlike :func:`content_digest`, classes count
    by their names, modules of torch with all their parameters and buffers, and objects with all attributes, hidden ones included.

    Args:
        value: Anything; a circle of references is followed once.

    Returns:
        64 digits.

    Example:
        >>> held_digest({"a": 1, "b": 2.0}) == held_digest({"b": 2.0, "a": 1})
        True
        >>> held_digest(1) == held_digest(1.0)
        False
    """
    feeder = _Feeder(whole=True)
    feeder.feed(value)
    return feeder.hexdigest()


def examples_digest(examples: Sequence[Any]) -> str:
    """A digest of every field of some examples, in order: what a resumed run is checked against.

    Fields that hold their default are left out, so that a field which a later version adds changes no digest of examples without it.
    """
    feeder = _Feeder()
    for example in examples:
        if not dataclasses.is_dataclass(example) or isinstance(example, type):
            raise TypeError(f"examples must be of care_lens.Example, got {type(example).__name__}")
        feeder.example(example)
    return feeder.hexdigest()


def picture_bytes(picture: Image.Image) -> bytes:
    """What tells a picture apart: its size and pixels, and, unless it is RGB, its mode and palette."""
    if picture.mode == "RGB":
        return f"{picture.size}".encode() + picture.tobytes()
    palette = picture.getpalette() if picture.mode in ("P", "PA") else None
    about = (picture.mode, picture.size, palette, repr(picture.info.get("transparency")))
    return f"{about}".encode() + picture.tobytes()


def some_values(parameter: Tensor) -> bytes:
    """Some values of a parameter, at even distances."""
    flat = parameter.detach().reshape(-1)
    picks = torch.linspace(0, max(flat.numel() - 1, 0), min(_SAMPLES, flat.numel()), dtype=torch.float64)
    return flat[picks.long().to(flat.device)].to("cpu", torch.float32).numpy().tobytes()


class _Feeder:
    """A sum that is fed with values of all kinds, each with a tag, so that no two contents read alike.

    Args:
        whole: Whether it is of all that a value holds (:func:`held_digest`), or of what makes its numbers (:func:`content_digest`).
        inside: What is being fed where this sum is of a part.
    """

    def __init__(self, *, whole: bool = False, inside: Sequence[Any] = ()) -> None:
        self._sum, self._whole = hashlib.sha256(), whole
        self._open: list[Any] = [*inside]  # kept alive, so that ids are not given out again

    def hexdigest(self) -> str:
        return self._sum.hexdigest()[: None if self._whole else _LENGTH]

    def _put(self, tag: str, content: bytes | str = b"") -> None:
        content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        self._sum.update(f"{tag}:{len(content)}:".encode() + content)

    def example(self, example: Any) -> None:
        """An example, or whatever else is a dataclass with pictures."""
        self._put("example")
        for field in dataclasses.fields(example):
            value = getattr(example, field.name)
            if field.name in _PICTURES or _is_default(field, value):
                continue
            self._put("field", field.name)
            self.feed(value)
        for picture in example.images:
            self._put("picture", picture_bytes(picture))

    def feed(self, value: Any) -> None:
        """One value; what is met again inside of itself counts by where it was met."""
        if value is None or (
            isinstance(value, (bool, int, float, complex, str, bytes)) and not isinstance(value, Enum)
        ):
            return self._put(type(value).__name__, value if isinstance(value, bytes) else repr(value))
        for depth, other in enumerate(self._open):
            if other is value:
                return self._put("again", str(depth))
        self._open.append(value)
        try:
            self._feed(value)
        finally:
            self._open.pop()

    def _feed(self, value: Any) -> None:
        if isinstance(value, Enum):
            self._put("enum", f"{_named(type(value))}.{value.name}")
        elif isinstance(value, Path):
            self._put("path", str(value))
        elif isinstance(value, Image.Image):
            self._put("picture", picture_bytes(value))
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Tensor):
            self._put("tensor", f"{tuple(value.shape)} {value.dtype}".encode() + _numbers(value))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self._put("array", f"{value.shape} {value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
        elif isinstance(value, np.generic):
            self._put("number", f"{value.dtype} {value.item()!r}")
        elif isinstance(value, Mapping):
            self._put("mapping")
            self._sorted([(key, value[key]) for key in value])
        elif isinstance(value, (list, tuple, np.ndarray)) and not hasattr(value, "_fields"):
            self._put("sequence", str(len(value)))
            for part in value:
                self.feed(part)
        elif isinstance(value, Set):
            self._put("set")
            self._sorted(list(value))
        else:
            self._code_or_object(value)

    def _sorted(self, parts: list[Any]) -> None:
        """Parts whose order means nothing: by their own digests."""
        digests = []
        for part in parts:
            feeder = _Feeder(whole=self._whole, inside=self._open)
            feeder.feed(part)
            digests.append(feeder.hexdigest())
        for digest in sorted(digests):
            self._put("part", digest)

    def _code_or_object(self, value: Any) -> None:
        if isinstance(value, types.ModuleType):
            own = not (is_library(value) or value.__name__.startswith("care_lens"))
            file = getattr(value, "__file__", None)
            if own and file is not None and Path(file).exists():
                self._put("module", Path(file).read_bytes())
            else:
                self._put("module", f"{value.__name__} {library_version(value.__name__)}")
        elif isinstance(value, functools.partial):
            self._put("partial")
            for part in (value.func, value.args, value.keywords):
                self.feed(part)
        elif isinstance(value, types.MethodType):
            self._put("method", value.__name__)
            self.feed(value.__func__)
            self.feed(value.__self__)
        elif isinstance(value, (staticmethod, classmethod)):
            self._put(type(value).__name__)
            self.feed(value.__func__)
        elif isinstance(value, functools._lru_cache_wrapper):
            self.feed(value.__wrapped__)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, property):
            for part in (value.fget, value.fset):
                self.feed(part)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, (*_PLAIN, torch.dtype, torch.device, types.GenericAlias, slice, range)):
            self._put("named", f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', None) or value!r}")
        elif dataclasses.is_dataclass(value) and hasattr(value, "images") and hasattr(value, "prompt"):
            self.example(value)
        else:
            self._object(value)

    def _module(self, value: nn.Module) -> None:
        self._put("weights", _named(type(value)))
        if self._whole:
            own = {name: part for name, part in vars(value).items() if not name.startswith("_")}
            return self.feed([own, dict(value.state_dict()), dict(value.named_children())])
        for name, parameter in value.named_parameters():
            held = b"" if parameter.is_meta else some_values(parameter)
            self._put(f"{name} {tuple(parameter.shape)} {parameter.dtype}", held)

    def _function(self, value: types.FunctionType) -> None:
        if value.__code__.co_filename.startswith("<@beartype"):  # a check of types around the function itself
            return self.feed(
                inspect.unwrap(value, stop=lambda one: not one.__code__.co_filename.startswith("<@beartype"))
            )
        self._put("function")
        if (stated := _version(value)) is not None:
            self._put("version", stated)
        elif is_library(value):
            return self._put("library", f"{_named(value)} {library_version(value.__module__)}")
        else:
            self._code(value.__code__)
            for name in _globals_of(value.__code__):
                if name in value.__globals__:
                    self._put("global", name)
                    self._global(value.__globals__[name], value.__module__ or "")
        self.feed(value.__defaults__)
        self.feed(value.__kwdefaults__)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            self._put("closure", name)
            try:
                held = cell.cell_contents
            except ValueError:  # not assigned yet
                self._put("empty")
            else:
                self.feed(held)

    def _global(self, value: Any, home: str) -> None:
        """What a function's module holds. What other rooms of care_lens define counts by name and version, so that the sum does not
        run through all of it."""
        module = getattr(value, "__module__", None) or ""
        foreign = isinstance(value, (types.FunctionType, type)) and module != home and module.startswith("care_lens")
        if foreign:
            self._put("foreign", f"{_named(value)} {library_version(module)}")
        else:
            self.feed(value)

    def _code(self, code: types.CodeType) -> None:
        """What a function does: its instructions, names and constants, without line numbers, file names and its documentation."""
        self._put("code", code.co_code)
        self.feed(
            (code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_kwonlyargcount, code.co_flags)
        )
        constants = (None, *code.co_consts[1:]) if _has_documentation(code) else code.co_consts
        for constant in constants:
            if not (isinstance(constant, str) and ".<locals>." in constant):  # an inner function's qualified name
                self.feed(constant)

    def _class(self, value: type) -> None:
        self._put("class", _named(value))
        if self._whole:
            return
        if is_library(value):
            return self._put("library", library_version(value.__module__))
        if (stated := _version(value)) is not None:
            return self._put("version", stated)
        made = dataclasses.is_dataclass(value)
        for name, part in sorted(vars(value).items()):
            called = name in _CALLED and not (made and name == "__init__")
            if (
                (name.startswith("__") and not called)
                or (name.startswith("_") and "cache" in name)
                or name == "_abc_impl"
            ):
                continue
            self._put("attribute", name)
            self.feed(part)
        for base in value.__bases__:
            self.feed(base)

    def _object(self, value: Any) -> None:
        kind = type(value)
        self._put("object", _named(kind))
        stated, library = (None, False) if self._whole else (_version(value), is_library(kind))
        if stated is not None:
            self._put("version", stated)
        else:
            self._class(kind)
        if (model := getattr(value, "hf_model", None)) is not None and isinstance(model, nn.Module):
            return self.feed(model)
        if callable(vocabulary := getattr(value, "get_vocab", None)):  # a tokenizer
            return self.feed(vocabulary())
        if kind.__module__.partition(".")[0] == "pandas" and hasattr(value, "to_dict"):
            return self.feed(value.to_dict())
        held = _everything(value) if self._whole else _held(value)
        if not held and " at 0x" not in (text := repr(value)):
            self._put("text", text)
        for name, part in sorted(held.items()):
            hidden = not self._whole and name.startswith("_") and ("cache" in name or stated is not None or library)
            if hidden or (library and not _is_simple(part)):
                continue
            self._put("attribute", name)
            self.feed(part)


def _held(value: Any) -> dict[str, Any]:
    """What an object holds, by name."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.compare}
    if isinstance(value, tuple):
        return {str(i): part for i, part in enumerate(value)}
    return _attributes(value)


def _attributes(value: Any) -> dict[str, Any]:
    """Its slots and its attributes."""
    given = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
    slots = [str(name) for names in given for name in ((names,) if isinstance(names, str) else names)]
    found = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return {**found, **{str(name): part for name, part in getattr(value, "__dict__", {}).items()}}


def _everything(value: Any) -> dict[str, Any]:
    """All that an object holds but copies: its parts, slots and attributes, among them fields of a dataclass that do not compare."""
    parts = {str(i): part for i, part in enumerate(value)} if isinstance(value, tuple) else {}
    return parts | {name: part for name, part in _attributes(value).items() if name not in _COPIES}


def _numbers(tensor: Tensor) -> bytes:
    """The bytes of a tensor's numbers, on whatever device and in whatever layout; none where it has none (``meta``)."""
    if tensor.is_meta:
        return b"meta"
    here = tensor.detach()
    here = (here.to_dense() if here.layout != torch.strided else here).cpu()
    here = (here.dequantize() if here.is_quantized else here).resolve_conj().resolve_neg()
    return here.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_simple(value: Any) -> bool:
    """Whether it is made of numbers and texts: more than that is not looked at inside of a library's objects, such as clients and loggers."""
    if isinstance(value, Mapping):
        return all(map(_is_simple, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes, Tensor, np.ndarray, np.generic))


def _is_default(field: "dataclasses.Field[Any]", value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return type(value) is type(field.default) and value == field.default
    return field.default_factory is not dataclasses.MISSING and not value and value == field.default_factory()


def _has_documentation(code: types.CodeType) -> bool:
    """Whether the first constant is the documentation: a text that no instruction loads."""
    if not code.co_consts or not isinstance(code.co_consts[0], str):
        return False
    loads = ("LOAD_CONST", "RETURN_CONST")
    return not any(step.opname in loads and step.arg == 0 for step in dis.get_instructions(code))


def _globals_of(code: types.CodeType) -> list[str]:
    """Names that a function or one inside it may look up outside of itself."""
    inner = [name for part in code.co_consts if isinstance(part, types.CodeType) for name in _globals_of(part)]
    return sorted({*code.co_names, *inner})


def _version(value: Any) -> str | None:
    """A version that a function, a class or an object states."""
    stated = getattr(value, "version", None)
    return f"{stated!r}" if isinstance(stated, (str, int, float)) else None


def _named(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    module = getattr(value, "__module__", "") or ""
    return f"{module}.{name}"
