"""Pages whose code runs as it stands print what they say they print."""

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from few_channels import quick_study

from care_lens import organism

DOCS = Path(__file__).parents[2] / "docs"


def run(page, capsys):
    """The names that the code of a page leaves, what it printed, and what the page says that it prints, without blanks at the ends of lines."""
    text, names = (DOCS / page).read_text(encoding="utf-8"), {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, page, "exec"), names)
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    said = [
        line.rstrip()
        for block in re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
    ]
    return names, printed, said


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", ["concepts/sites.md", "howto/hooked_transformer.md", "howto/conversations.md", "howto/add_an_outcome.md"]
)
def test_a_page_prints_what_it_says(page, capsys):
    names, printed, said = run(page, capsys)
    assert set(said) <= set(printed) and said
    assert printed == said or page == "howto/conversations.md"  # which shows some of what it prints
    names["lvlm"].close()


def test_the_page_on_subspaces_prints_what_it_says_and_refuses_what_it_says(capsys):
    from care_lens.subspace import SubspaceMismatchError

    names, printed, said = run("concepts/subspaces.md", capsys)
    assert [line for line in said if not line.startswith("  solver")] == [
        line for line in printed if not line.startswith("  solver")
    ]
    assert names["streamed"].rank == 8 and names["again"].equals(names["subspace"])
    subspace, own = names["SafetySubspace"], {"site": names["site"], "modality": "visual", "model": names["model"]}
    for other in ({"site": "blocks.1.hook_resid_post"}, {"modality": "textual"}):
        with pytest.raises(SubspaceMismatchError):
            subspace.from_pretrained("my_subspace", **{**own, **other})
    bare = subspace.fit(names["benign"], names["malicious"], rank=2, site=names["site"], modality="visual")
    bare.save("bare")
    with pytest.raises(SubspaceMismatchError, match="without a model"):
        subspace.from_pretrained("bare", **own)
    names["lvlm"].close()


def test_a_family_is_registered_as_the_page_does(capsys, monkeypatch):
    from care_lens.lvlm.families import families, registry

    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    run("howto/new_family.md", capsys)
    (mine,) = [family for family in families() if family.name == "my llava"]
    assert mine.architectures == ("MyLlavaForConditionalGeneration",)


@pytest.mark.parametrize("page", sorted((DOCS / "concepts").glob("*.md")), ids=lambda page: page.stem)
def test_a_concept_page_has_a_picture_of_its_own_that_is_described(page):
    (described, name) = re.search(
        r"!\[([^\]]+)\]\(\.\./figures/(\w+\.svg)\)", page.read_text(encoding="utf-8")
    ).groups()
    assert name == f"{page.stem}.svg" and len(described) > 30
    assert ElementTree.parse(DOCS / "figures" / name).getroot().tag.endswith("svg")


def test_the_diagrams_are_those_that_the_script_draws():
    spec = importlib.util.spec_from_file_location("concept_pictures", DOCS / "concept_pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {*module.DIAGRAMS, *module.RESULTS} == {page.stem for page in (DOCS / "concepts").glob("*.md")}
    for name, draw in module.DIAGRAMS.items():
        assert (DOCS / "figures" / f"{name}.svg").read_text(encoding="utf-8") == draw(), "run docs/concept_pictures.py"


@pytest.mark.parametrize("page", ["lens", "mediation", "defences", "evaluation", "intervals"])
def test_the_code_of_the_page_runs_from_its_first_line_to_its_last(page, capsys, monkeypatch):
    few = quick_study()
    monkeypatch.setattr(organism, "study", lambda: few)
    names, printed, _ = run(f"concepts/{page}.md", capsys)
    if page == "evaluation":
        assert any("steered" in line for line in printed) and names["found"].setting
    if page == "mediation":
        assert {"sign", "image"} <= {*names["found"].frame["position"]}
