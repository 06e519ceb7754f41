"""The tutorials run, and their notebooks are made from the scripts as they are now."""

import os
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "tutorials"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SOLUTION = re.compile(r"<details>.*?</details>", re.DOTALL)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


#: Tutorials that learn from the whole study; what they say was measured so (`make tutorials`), and their code is tested on a part of it.
LEARNS = ("quickstart",)
#: The study is drawn once for all notebooks.
STUDY = f"""
import functools, sys
sys.path.append({str(FOLDER.parent / "tests" / "pipeline")!r})
import few_channels
from care_lens import organism
few_channels.drawn = getattr(few_channels, "drawn", None) or functools.cache(organism.study)
organism.study = few_channels.drawn
if {{quick}}:
    part = few_channels.drawn().limited(12, splits=("fit", "calibration"))
    organism.study = lambda: part
del functools, sys, few_channels, organism
"""


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
    outputs = [one for cell in code for one in cell.outputs]
    assert not any("%|" in one.get("text", "") for one in outputs), "progress bars: run `make tutorials`"


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all notebooks: importing torch and the rest takes longer than some of them run."""
    manager = KernelManager(kernel_name="python3")
    # It starts elsewhere: it must import this checkout, whichever one is installed.
    path = [str(FOLDER.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    manager.start_kernel(env={**os.environ, "PLOTLY_RENDERER": "json", "PYTHONPATH": os.pathsep.join(path)})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_tutorial_runs_and_so_do_the_solutions_of_its_exercises(script, tmp_path, kernel):
    notebook = jupytext.read(script)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(notebook)]
    # As in a new kernel: no name is left of the last notebook, and the folder is an empty one.
    fresh = f"%reset -f\nimport gc, os\ngc.collect()\nos.chdir({str(tmp_path)!r})\ndel gc, os"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"{fresh}\n{STUDY.format(quick=script.stem in LEARNS)}"))
    # Beside other workers on the same cores, threads of a kernel wait for each other longer than they work.
    threads = f"set_num_threads({os.environ.get('OMP_NUM_THREADS', 2)})"
    for cell in notebook.cells:
        cell.source = cell.source.replace("set_num_threads(2)", threads)
    NotebookClient(notebook, km=kernel, timeout=500).execute()


def test_there_is_a_tutorial():
    assert SCRIPTS
