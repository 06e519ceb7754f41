"""Figures that tutorials quote from measured files are those of the files."""

import re
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


def test_the_table_of_all_plants_is_the_measured_one():
    measured = pd.read_csv(ROOT / "benchmarks/measured/localise.csv").query("dose == 1.0").set_index("plant")
    text = (ROOT / "tutorials/planted_truth.py").read_text(encoding="utf-8")
    columns = ("rank", "NIE alone", "TIE alone", "gradient alone", "integrated alone", "probe alone")
    rows = re.findall(r"^# \| (\w+_\d\w*) ((?:\| \d+ )+)\|$", text, re.M)
    quoted = {name: [float(value) for value in values.split("|")[1:]] for name, values in rows}
    assert quoted == {name: measured.loc[name, list(columns)].tolist() for name in measured.index}
    first = re.search(r"first, of 10\*\* ((?:\| \*\*\d+\*\* )+)", text)
    if first is None:
        pytest.fail("the table must end in a row that counts the plants found first")
    counted = [int(value) for value in re.findall(r"\d+", first.group(1))]
    assert counted == [int((measured[column] == 1).sum()) for column in columns]
