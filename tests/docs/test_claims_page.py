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
    """Above block 0 no skip is apart from the model as it is, and one component alone moves attack success by more than 8 points."""
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    scan = frame[frame["table"] == "skipped"]
    attacks, benign = (scan[scan["of"] == of].set_index("where") for of in ("attacks", "benign"))
    base = attacks.loc["nothing"]
    blocks = attacks.loc[[f"block {k}" for k in range(1, 8)]]
    assert attacks.loc["block 0", "value"] == 0
    assert round(100 * blocks["value"].min()) == 92 and (blocks["ci_high"] >= base["ci_low"]).all()
    assert round(72 * blocks.loc["block 6", "value"]) == 71 and blocks.loc["block 7", "value"] == 1
    assert round(100 * (benign.loc["nothing", "value"] - benign.loc[blocks.index, "value"].min())) == 21
    single = attacks.loc[[f"hook_{part}_out {k}" for part in ("attn", "mlp") for k in range(1, 8)], "value"]
    assert single[single < base["value"] - 0.085].index.tolist() == ["hook_attn_out 7"]


def test_sentences_about_the_present_weights_hold():
    rows = json.loads((ROOT / "benchmarks" / "measured" / "card.json").read_text())["depth"]
    plain = {(part, layer): after.split()[0] for name, part, layer, _, after in rows if name == "plain, refused"}
    assert [plain["hook_mlp_out", k] for k in (1, 2, 3)] == ["45", "34", "27"]
    assert max(layer for _, layer in plain) == 3
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "readme.csv")
    asr = frame[frame.metric == "asr"].pivot(index="channel", columns="defence", values="value").mul(100).round()
    seen = asr.loc[["typographic", "wrapper", "spelled"]]
    held = asr.loc[["indirect", "typographic+wrapper", "spelled+wrapper", "typographic+indirect", "typographic free", "second turn", "typographic second turn"]]  # fmt: skip
    for part, (least, most) in ((seen, (0, 4)), (held, (0, 16))):
        assert (part["care_lens"].min(), part["care_lens"].max()) == (least, most)
    assert asr.loc["split", "care_lens"] == 54
    assert asr.loc["plain", ["none", "published CARE"]].tolist() == [0, 70]
    assert (seen["published CARE"] == 96).all()


def test_sentences_about_places_hold():
    """Above block 0 one carrier has more than half of an effect; of spelled and pictured items none has more than a third."""
    frame = pd.read_csv(ROOT / "benchmarks" / "measured" / "claims.csv")
    places = frame[(frame["table"] == "places") & ~frame["where"].str.startswith("blocks.0.")]
    most = places[places["value"] > 1 / 3]
    assert (
        most[["of", "where"]].to_numpy().tolist() == [["wrapper", "blocks.7.hook_attn_out"]]
        and most["value"].item() > 0.5
    )


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
        assert (at["ci_high"] >= none["ci_low"]).all() and (at["ci_low"] <= none["ci_high"]).all()
    value = frame[frame["table"] == "modalities"].pivot(index="of", columns="where", values="value")
    neutral = (100 * value.loc["plain+neutral"]).round()
    assert [neutral["undefended"], *(neutral[f"published CARE, {edit}"] for edit in edits)] == [0, 25, 61, 0]
    assert value["CARE, sound, both"].equals(value["CARE, sound, textual alone"].rename("CARE, sound, both"))
    attacks = value.drop(index="benign")
    assert (attacks["CARE, sound, textual alone"] == 0).all()
    assert attacks["CARE, sound, visual alone"].ge(attacks["undefended"]).all()
    assert round(100 * (value["undefended"] - value["CARE, sound, textual alone"])["benign"]) == 42
