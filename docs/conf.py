"""Sphinx configuration. Tutorials and the model card are brought in from elsewhere; nothing is executed."""

import shutil
import sys
from pathlib import Path

import jupytext

import care_lens

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from offline import without_loading  # noqa: E402

project = "care_lens"
author = "care_lens authors"
copyright = "2026, care_lens authors"
release = version = care_lens.__version__

extensions = [
    "myst_nb",
    "offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "reference/site_table.md"]
default_role = "literal"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_ipywidgets_js = {}  # no script of another host
nb_execution_mode = "off"  # the tests execute the tutorials

autodoc_default_options = {"members": True, "show-inheritance": True, "exclude-members": "__new__,__init__"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"care_lens {release}"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

NO_CARD = "# Model card\n\nThe weights, and with them the card, are not part of this checkout.\n"


def bring_in() -> None:
    """Copy the model card and the notebooks to _generated/; a tutorial without a notebook is not executed."""
    generated = HERE / "_generated"
    shutil.rmtree(generated, ignore_errors=True)
    generated.mkdir()
    card = ROOT / "care_lens" / "organism" / "weights" / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else NO_CARD
    (generated / "model_card.md").write_text(text, encoding="utf-8")
    for script in sorted((ROOT / "tutorials").glob("*.py")):
        notebook = script.with_suffix(".ipynb")
        target = generated / notebook.name
        if notebook.exists():
            target.write_text(without_loading(notebook.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            jupytext.write(jupytext.read(script), target)


bring_in()


def readable(app, what, name, obj, options, signature, returns):
    """Let Sphinx parse the signatures of dataclasses whose fields have factories."""
    return (signature and signature.replace("<factory>", "..."), returns)


def setup(app) -> None:
    """Connect the above."""
    app.connect("autodoc-process-signature", readable)
