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
