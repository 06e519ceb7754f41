"""The package itself."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import care_lens


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, care_lens; print({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_names_come_when_they_are_asked_for():
    assert care_lens.Site("language", 0, "hook_mlp_out").layer == 0
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        care_lens.Nothing  # noqa: B018


def test_every_public_name_is_there_listed_and_seen_by_type_checkers():
    tree = ast.parse(Path(care_lens.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {(node.module, alias.name) for node in checked.body for alias in node.names}
    assert {name for _, name in imports} == {*care_lens.__all__} - {"__version__"}
    for home, name in imports:
        found = getattr(care_lens, name)
        if home == "care_lens":
            assert found is import_module(f"care_lens.{name}")
        else:
            assert found is getattr(import_module(home), name)
            assert name in import_module(home).__all__
    assert {*care_lens.__all__} <= {*dir(care_lens)}


FLOORS = (
    {"core"},
    {"lvlm", "subspace", "data"},
    {"capture", "attacks", "organism"},
    {"lens", "mediation", "repair"},
    {"defences"},
    {"evaluation"},
    {"plots"},
    {"pipeline"},
    {"cli"},
)


def test_a_room_imports_only_from_floors_below_it():
    """Imports inside of functions included, but for those of plots, which results make."""
    floor = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
    package, wrong = Path(care_lens.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room not in floor:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for other in (name.split(".")[1] for name in names if name.startswith("care_lens.")):
                if other not in (room, "plots") and floor.get(other, 0) >= floor[room]:
                    wrong.append(f"{path.relative_to(package)}:{node.lineno} imports {other}")
    # The former place of separability, whose name mediation still gives.
    assert [line for line in wrong if not line.startswith("mediation/__init__.py")] == []
