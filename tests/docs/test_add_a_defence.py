"""The page on defences of one's own runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "add_a_defence.md"


def test_the_code_of_the_page_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {"__name__": "add_a_defence"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    frame = names["table"].to_dataframe()
    assert {"none", "push", "without picture"} == set(frame["defence"])
    assert "push" in capsys.readouterr().out
    names["lvlm"].close()
