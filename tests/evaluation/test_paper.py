import re

import numpy as np
import pandas as pd
import pytest

from care_lens.evaluation import DefenceTable, compare, paper_table


def table(rates, *, channels=("figstep", "jail_break"), n=60, metric="asr", missing=0, extra=()):
    rows = []
    for name, rate in rates.items():
        for channel in channels:
            for i in range(n):
                value = float("nan") if i < missing else float(i < rate * n)
                rows.append((name, channel, metric, "words", 0, str(i), f"g{i}", value))
    columns = ["defence", "channel", "metric", "judge", "seed", "id", "group", "value"]
    trials = pd.concat([pd.DataFrame(rows, columns=columns), *extra])
    return DefenceTable.from_trials(trials, settings={}, n_boot=20, max_missing=0.1)


@pytest.fixture(scope="module")
def measured():
    return table({"none": 0.9, "CARE & co": 0.1, "half_way": 0.15})


def cells(line):
    return [cell.strip() for cell in line.removesuffix("\\\\").split(" & ")]


def test_latex_in_the_papers_layout(measured):
    text = paper_table(
        {"LLaVA_1.5": measured, "Qwen": measured},
        against="none",
        names={"half_way": "Half 50%"},
        channels={"jail_break": "JailBreakV", "figstep": "FigStep #1"},
        quoted={"Qwen": {"SPO-VLM": {"jail_break": 10.37}}},
    )
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("\\")][:1] == ["\\begin{table}[t]"]
    assert lines.count("\\toprule") == lines.count("\\bottomrule") == 1 and lines.count("\\midrule") == 2
    head = cells(next(line for line in lines if line.startswith("Method")))
    assert head == ["Method", "JailBreakV $\\downarrow$", "FigStep \\#1 $\\downarrow$"]
    assert "\\multicolumn{3}{l}{\\textit{LLaVA\\_1.5}} \\\\" in lines
    none, care, half = [cells(line) for line in lines if re.match(r"none|CARE|Half", line)][:3]
    assert none[0] == "none" and none[1].startswith("90.0 {\\scriptsize [") and "dagger" not in none[1]
    assert care[0] == "CARE \\& co" and care[1].startswith("\\textbf{10.0}$^\\dagger$ {\\scriptsize [")
    # 3 of 60 pairs tell the two apart: neither is significantly better, so that both are bold.
    assert half[0] == "Half 50\\%" and half[1].startswith("\\textbf{15.0}$^\\dagger$")
    assert cells(next(line for line in lines if line.startswith("SPO"))) == ["SPO-VLM (quoted)", "10.37", "--"]
    caption = next(line for line in lines if line.startswith("\\caption"))
    for part in (
        "clopper-pearson",
        "n = 60 a cell",
        "Judge: words",
        "$^\\dagger$: differs from none",
        "Quoted",
        "95 \\%",
    ):
        assert part in caption
    assert not re.search(r"(?<!\\)[%&#_]", caption)
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")


def test_every_letter_that_latex_would_take_for_a_command_is_escaped(measured):
    nasty = r"a\b{c}$d^e~f_g#h%i&j<k|l"
    text = paper_table(measured, names={"none": nasty})
    line = next(line for line in text.splitlines() if line.startswith("a"))
    expected = r"a\textbackslash{}b\{c\}\$d\textasciicircum{}e\textasciitilde{}f\_g\#h\%i\&j\textless{}k\textbar{}l"
    assert line.startswith(expected + " & ")


def test_markdown_has_the_same_cells(measured):
    text = paper_table(measured, form="markdown", against="none", intervals=False, digits=0)
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["Method", "figstep \u2193", "jail_break \u2193"]
    assert rows[2] == ["none", "90", "90"] and rows[3] == ["CARE & co", "**10**\u2020", "**10**\u2020"]
    assert "intervals" not in text and "| a\\|b |" in paper_table(measured, form="markdown", names={"none": "a|b"})


def test_bold_means_that_nobody_is_significantly_better(measured):
    clear = paper_table(table({"none": 0.9, "good": 0.5, "best": 0.1}), form="markdown", intervals=False)
    assert clear.count("**") == 4  # one defence in two columns
    alike = paper_table(table({"a": 0.5, "b": 0.52}), form="markdown", intervals=False)
    assert alike.count("**") == 8
    higher = table({"a": 0.2, "b": 0.9}, metric="accuracy")
    text = paper_table(higher, form="markdown", metrics=("accuracy",), intervals=False)
    assert "**90.0**" in text and "**20.0**" not in text and "\u2191" in text
    assert "**" not in paper_table(table({"only": 0.2}), form="markdown")


def test_utility_stands_beside_safety_and_what_is_not_there_is_a_dash():
    extra = table({"none": 0.8}, channels=("mmbench",), metric="accuracy").trials
    both = table({"none": 0.9, "mine": 0.1}, extra=[extra])
    text = paper_table(both, form="markdown", metrics=("asr", "accuracy"))
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert rows[0][1:] == ["figstep (ASR) \u2193", "jail_break (ASR) \u2193", "mmbench (right) \u2191"]
    assert rows[3][0] == "mine" and rows[3][3] == "\u2013"


def test_a_defence_without_a_channel_has_a_dash():
    """It is compared, and ranked, where it has trials."""
    parts = [
        table({name: rate}, channels=channels).trials
        for name, rate, channels in (("x", 0.1, ["a"]), ("y", 0.2, ["b"]), ("w", 0.5, ["c"]))
    ]
    parts.append(table({"x": 0.9}, channels=["a"], metric="retained").trials)
    made = table({"none": 0.9}, channels=["a", "b"], extra=parts)
    text = paper_table(
        made, form="markdown", against="none", intervals=False, digits=0, metrics=("asr", "retained"), quoted=None
    )
    rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:6]]
    assert rows == [
        ["none", "90", "90", "\u2013", "\u2013"],
        ["x", "**10**\u2020", "\u2013", "\u2013", "90"],
        ["y", "\u2013", "**20**\u2020", "\u2013", "\u2013"],
        ["w", "\u2013", "\u2013", "50", "\u2013"],
    ]
    assert [tuple(row) for row in made.compare("none")[["channel", "first"]].to_numpy()] == [("a", "x"), ("b", "y")]
    ranks = made.rank().set_index(["channel", "defence"])["rank_best"].to_dict()
    assert ranks == {("a", "x"): 1, ("a", "none"): 2, ("b", "y"): 1, ("b", "none"): 2, ("c", "w"): 1}
    with pytest.raises(ValueError, match="two defences must have trials of 'asr' in one channel"):
        compare(pd.concat(parts[:2]), against="x")


def test_missing_answers_are_counted_in_the_caption():
    text = table({"none": 0.9, "mine": 0.1}, missing=3).to_latex(against="none")
    assert "n = 57 a cell; missing: 12" in text


def test_ranks_and_comparisons_are_methods_of_the_table(measured):
    found = measured.compare("none")
    assert set(found["first"]) == {"CARE & co", "half_way"} and (found["p_holm"] < 0.001).all()
    ranks = measured.rank().set_index(["channel", "defence"])
    assert ranks.loc[("figstep", "none"), "rank_best"] == 3
    assert np.isclose(measured.difference("CARE & co", "none", metric="asr")["value"], -0.8).all()


def test_what_cannot_be_printed_is_named(measured):
    second = measured.trials.assign(judge="other")
    several = DefenceTable.from_trials(pd.concat([measured.trials, second]), settings={}, n_boot=20)
    for tables, options, message in (
        (several, {}, "one judge and one seed, got 2"),
        (measured, {"metrics": ("kl",)}, "metrics must be some of"),
        (measured, {"metrics": "asr"}, "lists of names"),
        (measured, {"channels": ["x", "figstep"]}, r"got \['x'\]"),
        (measured, {"quoted": {"Qwen": {}}}, r"models in the table, some of \[''\], got \['Qwen'\]"),
        (measured, {"quoted": {"": {"SPO": {"x": 1.0}}}}, r"channels in the table, got \['x'\]"),
        (measured, {"against": "nobody"}, "against must be"),
        ({}, {}, "one table or more"),
    ):
        with pytest.raises(ValueError, match=message):
            paper_table(tables, **options)


@pytest.mark.parametrize("significance", [0.0, 5.0, float("nan")])
def test_a_significance_that_is_no_probability_is_refused_where_no_side_is_better(significance):
    """The ranks, which check it, are not asked of refusals; every cell was marked, at 500 %."""
    with pytest.raises(ValueError, match="significance must be between 0 and 1"):
        paper_table(
            table({"none": 0.5, "mine": 0.5}, metric="refusal"),
            metrics=("refusal",),
            against="none",
            significance=significance,
        )
