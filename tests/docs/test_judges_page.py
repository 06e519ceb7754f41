"""The page on judges, graders and tables runs as it stands."""

import re
from pathlib import Path

import care_lens.evaluation as evaluation

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "judges.md"


def test_the_code_of_the_page_runs_and_asks_nobody(capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    told = capsys.readouterr().out
    assert "fleiss-kappa" in told and "16 requests, at most" in told and "[1.0, 1.0, 0.0]\nNone" in told
    assert "\\begin{tabular}{lrr}" in told and "somebody's (quoted) & 4.2 & --" in told and "perplexity" in told
    corrected = names["corrected"]
    assert ((corrected["ci_low"] <= corrected["value"]) & (corrected["value"] <= corrected["ci_high"])).all()
    assert names["figure"].layout.width == 320
    names["lvlm"].close()


def test_the_judges_and_graders_that_the_page_lists_are_there():
    text = PAGE.read_text(encoding="utf-8")
    listed = {found for found in re.findall(r"^\| `(\w+)", text, flags=re.MULTILINE)} - {"OrganismJudge"}
    assert listed <= {*evaluation.__all__} and {"EndpointJudge", "GuardJudge", "MMVetGrader", "VQAGrader"} <= listed
