"""What `make bench` takes for granted of every script, read from their source: they are not run here, and their types pyright checks."""

import ast
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("bench_*.py"))


def arguments(script):
    """The names and options of every ``add_argument`` of a script."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names = [name.value for name in node.args if isinstance(name, ast.Constant)]
            yield names, {option.arg: option.value for option in node.keywords}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_without_arguments_and_has_a_short_form(script):
    """`make bench` runs all of them, `make bench ARGS=--short` all shortly."""
    found = list(arguments(script))
    assert "--short" in {name for names, _ in found for name in names}
    for names, options in found:
        left_out = isinstance(options.get("nargs"), ast.Constant) and options["nargs"].value in ("?", "*")
        assert names[0].startswith("-") or left_out, f"{names[0]} must have a default: `make bench` gives none"
        assert "required" not in options, names


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_options_that_are_read_are_declared(script):
    """A Namespace has any attribute for a type checker."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    parsed = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).endswith(".parse_args()")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    declared = {name.lstrip("-").replace("-", "_") for names, _ in arguments(script) for name in names}
    declared |= {
        value.value for _, options in arguments(script) if isinstance(value := options.get("dest"), ast.Constant)
    }
    read = {
        node.attr
        for main in tree.body
        for node in ast.walk(main)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in parsed
    }
    assert not parsed or read <= declared, read - declared
