"""The page on the paper's findings says what `benchmarks/bench_claims.py` measured, figure by figure."""

import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
FIGURE = re.compile(r"(\d+(?:\.\d+)?) \[(\d+(?:\.\d+)?), (\d+(?:\.\d+)?)\]")


def shown(row, percent):
    values = (row.value, row.ci_low, row.ci_high)
    return tuple(f"{100 * v:.0f}" if percent else f"{v:.2f}" for v in values)


def rows_of(text, first):
    """Cells of the table whose heading begins so."""
    lines = text[text.index(f"| {first} |") :].splitlines()
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_figure_of_the_tables_is_measured():
    text = (ROOT / "docs" / "results" / "claims.md").read_text(encoding="utf-8")
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    part = {name: rows for name, rows in frame.groupby("table")}

    def at(table, of, where, percent=True):
        (row,) = part[table][(part[table]["of"] == of) & (part[table]["where"] == where)].itertuples()
        return shown(row, percent)

    for block, *cells in rows_of(text, "block"):
        if block == "none":
            wheres = ["nothing"] * 4
        else:
            k = block.split()[0]
            wheres = [f"block {k}", f"block {k}", f"hook_attn_out {k}", f"hook_mlp_out {k}"]
        for cell, where, of in zip(cells, wheres, ("attacks", "benign", "attacks", "attacks"), strict=True):
            assert FIGURE.fullmatch(cell).groups() == at("skipped", of, where), (block, cell)
    for pairs, attention, mlp, after in rows_of(text, "pairs"):
        assert FIGURE.fullmatch(attention).groups() == at("places", pairs, "blocks.0.hook_attn_out", percent=False)
        assert FIGURE.fullmatch(mlp).groups() == at("places", pairs, "blocks.0.hook_mlp_out", percent=False)
        told = [(kind, int(layer)) for kind, layer in re.findall(r"(attention|MLP) (\d) ", after)]
        names = [f"blocks.{k}.hook_{'attn' if kind == 'attention' else 'mlp'}_out" for kind, k in told]
        ranked = part["places"][part["places"]["of"] == pairs].sort_values("value", ascending=False)["where"]
        assert [name for name in ranked if not name.startswith("blocks.0.")][:3] == names
        assert FIGURE.findall(after) == [at("places", pairs, name, percent=False) for name in names]
    measures = {"silhouette": "silhouette", "Fisher ratio": "fisher", "Mahalanobis distance": "mahalanobis", "probe, AUC": "probe_auc"}  # fmt: skip
    for name, *cells in rows_of(text, "after block"):
        values = part["separability"][part["separability"]["measure"] == measures[name]]["value"].tolist()
        assert [cell.strip("*") for cell in cells] == [f"{value:.2f}" for value in values]
        if "**" in "".join(cells):
            assert cells[max(range(8), key=values.__getitem__)].startswith("**")
    for tokens, *cells in rows_of(text, "tokens"):
        kind = {"image": "image tokens", "text": "text tokens", "last": "last tokens"}[tokens.split()[0]]
        for cell, of in zip(cells, ("all channels", "pictured requests for steps"), strict=True):
            assert FIGURE.fullmatch(cell).groups() == at("told by", f"{kind}, {of}", "block 4")
    edits = {"none": "undefended", "both, without the faults of the published code": "CARE, sound, both"}
    channels = ("typographic", "wrapper", "spelled", "typographic+indirect", "benign")
    for edit, *cells in rows_of(text, "edit"):
        for cell, channel in zip(cells, channels, strict=True):
            where = edits.get(edit, f"published CARE, {edit}")
            assert FIGURE.fullmatch(cell).groups() == at("modalities", channel, where), (edit, channel)


def test_sentences_about_the_least_and_the_none_hold():
    """Above block 0 no other skip stops more than 5 and 6 or 6 and 7; without its faults no form of CARE lowers attack success."""
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    skipped = frame[(frame["table"] == "skipped") & (frame["of"] == "attacks")].set_index("where")["value"]
    above = skipped[[f"block {k}" for k in range(1, 8)]]
    assert {*above.nsmallest(2).index} == {"block 5", "block 6"} and skipped["block 0"] == 0
    rates = frame[(frame["table"] == "modalities") & (frame["measure"] == "asr")]
    by = rates.pivot(index="of", columns="where", values="value")
    sound = by.filter(like="CARE, sound")
    assert sound.shape[1] == 3 and sound.ge(by["undefended"], axis=0).all(axis=None)
