"""Types and shapes of care_lens's functions, methods and dataclasses are checked where the tests call them.

Every function of a module and of its classes is checked by beartype, and those whose signature speaks of arrays by jaxtyping too: what
``jaxtyping.install_import_hook`` does, but for two things that cost half of the suite's time. Functions and classes inside of functions, which
are made anew for every batch, are left as they are; and signatures without an array are not given a scope for shapes.
"""

import ast
import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import cache_from_source
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import jaxtyping
from beartype import BeartypeConf, beartype

Made = TypeVar("Made", bound=Callable[..., Any])

VERSION = "checked1"
"""In the names of cached bytecode, so that no process without the hook reads it; to be raised when the transformer changes."""

_FUNCTION, _CLASS = "__checked_function__", "__checked_class__"
_STATE: Any = ModuleType("checked_state")
_STATE.made = {}  # of a module: digests of code look at what a function's globals hold, and stop at modules
_alone = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def checked_function(function: Made) -> Made:
    """A function that checks its arguments and what it returns; the check is made when it is first called."""
    if not function.__annotations__ or getattr(function, "__no_type_check__", False):
        return function

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:  # by tests of what care_lens itself says to a wrong argument
            return function(*args, **kwargs)
        return (_STATE.made.get(function) or _checking(function))(*args, **kwargs)

    return called  # type: ignore[return-value]


def _checking(function: Callable[..., Any]) -> Callable[..., Any]:
    # Kept here and not by the function, which looks the same before it is called and after: digests of code see what it holds.
    told = _resolved(function)
    _STATE.made[function] = (_with_shapes if speaks_of_arrays(told) else _alone)(_told(function, told))
    return _STATE.made[function]


def _with_shapes(function: Made) -> Made:
    return jaxtyping.jaxtyped(function, typechecker=beartype)


def _resolved(function: Callable[..., Any]) -> dict[str, Any]:
    """Its annotations, texts among them evaluated; what a module imports for type checkers alone is Any."""
    scope, found = function.__globals__, {}
    for name, told in function.__annotations__.items():
        one = SimpleNamespace(__annotations__={name: told})
        try:
            found[name] = typing.get_type_hints(one, scope, include_extras=True)[name]
        except NameError:
            found[name] = Any
    return found


def _told(function: Callable[..., Any], annotations: dict[str, Any]) -> Callable[..., Any]:
    """The same function with other annotations; its own keeps those that documentation shows."""
    made = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, annotations
    made.__module__, made.__qualname__, made.__doc__ = function.__module__, function.__qualname__, function.__doc__
    return made


def checked_class(cls: type) -> type:
    """A class whose generated ``__init__`` checks the fields, if it is a dataclass."""
    made = cls.__dict__.get("__init__")
    if dataclasses.is_dataclass(cls) and made is not None and not hasattr(made, "__wrapped__"):
        cls.__init__ = checked_function(made)  # type: ignore[misc]
    return cls


def speaks_of_arrays(annotations: Mapping[str, Any]) -> bool:
    """Whether one of the annotations has a shape."""
    return any("jaxtyping" in repr(told) for told in annotations.values())


class _Decorated(ast.NodeTransformer):
    """Functions of a module and methods of its classes, innermost decorator; classes, outermost. Nothing inside of functions."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list.append(ast.copy_location(ast.Name(_FUNCTION, ast.Load()), node))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.decorator_list.insert(0, ast.copy_location(ast.Name(_CLASS, ast.Load()), node))
        return node


class _Loader(SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        tree = _Decorated().visit(ast.parse(data, filename=path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_code(self, fullname: str) -> Any:
        with patch("importlib._bootstrap_external.cache_from_source", partial(cache_from_source, optimization=VERSION)):
            return super().get_code(fullname)

    def exec_module(self, module: Any) -> None:
        module.__dict__.update({_FUNCTION: checked_function, _CLASS: checked_class})
        super().exec_module(module)


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != self._package and not name.startswith(f"{self._package}."):
            return None
        found = (finder.find_spec(name, path, target) for finder in _others())
        spec = next((one for one in found if one is not None), None)
        if spec is None or not isinstance(spec.loader, SourceFileLoader):
            return spec
        return importlib.util.spec_from_file_location(
            name,
            spec.origin,
            loader=_Loader(name, str(spec.origin)),
            submodule_search_locations=spec.submodule_search_locations,
        )


def _others() -> list[Any]:
    """The finders of the process but this one; those of editable installs come behind the path, as PYTHONPATH wants it."""
    return [PathFinder, *(f for f in sys.meta_path if hasattr(f, "find_spec") and not isinstance(f, _Finder))]


def install(package: str) -> None:
    """Check all of a package that is imported from now on.

    Raises:
        RuntimeError: If a part of it is imported already, and would not be checked.
    """
    if early := [name for name in sys.modules if name.partition(".")[0] == package]:
        raise RuntimeError(f"{package} must not be imported before its checks are installed, got {early[:3]}")
    sys.meta_path.insert(0, _Finder(package))
