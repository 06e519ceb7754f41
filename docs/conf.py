"""Sphinx configuration. Tutorials and the model card are brought in from elsewhere; nothing is executed."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import jupytext
from plotly.offline import get_plotlyjs

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
exclude_patterns = ["_build", "reference/site_table.md", "_generated/gallery.md"]
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


def draw_gallery() -> None:
    """Write the gallery's entries, and the script that draws them, once for the whole page."""
    from care_lens.plots import paper
    from care_lens.plots.theme import in_dark

    spec = importlib.util.spec_from_file_location("gallery_figures", HERE / "gallery_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entries, light, dark = [], {}, {}
    for name, (title, call, make) in module.ENTRIES.items():
        figure = paper(make(), columns=1)
        light[name] = json.loads(str(figure.to_json()))
        dark[name] = in_dark(light[name])
        place = f"<div class='gallery-figure' data-figure='{name}' style='height:{figure.layout.height}px'></div>"
        entries.append(f"## {title}\n\n```python\n{call}\n```\n\n```{{raw}} html\n{place}\n```\n")
    static = HERE / "_generated" / "static"
    static.mkdir()
    (static / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    data = json.dumps({"light": light, "dark": dark})
    (static / "gallery.js").write_text(GALLERY % data, encoding="utf-8")
    scripts = "".join(f"<script src='_static/{name}'></script>" for name in ("plotly.min.js", "gallery.js"))
    entries.append(f"```{{raw}} html\n{scripts}\n```\n")
    (HERE / "_generated" / "gallery.md").write_text("\n".join(entries), encoding="utf-8")


GALLERY = """
const figures = %s;
const dark = () => {
  const chosen = document.body.dataset.theme;
  return chosen === "dark" || (chosen !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
};
const draw = () => document.querySelectorAll(".gallery-figure").forEach((place) => {
  const figure = structuredClone(figures[dark() ? "dark" : "light"][place.dataset.figure]);
  Plotly.newPlot(place, figure.data, figure.layout, {displayModeBar: false});
});
draw();
new MutationObserver(draw).observe(document.body, {attributeFilter: ["data-theme"]});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
"""

bring_in()
draw_gallery()
html_static_path = ["_generated/static"]


def readable(app, what, name, obj, options, signature, returns):
    """Let Sphinx parse the signatures of dataclasses whose fields have factories."""
    return (signature and signature.replace("<factory>", "..."), returns)


#: Pages link to notebooks and the model card where they lie in the checkout, so that links work where a page is read there.
ELSEWHERE = re.compile(
    r"\]\((?P<up>(?:\.\./)*)\.\./(?:tutorials/(?P<notebook>\w+\.ipynb)|(?P<card>care_lens/organism/weights/README\.md))"
)


def brought_in(app, docname, source) -> None:
    """Let such links lead to the copies in _generated/."""
    source[0] = ELSEWHERE.sub(
        lambda found: f"]({found['up']}_generated/{found['notebook'] or 'model_card.md'}", source[0]
    )


def setup(app) -> None:
    """Connect the above."""
    app.connect("source-read", brought_in)
    app.connect("autodoc-process-signature", readable)
