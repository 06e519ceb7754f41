"""Every relative link of the documentation, of README and of the tutorials leads somewhere, and no page loads anything."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
ROLE = re.compile(r"\{doc\}`(?:[^<`]*<)?([^>`]+)>?`")
FENCE = re.compile(r"^(```|~~~|:::).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "llms.txt"]
    files += [page for page in sorted(DOCS.rglob("*.md")) if not {"_build", "_generated"} & set(page.parts)]
    return files + sorted((ROOT / "tutorials").glob("*.ipynb"))


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return text


def anchors(page: Path) -> set[str]:
    """Headings as GitHub and MyST name them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", FENCE.sub("", text_of(page)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found[name] = found.get(name, 0) + 1
    return {name if i == 0 else f"{name}-{i}" for name, n in found.items() for i in range(n)}


def target_of(page: Path, link: str) -> Path:
    path = link.partition("#")[0]
    if not path:
        return page
    return (page.parent / path).resolve()


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_anchor_exists(page):
    text = text_of(page)
    links = [link for link in LINK.findall(re.sub(r"`[^`\n]*`", "`code`", FENCE.sub("", text)))]
    links = [link for link in links if not re.match(r"[a-z]+:", link)]
    links += [f"{name}.md" for name in ROLE.findall(text)]
    broken = []
    for link in links:
        target = target_of(page, link)
        anchor = link.partition("#")[2]
        if not target.exists() or (anchor and target.suffix in (".md", ".ipynb") and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_a_broken_anchor_would_be_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One thing: and `another`\n\n## Twice\n\n## Twice\n\n```\n# no heading\n```\n")
    assert anchors(page) == {"one-thing-and-another", "twice", "twice-1"}
    assert LINK.findall("see [a [b] c](x.md#y) and ![pic](p.png)") == ["x.md#y", "p.png"]


def test_every_page_is_in_a_table_of_contents_once():
    listed: list[str] = []
    for page in DOCS.rglob("*.md"):
        if {"_build", "_generated"} & set(page.parts):
            continue
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed += [str((page.parent / entry).relative_to(DOCS)) for entry in entries]
    there = {
        str(page.relative_to(DOCS).with_suffix(""))
        for page in DOCS.rglob("*.md")
        if not {"_build", "_generated"} & set(page.parts)
    } - {"index", "reference/site_table"}
    written = [name for name in listed if not name.startswith("_generated")]
    assert sorted(written) == sorted(there)


@pytest.fixture(scope="module")
def offline():
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("offline", DOCS / "offline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def formulas(text: str) -> list[tuple[str, bool]]:
    plain = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    blocks = re.findall(r"\$\$(.+?)\$\$", plain, re.DOTALL)
    inline = re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", plain, flags=re.DOTALL))
    return [(formula, True) for formula in blocks] + [(formula, False) for formula in inline]


def test_every_formula_becomes_mathml_with_no_command_left(offline):
    found = [f for page in pages() if page.parent.parent == DOCS for f in formulas(text_of(page))]
    assert len(found) > 80
    for latex, block in found:
        made = offline.mathml(latex, block=block)
        assert made.startswith("<math") and "\\" not in made, latex
    assert offline.mathml(r"\tfrac12") == offline.mathml(r"\frac12")


def test_pages_made_of_notebooks_load_nothing_from_elsewhere(offline):
    for notebook in sorted((ROOT / "tutorials").glob("*.ipynb")):
        text = notebook.read_text(encoding="utf-8")
        made = offline.without_loading(text)
        outputs = json.dumps([cell.get("outputs") for cell in json.loads(made)["cells"]])
        html = [
            "".join(o.get("data", {}).get("text/html", ""))
            for c in json.loads(made)["cells"]
            for o in c.get("outputs", ())
        ]
        assert not offline.loads_from_elsewhere("".join(html)), notebook.name
        assert ("../_static/plotly.min.js" in outputs) == ("Plotly.newPlot" in outputs)


def test_what_a_page_would_load_is_found(offline):
    loads = [
        '<script async src="https://a.org/x.js"></script>',
        '<link rel="stylesheet" href="https://a.org/x.css">',
        '<link href="https://a.org/x.css" rel="stylesheet">',
        '<img alt="" src="http://a.org/x.png">',
        '<script type="module">import "https://a.org/x.js"</script>',
    ]
    assert all(len(offline.loads_from_elsewhere(html)) == 1 for html in loads)
    reads = (
        '<a href="https://a.org">a</a><link rel="canonical" href="https://a.org"><script src="_static/x.js"></script>'
    )
    assert not offline.loads_from_elsewhere(reads)
