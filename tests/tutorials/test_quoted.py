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


def test_what_is_quoted_of_published_care_is_on_the_results_page():
    page = (ROOT / "docs/results/defences.md").read_text(encoding="utf-8")
    text = (ROOT / "tutorials/subspace_geometry.py").read_text(encoding="utf-8").replace("\n#", "")
    seen = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in page.splitlines() if row.startswith("| ")}
    rows = ("published CARE", "published CARE without foreign_site", "CARE, sound", "undefended")
    sentence = text[text.index("Does the fault help?") : text.index("(quoted from")]
    quoted = re.findall(r"(\d+) % (\[\d+, \d+\])", sentence)
    assert [f"{value} {interval}" for value, interval in quoted] == [seen[row] for row in rows]
