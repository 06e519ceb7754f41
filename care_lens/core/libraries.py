"""What is an installed library, and not the user's own code: it counts in digests by its name and version, the user's by what it does."""

import csv
import functools
import sys
import types
from importlib import machinery, metadata
from pathlib import Path, PurePosixPath
from typing import Any

_IMPORTABLE = tuple(machinery.all_suffixes())


def is_library(value: Any) -> bool:
    """Whether it is of the language or of an installed library, and not of care_lens or the user's own code."""
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    top = (name or "").partition(".")[0]
    if top == "care_lens" or not top:
        return False
    if top in sys.stdlib_module_names and top != "__main__":
        return True
    return _is_installed(top)


@functools.cache
def _is_installed(top: str) -> bool:
    """Whether a package lies where an installer has put it: in site-packages, or beside the list of its files (``pip install --target``).

    A package that is installed for development lies elsewhere than that list.
    """
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if file is None:
        return False
    if "site-packages" in file or "dist-packages" in file:
        return True
    inside = Path(file).name.partition(".")[0] == "__init__"
    return top in _listed(str(Path(file).parent.parent if inside else Path(file).parent))


@functools.cache
def _listed(folder: str) -> frozenset[str]:
    """What can be imported from a folder and stands in an installer's list of files there; a list that cannot be read names nothing."""
    found = set()
    for distribution in metadata.distributions(path=[folder]):
        try:
            rows = list(csv.reader((distribution.read_text("RECORD") or "").splitlines()))
        except (OSError, ValueError, csv.Error):
            continue
        for parts in (PurePosixPath(row[0]).parts for row in rows if row):
            if len(parts) > 1:
                found.add(parts[0])
            elif parts and parts[0].endswith(_IMPORTABLE):
                found.add(parts[0].partition(".")[0])
    return frozenset(found)


@functools.cache
def library_version(module: str) -> str:
    """The package that a module is of, with its version; of the language, with Python's."""
    top = (module or "").partition(".")[0]
    if top in sys.stdlib_module_names:
        return f"{top} {sys.version_info[0]}.{sys.version_info[1]}"
    try:
        return f"{top} {metadata.version(top)}"
    except metadata.PackageNotFoundError:
        return f"{top} {getattr(sys.modules.get(top), '__version__', '')}"
