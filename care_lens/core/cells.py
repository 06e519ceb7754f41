"""Cells of csv files that a spreadsheet must not take for a formula.

A text that begins with = + - @ or with a tab or a line end is a formula to spreadsheets, and may be an answer of a model or a name that a
user gave. :func:`defused` puts an apostrophe before it, as spreadsheets themselves do, and before a text that looks like one which was
defused; :func:`restored` takes it away again, so that reading gives back every text. Numbers stay numbers.

    path.write_text(csv_text(frame))
    frame = restored(pd.read_csv(path))
"""

import csv
import re
from collections.abc import Callable
from typing import Any

import pandas as pd
from pandas.api.types import is_numeric_dtype

_ARMED = re.compile(r"'*[=+\-@\t\r\n]")
_DEFUSED = re.compile(r"'+[=+\-@\t\r\n]")


def defused(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with an apostrophe before texts, and names of columns, that a spreadsheet would take for a formula.

    Example:
        >>> frame = pd.DataFrame({"text": ["=1+1", "one"], "value": [-1.0, 2.0]})
        >>> defused(frame)["text"].tolist(), restored(defused(frame)).equals(frame)
        (["'=1+1", 'one'], True)
    """
    return _each(frame, defused_text)


def csv_text(frame: pd.DataFrame) -> str:
    """A frame as csv without its index, texts defused, line feeds as line ends.

    Where a text holds a carriage return all texts are in quotes: pandas writes it bare otherwise, and reads the end of a row there.
    """
    returns = any(
        isinstance(cell, str) and "\r" in cell
        for position, dtype in enumerate(frame.dtypes)
        if not is_numeric_dtype(dtype)
        for cell in frame.iloc[:, position]
    )
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    return defused(frame).to_csv(index=False, lineterminator="\n", quoting=quoting)


def defused_text(text: str) -> str:
    """One text as :func:`defused` writes it."""
    return f"'{text}" if _ARMED.match(text) else text


def restored(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame that was defused; texts that were not are as they are."""
    return _each(frame, lambda cell: cell[1:] if _DEFUSED.match(cell) else cell)


def _each(frame: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    def cell(value: Any) -> Any:
        return change(value) if isinstance(value, str) else value

    made = frame.copy()
    for position, dtype in enumerate(frame.dtypes):
        if not is_numeric_dtype(dtype):
            values = [cell(value) for value in frame.iloc[:, position]]
            made.isetitem(position, pd.Series(values, index=frame.index, dtype=object).astype(_kept(dtype)))
    made.columns = pd.Index([cell(name) for name in frame.columns], name=frame.columns.name)
    return made


def _kept(dtype: Any) -> Any:
    """The dtype of a changed column: a category's values are others."""
    return object if isinstance(dtype, pd.CategoricalDtype) else dtype
