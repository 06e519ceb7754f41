"""The page that says it runs as it stands does."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "pictures.md"


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    logits, blurred = names["logits"], names["blurred"]
    plain = names["lvlm"](names["inputs"])
    assert not plain.equal(logits) and not plain.equal(blurred)
    assert "direction 0" in capsys.readouterr().out
    names["lvlm"].close()


def test_the_code_of_the_page_on_benchmarks_runs(capsys):
    page = PAGE.with_name("benchmarks.md")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    told = capsys.readouterr().out
    assert (
        "PreflightReport(figstep: 1 errors, 1 warnings) False" in told and "FigStep(11 examples, 1 problems) 12" in told
    )
    assert "safebench.csv row 12: no file" in told
    readers = {
        line.split("`")[1]: line.split("`")[3]
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    }
    assert readers == {reader.__name__: name for name, reader in names["benchmarks"].READERS.items()}
    names["lvlm"].close()


def test_the_code_of_the_page_on_conversations_runs(capsys):
    page = PAGE.with_name("conversations.md")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert names["made"].answers[0].startswith("sure") and int(names["spans"].prefill.sum()) == 1
    names["lvlm"].close()


def test_the_code_of_the_page_on_studies_runs(capsys):
    names = run_page("study.md")
    study, again = names["study"], names["again"]
    assert again.seen == study.seen == {"visual": (), "textual": ("wrapper",)} and list(again.pairs) == ["wrapper"]
    assert study.held_out() == ("wrapper (new templates)",) and str(names["notes"]) in capsys.readouterr().out


def run_page(name):
    """The names that the code of a page leaves."""
    page, names = PAGE.with_name(name), dict[str, object]()
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    return names


def test_the_recipe_of_the_page_is_one(tmp_path):
    from care_lens.pipeline.recipe import read_recipe, recipes

    text = PAGE.with_name("reproduce.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(block)
    assert list(read_recipe(path).defences)[-1] == "our repair"
    assert all(f"| `{name}` |" in text for name in recipes())
