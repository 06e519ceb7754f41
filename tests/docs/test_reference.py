"""The reference has every public name on exactly one page, and nothing that does not exist."""

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import care_lens

PAGES = Path(__file__).parents[2] / "docs" / "reference"
ENTRY = re.compile(r"^\.\. (autoclass|autoexception|autofunction|autodata|py:data):: (care_lens\.\S+)$", re.MULTILINE)


def key(name: str, value: object) -> tuple[str, str]:
    """What is the same thing under every name that it is exported by: an alias of a class, a name of two packages."""
    if inspect.isclass(value) or inspect.isfunction(inspect.unwrap(value)):
        plain = inspect.unwrap(value)
        return plain.__module__, plain.__qualname__
    return name, repr(value)


def exported() -> dict[tuple[str, str], str]:
    """Every public name of every package, modules and dunder names left out."""
    packages = [care_lens.__name__] + [
        info.name for info in pkgutil.walk_packages(care_lens.__path__, "care_lens.") if info.ispkg
    ]
    found: dict[tuple[str, str], str] = {}
    for package in packages:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not isinstance(value, ModuleType) and not name.startswith("__"):
                found[key(name, value)] = f"{package}.{name}"
    return found


def documented() -> dict[tuple[str, str], list[str]]:
    pages: dict[tuple[str, str], list[str]] = {}
    for page in sorted(PAGES.glob("*.md")):
        for _, path in ENTRY.findall(page.read_text(encoding="utf-8")):
            module, _, name = path.rpartition(".")
            pages.setdefault(key(name, getattr(importlib.import_module(module), name)), []).append(page.name)
    return pages


def test_every_public_name_is_on_exactly_one_page():
    pages, names = documented(), exported()
    missing = sorted(path for what, path in names.items() if what not in pages)
    assert not missing, f"add a line `.. autoclass:: NAME` (or autofunction) to the page of docs/reference: {missing}"
    twice = {names.get(what, what): where for what, where in pages.items() if len(where) > 1}
    assert not twice


def test_every_page_is_in_the_index_once_and_the_main_class_opens_its_page():
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    listed = Counter(re.findall(r"^([a-z_]+)$", index, re.MULTILINE))
    there = {page.stem for page in PAGES.glob("*.md")} - {"index", "families", "site_table"}
    assert listed == Counter(there)
    for page, first in {
        "hooked_lvlm": "HookedLVLM",
        "safety_subspace": "SafetySubspace",
        "hybrid_fusion": "HybridFusion",
        "correction": "Correction",
        "published_care": "PublishedCARE",
        "study": "Study",
        "evaluate": "evaluate",
    }.items():
        _, path = ENTRY.findall((PAGES / f"{page}.md").read_text(encoding="utf-8"))[0]
        assert path.endswith(f".{first}"), page
