"""The page on attacks runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "attacks.md"


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {"__name__": "attacks"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    asked = names["requests"]
    for made in ("wrapped", "begun", "moved"):
        assert [e.id for e in names[made].examples] == [e.id for e in asked]
    assert (names["moved"].frame.loss < names["moved"].frame.clean_loss).all()
    assert all(e.prefill and e.response.startswith(e.prefill) for e in names["begun"].examples)
    assert (names["best"].frame.loss <= names["best"].frame.clean_loss).all()
    assert "True" in capsys.readouterr().out
    cells = {*zip(names["table"].frame.defence, names["table"].frame.channel, strict=True)}
    assert ("reminder", "PGD, adaptive") in cells and ("none", "random noise 16") in cells
    names["lvlm"].close()
