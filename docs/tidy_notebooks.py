"""Take progress bars out of executed notebooks: each of their states is an output of its own. `python docs/tidy_notebooks.py tutorials/*.ipynb`."""

import sys
from pathlib import Path

import nbformat


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with one stream of errors a cell, as a terminal shows it at the end, and without bars."""
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        errors = [one for one in outputs if one.output_type == "stream" and one.name == "stderr"]
        if not errors:
            continue
        lines = "".join(one.text for one in errors).split("\n")
        left = [line for line in (line.rpartition("\r")[2] for line in lines) if line.strip() and "%|" not in line]
        kept = [nbformat.v4.new_output("stream", name="stderr", text="\n".join(left) + "\n")] if left else []
        cell.outputs = [*kept, *(one for one in outputs if one not in errors)]
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(tidied(nbformat.read(name, as_version=4)), Path(name))
