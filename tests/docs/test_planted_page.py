"""The page on the planted bench: its method runs, and its scorecard has it beside chance."""

import re
from pathlib import Path

import pytest

from care_lens import planted

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "planted.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the pages are not in this tree")
def test_the_method_of_the_page_can_be_entered():
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    method = code.partition("card = ")[0]
    space: dict = {}
    exec(compile(method, str(PAGE), "exec"), space)
    card = planted.scorecard(
        {"mine": space["largest_difference"]}, plants=["mlp_1"], at=[1.0], n=4, ours=False, n_boot=5, progress=False
    )
    rank = card.details["rank"].iloc[0]
    assert 1 <= rank <= card.details["of"].iloc[0] and card.details["place"].iloc[0].startswith("blocks.")
