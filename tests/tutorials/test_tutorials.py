"""The tutorials run, and their notebooks are made from the scripts as they are now."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "tutorials"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SOLUTION = re.compile(r"<details>.*?</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def solutions(notebook):
    """The code of the folded solutions, in order."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [code for folded in SOLUTION.findall(text) for code in CODE.findall(folded)]


def sources(notebook):
    return [(cell.cell_type, cell.source.strip()) for cell in notebook.cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_notebook_has_the_cells_of_its_script_and_their_outputs(script):
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    assert sources(notebook) == sources(jupytext.read(script)), "run `make tutorials`"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "run `make tutorials`"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_tutorial_runs_and_so_do_the_solutions_of_its_exercises(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PLOTLY_RENDERER", "json")
    # The kernel starts in an empty folder: it must import this checkout, whichever one is installed.
    path = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    notebook = jupytext.read(script)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    # Beside other workers on the same cores, threads of a kernel wait for each other longer than they work.
    threads = f"set_num_threads({os.environ.get('OMP_NUM_THREADS', 2)})"
    for cell in notebook.cells:
        cell.source = cell.source.replace("set_num_threads(2)", threads)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()


def test_there_is_a_tutorial():
    assert SCRIPTS
