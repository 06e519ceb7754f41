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


def test_the_table_of_ten_defences_is_that_of_the_runs_it_names():
    page = (ROOT / "docs/results/defences.md").read_text(encoding="utf-8")
    text = (ROOT / "tutorials/ten_defences.py").read_text(encoding="utf-8")
    page = page.split("## An earlier run")[0]
    names = {"safety tuning (LoRA)": "safety tuning", "the repair": "the repair (12 settings, as the others)"}
    rows = re.findall(r"^# \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]*\|$", text, re.M)
    rows = [row for row in rows if row[0] not in ("defence", "---")]
    assert len(rows) == 12
    for name, seen, held_out, right in rows:
        found = next(line.split(" | ") for line in page.splitlines() if line.startswith(f"| {names.get(name, name)} |"))
        assert [found[1], found[2], found[4]] == [seen, held_out, right], name
