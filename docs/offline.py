"""Pages that load nothing from elsewhere: formulas as MathML, and plotly's script once in the folder `_static`.

Browsers draw MathML themselves, so that no script is needed. A formula that cannot be converted stops the build.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from plotly.offline import get_plotlyjs
from sphinx.errors import ExtensionError

PLOTLY = "plotly.min.js"
_ELSEWHERE = re.compile(r'<script\b[^>]*\bsrc="https?://[^>]*>\s*</script>')
_MODULE = re.compile(r'<script type="module">\s*import "https?://[^<]*</script>')
_MATHJAX = re.compile(r"<script\b[^>]*>\s*if \(window\.MathJax\b[^<]*</script>|if \(window\.MathJax\b[^\n<]*")

_LOADS = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?://[^"]*)'
    r'|<link\b(?=[^>]*\brel="(?:stylesheet|preload|icon|modulepreload)")[^>]*\bhref="(https?://[^"]*)'
    r'|\bimport "(https?://[^"]*)'
)


def mathml(latex: str, *, block: bool = False) -> str:
    """A formula as MathML."""
    plain = latex.replace(r"\tfrac", r"\frac").replace(r"\lVert", r"\Vert").replace(r"\rVert", r"\Vert")
    return convert(plain, display="block" if block else "inline")


def without_loading(notebook: str) -> str:
    """The text of a notebook whose outputs take plotly from the documentation's own folder."""
    content = json.loads(notebook)
    for output in (output for cell in content["cells"] for output in cell.get("outputs", ())):
        if html := output.get("data", {}).get("text/html"):
            output["data"]["text/html"] = _local("".join(html))
    return json.dumps(content, indent=1, ensure_ascii=False)


def _local(html: str) -> str:
    here = f'<script src="../_static/{PLOTLY}"></script>'
    html = _ELSEWHERE.sub(lambda found: here if "plotly" in found.group() else "", html)
    return _MATHJAX.sub("", _MODULE.sub("", html))


def _inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def _display(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def _keep_plotly(app) -> None:
    target = Path(app.outdir) / "_static" / PLOTLY
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(get_plotlyjs(), encoding="utf-8")


def _loading(app, pagename, templatename, context, doctree) -> None:
    """Leave out scripts of other hosts that extensions add for outputs (require.js), which nothing here needs."""
    context["script_files"] = [
        file for file in context.get("script_files", []) if not str(getattr(file, "filename", file)).startswith("http")
    ]


def loads_from_elsewhere(html: str) -> list[str]:
    """Addresses of other hosts that a browser would open to show the page; links that a reader may follow are none."""
    return [next(filter(None, found)) for found in _LOADS.findall(html)]


def _check(app, error) -> None:
    if error is not None or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        if found := loads_from_elsewhere(page.read_text(encoding="utf-8")):
            raise ExtensionError(f"{page.name} must load nothing from elsewhere, got {found[0]}; see docs/offline.py")


def setup(app) -> dict[str, bool]:
    """Connect the above."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.connect("builder-inited", _keep_plotly)
    app.connect("build-finished", _check)
    app.connect("html-page-context", _loading, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
