"""Texts in csv files are no formulas to spreadsheets, and come back as they were."""

import csv
import io
import tempfile
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core import FrameResult
from care_lens.core.cells import defused, defused_text, restored

FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "=cmd|' /C calc'!A0",
    "'=1",
    "''@x",
    "'",
    "' =",
    "''",
]
TEXT = st.sampled_from(FORMULAS) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=9
)


@dataclass(frozen=True)
class Texts(FrameResult):
    """Texts and numbers."""

    def plot(self):
        return go.Figure()


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXT, max_size=6))
def test_texts_come_back(texts):
    frame = pd.DataFrame({"text": pd.Series(texts, dtype=object)})
    written = defused(frame)
    assert not any(text[:1] in tuple("=+-@\t\r\n") and text for text in written["text"])
    assert restored(written)["text"].tolist() == texts


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(TEXT, st.floats(allow_nan=False)), min_size=1, max_size=5))
def test_results_keep_texts_and_numbers(rows):
    frame = pd.DataFrame(rows, columns=["answer", "-value"])
    with tempfile.TemporaryDirectory() as folder:
        path = Texts(frame, {}).save(folder, "a")
        back = Texts.load(folder, "a").frame
        content = path.read_bytes().decode()
    assert back["answer"].tolist() == [text for text, _ in rows]
    assert back["-value"].tolist() == [value for _, value in rows]
    cells = list(csv.reader(io.StringIO(content, newline="")))
    assert cells[0] == ["answer", "'-value"] and len(cells) == 1 + len(rows)
    for (text, value), cell in zip(rows, cells[1:], strict=True):
        assert cell[0] == defused_text(text) and float(cell[1]) == value


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_all_kinds_of_text_columns(dtype):
    frame = pd.DataFrame({"a": pd.Series(["=1", "b"], dtype=dtype), "n": [-1, 2], "m": [None, -1.5]})
    written = defused(frame)
    assert written["a"].tolist() == ["'=1", "b"] and written["n"].tolist() == [-1, 2]
    assert restored(written)["a"].tolist() == ["=1", "b"]
    mixed = pd.DataFrame({"a": pd.Series(["=1", -2, None], dtype=object)})
    assert defused(mixed)["a"].tolist() == ["'=1", -2, None]
