"""README's code runs as it stands, on fewer examples, and takes nothing from the pipeline."""

import re
import runpy
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from few_channels import quick_study
from PIL import Image

from care_lens import organism
from care_lens.core import Verdict
from care_lens.evaluation import answer_verdicts
from care_lens.repair import HybridFusion

ROOT = Path(__file__).parents[2]
PAGE = Path(__file__).parents[2] / "README.md"


def test_the_code_of_the_readme_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "pipeline" not in code
    few = quick_study()
    monkeypatch.setattr(organism, "study", lambda: few)
    monkeypatch.setattr(go.Figure, "show", lambda figure: None)
    monkeypatch.setattr(
        torch, "set_num_threads", lambda count: None
    )  # a worker keeps the threads that the suite gives it
    names: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert isinstance(names["choice"].repair, HybridFusion)
    without, repaired = capsys.readouterr().out.strip().splitlines()[-2:]
    # What is learned from so few need not stop the three that are shown; of the seen attacks of validation it does some.
    assert without.startswith("[") and repaired.startswith("[") and names["choice"].runs["asr"].min() < 1
    attacked = [e for m in few.seen for e in few.malicious("validation", m)]
    bare, stopped = (
        answer_verdicts(names["lvlm"], attacked, repair, few.judge, max_new_tokens=14)
        for repair in (None, names["choice"].repair)
    )
    assert stopped.count(Verdict.REFUSED) > bare.count(Verdict.REFUSED)
    assert stopped.count(Verdict.COMPLIED) < bare.count(Verdict.COMPLIED)
    assert HybridFusion.load("my_repair").describe() == names["choice"].repair.describe()
    names["lvlm"].close()


def test_the_figure_is_of_the_rows_of_the_table():
    drawn = runpy.run_path(str(ROOT / "docs" / "readme_figure.py"))
    with Image.open(drawn["PICTURE"]) as picture:
        assert picture.info.get("rows") == drawn["digest"](), "run `python docs/readme_figure.py`"
    figure, rows = drawn["figure"](), drawn["rows"]()
    for trace in figure.data:
        own = rows[rows["defence"] == trace.name].set_index("channel")["value"]
        if len(own):
            assert sorted(trace.x) == pytest.approx(sorted(own))
    assert set(rows["defence"]) <= {trace.name for trace in figure.data}
