"""The page on the paper's findings says what `benchmarks/bench_claims.py` measured, figure by figure."""

import json
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
    faultless = ", without the faults of the published code"
    channels = ("typographic", "wrapper", "spelled", "typographic+indirect", "benign")
    for edit, *cells in rows_of(text, "edit"):
        kind = "CARE, sound" if edit.endswith(faultless) else "published CARE"
        where = "undefended" if edit == "none" else f"{kind}, {edit.removesuffix(faultless)}"
        for cell, channel in zip(cells, channels, strict=True):
            assert FIGURE.fullmatch(cell).groups() == at("modalities", channel, where), (edit, channel)


def test_sentences_about_the_scan_hold():
    """Above block 0 attacks fall where block 6 or 7 is left out; of single components the attention of block 7 lowers them most."""
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    scan = frame[frame["table"] == "skipped"]
    attacks, benign = (scan[scan["of"] == of].set_index("where") for of in ("attacks", "benign"))
    base = attacks.loc["nothing"]
    assert attacks.loc["block 0", "value"] == 0
    early, late = ([f"block {k}" for k in some] for some in ((1, 2, 3, 4), (5, 6, 7)))
    assert round(100 * attacks.loc[early, "value"].min()) == 92
    assert (attacks.loc[late, "ci_high"] < attacks.loc[early, "value"].min()).all()
    assert attacks.loc[late, "value"].idxmin() == "block 6" and round(100 * attacks.loc["block 6", "value"]) == 46
    assert (attacks.loc["block 6", "ci_high"] < attacks.loc[["block 5", "block 7"], "ci_low"]).all()
    assert round(100 * (benign.loc["nothing", "value"] - benign.loc["block 6", "value"])) == 26
    single = attacks.loc[[f"hook_{part}_out {k}" for part in ("attn", "mlp") for k in range(1, 8)]].sort_values("value")
    assert single.index[:2].tolist() == ["hook_attn_out 7", "hook_mlp_out 7"]
    assert [round(100 * value) for value in single["value"].iloc[:2]] == [61, 88]
    assert single["ci_high"].iloc[0] < base["ci_low"] < single["ci_high"].iloc[1]
    assert round(100 * benign.loc["hook_attn_out 7", "value"]) == 92


def test_sentences_about_the_demonstration_and_the_card_hold():
    rows = json.loads((ROOT / "benchmarks" / "measured" / "card.json").read_text())["depth"]
    plain = {(part, layer): after.split()[0] for name, part, layer, _, after in rows if name == "plain, refused"}
    assert [plain["hook_mlp_out", k] for k in (1, 2, 3)] == ["45", "34", "27"]
    assert max(layer for _, layer in plain) == 3
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "readme.csv")
    asr = frame[frame.metric == "asr"].pivot(index="channel", columns="defence", values="value").mul(100).round()
    seen = asr.loc[["typographic", "wrapper", "spelled"]]
    held = asr.loc[["indirect", "typographic+wrapper", "spelled+wrapper", "typographic free", "second turn", "typographic second turn"]]  # fmt: skip
    for part, (least, most) in ((seen, (0, 5)), (held, (2, 9))):
        assert (part["care_lens"].min(), part["care_lens"].max()) == (least, most)
    assert asr.loc[["typographic+indirect", "split"], "care_lens"].tolist() == [41, 64]
    assert asr.loc["plain", ["none", "published CARE"]].tolist() == [0, 70]
    assert (seen["published CARE"] == 96).all()
    benign = frame[frame.metric == "accuracy"]
    right = [
        round(100 * (own.value * own.n).sum() / own.n.sum(), 1)
        for own in (benign[benign.defence == name] for name in ("none", "care_lens"))
    ]
    assert right == [98.8, 98.2]


def test_sentences_about_places_hold():
    """Above block 0 one carrier has more than half of an effect; spelled and typographic items act through the MLPs of blocks 1 to 3."""
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    places = frame[(frame["table"] == "places") & ~frame["where"].str.startswith("blocks.0.")]
    most = places[places["value"] > 1 / 2]
    assert most[["of", "where"]].to_numpy().tolist() == [["wrapper", "blocks.7.hook_attn_out"]]
    for pairs in ("typographic", "spelled"):
        first = places[places["of"] == pairs].sort_values("value", ascending=False)["where"].head(3)
        assert {*first} == {f"blocks.{k}.hook_mlp_out" for k in (1, 2, 3)}, pairs
    told = places[places["of"].isin(["typographic", "spelled"])]
    assert f"{told['value'].max():.2f}" == "0.43"


def test_sentences_about_the_two_modalities_hold():
    """As published no edit is apart from the undefended model; without the faults the textual edit does all, the visual one nothing."""
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    shown_channels = ["typographic", "wrapper", "spelled", "typographic+indirect", "benign"]
    rates = frame[(frame["table"] == "modalities") & frame["of"].isin(shown_channels)].pivot(
        index="of", columns="where"
    )
    none = rates.xs("undefended", axis=1, level=1)
    edits = ("both", "visual alone", "textual alone")
    for edit in edits:
        at = rates.xs(f"published CARE, {edit}", axis=1, level=1)
        attacked, then = at.drop(index="benign"), none.drop(index="benign")
        assert (attacked["ci_high"] >= then["ci_low"]).all() and (attacked["ci_low"] <= then["ci_high"]).all()
    cost = none["value"] - rates.xs("published CARE, visual alone", axis=1, level=1)["value"]
    assert round(100 * cost["benign"]) == 16 and round(100 * none["value"]["benign"]) == 98
    value = frame[frame["table"] == "modalities"].pivot(index="of", columns="where", values="value")
    neutral = (100 * value.loc["plain+neutral"]).round()
    assert [neutral["undefended"], *(neutral[f"published CARE, {edit}"] for edit in edits)] == [0, 0, 0, 0]
    assert value["CARE, sound, both"].equals(value["CARE, sound, textual alone"].rename("CARE, sound, both"))
    attacks = value.drop(index="benign")
    assert (attacks["CARE, sound, textual alone"] == 0).all()
    assert attacks["CARE, sound, visual alone"].ge(attacks["undefended"]).all()  # it stops no attack
    assert round(100 * (value["undefended"] - value["CARE, sound, textual alone"])["benign"]) == 41
