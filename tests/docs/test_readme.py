"""README's code runs as it stands, on fewer examples, and takes nothing from the pipeline."""

import re
from pathlib import Path

import plotly.graph_objects as go
import torch
from few_channels import quick_study

from care_lens import organism
from care_lens.repair import HybridFusion

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
    # What is learned from so few need not stop the three that are shown.
    assert without.startswith("[") and repaired.startswith("[") and names["choice"].runs["asr"].min() < 1
    assert HybridFusion.load("my_repair").describe() == names["choice"].repair.describe()
    names["lvlm"].close()
