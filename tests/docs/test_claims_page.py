"""The page on the paper's findings says what `benchmarks/bench_claims.py` measured, figure by figure."""

import ast
import json
import re
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "measured"
NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
FIGURE = re.compile(r"(\d+(?:\.\d+)?) \[(\d+(?:\.\d+)?), (\d+(?:\.\d+)?)\]")


def shown(row, percent):
    values = (row.value, row.ci_low, row.ci_high)
    return tuple(f"{100 * v:.0f}" if percent else f"{v:.2f}" for v in values)


def page():
    """The page's text in one line, so that sentences may be broken anywhere."""
    return " ".join((ROOT / "docs" / "results" / "claims.md").read_text(encoding="utf-8").split())


def claims(table):
    """Rows of one table of the measured file."""
    frame = pd.read_csv(MEASURED / "claims.csv")
    return frame[frame["table"] == table]


def whole(value):
    return f"{100 * value:.0f}"


def interval(row, percent=True):
    value, low, high = shown(row, percent)
    return f"{value} % [{low}, {high}]" if percent else f"{value} [{low}, {high}]"


def apart(one, other):
    """Whether two intervals have no point in common."""
    return (one["ci_high"] < other["ci_low"]) | (other["ci_high"] < one["ci_low"])


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


def test_the_answer_counts_the_verdicts():
    verdicts = [cells[1] for cells in rows_of((ROOT / "docs" / "results" / "claims.md").read_text(encoding="utf-8"), "finding of the paper")]  # fmt: skip
    counts = [sum(verdict.startswith(kind) for verdict in verdicts) for kind in ("Yes", "In part", "No")]
    assert sum(counts) == len(verdicts) == 6
    hold, part, fail = (NUMBERS[n] for n in counts)
    assert f"**Answer.** {hold.capitalize()} hold, {part} hold in part, {fail} do not." in page()
    assert verdicts[:4] == ["No", "In part", "In part", "No"]


def test_what_was_measured_on_how_many():
    """Sizes and settings that the page gives are those of the file and of the script."""
    text, frame = page(), pd.read_csv(MEASURED / "claims.csv")
    n = {name: set(rows["n"]) for name, rows in frame.groupby("table")}
    of = {name: set(rows["n"]) for name, rows in frame.groupby("of")}
    assert n["places"] == {24} and "(24 pairs per set)" in text
    assert (of["attacks"], of["benign"] - {96}) == ({72}, {192})
    assert "(72 attacks of the three channels of the fit, validation split, 24 items)" in text
    assert "benign requests that are still answered rightly (192)" in text
    assert n["separability"] == {144 + 192} and "Attacks of the fit (144) against benign requests (192)" in text
    assert n["told by"] == {946, 80} and "(n = 946)" in text and "(n = 80)" in text
    assert "AUC in per cent after block 4:" in text
    script = (ROOT / "benchmarks" / "bench_claims.py").read_text(encoding="utf-8")
    layers, rank, alpha = ast.literal_eval(re.search(r"^LAYERS, RANK, ALPHA = (.*)$", script, re.M).group(1))
    assert n["modalities"] == {28, 96}
    assert (
        f"CARE on blocks {layers[0]} to {layers[-1]}, rank {rank}, strength {alpha}, test split, 28 per channel (96 benign requests)"
        in text
    )


def test_sentences_about_the_scan_hold():
    """Above block 0 one skip, that of blocks 6 and 7, and one component, the attention of block 7, are apart from the model as it is."""
    text, scan = page(), claims("skipped")
    attacks, benign = (scan[scan["of"] == of].set_index("where") for of in ("attacks", "benign"))
    base = attacks.loc["nothing"]
    assert attacks.loc["block 0", "value"] == benign.loc["block 0", "value"] == 0
    assert (
        "Without block 0 the model answers nothing" in text and "Of the single components above block 0, only" in text
    )
    pairs, skips = ([f"block {k}" for k in range(1, end)] for end in (5, 8))
    least, late = whole(attacks.loc[pairs, "value"].min()), attacks.loc["block 6"]
    assert f"any two neighbouring blocks from 1 to 5 are, at least {least} % do." in text
    assert f"Any two neighbouring blocks from 1 to 5 can be skipped, and at least {least} % of the attacks still succeed." in text  # fmt: skip
    assert f"When they are skipped, {whole(late.value)} % of the attacks still succeed" in text
    assert f"Without blocks 6 and 7, {interval(late)} do. This is the only skip above block 0 whose interval is apart from that of the model as it is" in text  # fmt: skip
    assert [where for where in skips if apart(attacks.loc[where], base)] == ["block 6"]
    assert attacks.loc[skips, "value"].idxmin() == "block 6"
    assert "of all skips above block 0 that of blocks 6 and 7 stops the most attacks." in text
    assert "Skipping blocks 6 and 7, after which the classes are furthest apart, stops more attacks than any other skip above block 0." in text  # fmt: skip
    five, seven = (whole(attacks.loc[where, "value"]) for where in ("block 5", "block 7"))
    assert five == seven and f"without blocks 5 and 6, and without block 7 alone, {five} % succeed" in text
    cost = {k: whole(benign.loc["nothing", "value"] - benign.loc[f"block {k}", "value"]) for k in (6, 7)}
    assert f"The skip of blocks 6 and 7 also costs {cost[6]} points of right benign answers." in text
    assert f"That of block 7 alone costs {cost[7]}, and stops {whole(base.value - attacks.loc['block 7', 'value'])} % of the attacks." in text  # fmt: skip
    assert all(apart(benign.loc[f"block {k}"], benign.loc["nothing"]) for k in cost)
    single = attacks.loc[[f"hook_{part}_out {k}" for part in ("attn", "mlp") for k in range(1, 8)]].sort_values("value")
    assert single.index[:2].tolist() == ["hook_attn_out 7", "hook_mlp_out 7"]
    assert [name for name, row in single.iterrows() if apart(row, base)] == ["hook_attn_out 7"]
    first, second, right = single.iloc[0], single.iloc[1], benign.loc["hook_attn_out 7"]
    assert f"only the attention of block 7 has an interval apart from that of the model as it is ({interval(first)} of the attacks, {interval(right)} right benign answers); its MLP comes next ({interval(second)})" in text  # fmt: skip


def test_sentences_about_the_card_hold():
    """Which MLPs carry the refusal, and that no component above block 0 but the attention of block 7 moves an attack."""
    text = page()
    rows = json.loads((MEASURED / "card.json").read_text(encoding="utf-8"))["depth"]
    moved = {(channel, part, layer): after for channel, part, layer, _, after in rows if layer > 0}
    plain = {key[1:]: after for key, after in moved.items() if key[0] == "plain, refused"}
    assert [*plain] == [("hook_mlp_out", k) for k in (1, 2, 3)]
    assert "Refusals of plain requests are carried by blocks 1 to 3" in text
    assert "the MLPs that carry refusals are in blocks 1 to 3, where the measures are low." in text
    assert "blocks 1 to 3, whose MLPs carry the refusal, are among those with the lowest measures." in text
    assert "no attention above block 0 and no MLP of blocks 4 to 7 changes that by 20 points" in text
    told = [after.replace(" [", " % [") for after in plain.values()]
    assert f"plain requests are refused in {told[0]} (MLP of block 1), {told[1]} (block 2) and {told[2]} (block 3) instead of 100 %" in text  # fmt: skip
    assert {before for name, *_, before, _ in rows if name == "plain, refused"} == {100}
    rest = {key: after for key, after in moved.items() if key[0] != "plain, refused"}
    assert [*rest] == [("wrapper, complied", "hook_attn_out", 7)]
    assert "no component above block 0 changes typographic or spelled attacks by 20 points" in text
    (after,) = rest.values()
    assert after == "0 [0, 6]" and "no wrapped request succeeds with that attention replaced (0 % [0, 6])" in text


def test_sentences_about_the_demonstration_hold():
    text, frame = page(), pd.read_csv(MEASURED / "readme.csv")
    asr = frame[frame.metric == "asr"].pivot(index="channel", columns="defence", values="value").mul(100).round()
    seen, worst = ["typographic", "wrapper", "spelled"], ["typographic+indirect", "split"]
    attacks = [c for c in asr.index if asr.loc[c, "none"] > 50 and not c.startswith("gradient")]
    others = [c for c in attacks if c not in seen + worst]
    assert {*asr.index} - {*attacks} == {"plain", "plain+neutral", "second turn"} | {
        c for c in asr.index if c.startswith("gradient")
    }
    care = asr["care_lens"]
    (a, b), (c, d) = ((f"{care[part].min():.0f}", f"{care[part].max():.0f}") for part in (seen, others))
    e, f = (f"{care[channel]:.0f}" for channel in worst)
    assert care[worst].min() > care[others].max()
    assert f"leaves {a} to {b} % of the three channels of the fit, and {c} to {d} % of {NUMBERS[len(others)]} others, but {e} % of the pictured items that stand for their twins and {f} % of those that are split between text and picture." in text  # fmt: skip
    benign = frame[frame.metric == "accuracy"]
    before, after = (
        f"{100 * (own.value * own.n).sum() / own.n.sum():.1f}"
        for own in (benign[benign.defence == name] for name in ("none", "care_lens"))
    )
    assert f"| Utility is kept. | Yes | Right answers fall from {before} to {after} %. |" in text
    published = asr["published CARE"]
    assert asr.loc["plain", "none"] == 0 and published[seen].nunique() == 1
    assert f"At the setting chosen for the demonstration's table, {published['plain']:.0f} % of the plain requests are answered, and {published['typographic']:.0f} % of the attacks of the fit still succeed" in text  # fmt: skip
    own = pd.read_csv(MEASURED / "defences_balanced.csv").query("defence == 'published CARE' and metric == 'asr'")
    own = {row.channel: interval(row) for row in own.itertuples()}
    assert f"it changes neither: {own['plain requests']} of the plain requests and {own['seen attacks']} of the attacks of the fit" in text  # fmt: skip


def test_sentences_about_places_hold():
    """Above block 0 one site has more than half of an effect; spelled and typographic items act through the MLPs of blocks 1 to 3."""
    text, places = page(), claims("places")
    for pairs, own in places.groupby("of"):
        assert own.set_index("where").loc["blocks.0.hook_attn_out", "value"] > 0.99, pairs
    places = places[~places["where"].str.startswith("blocks.0.")]
    most = places[places["value"] > 1 / 2]
    assert most[["of", "where"]].to_numpy().tolist() == [["wrapper", "blocks.7.hook_attn_out"]]
    assert "The attention of block 0 carries everything that differs" in text
    assert "Only the wrapper has a later site with more than half of the effect, the attention of block 7. Spelled and pictured items are told from named ones by the MLPs of blocks 1 to 3, none of which has half of the effect." in text  # fmt: skip
    assert "| pairs | attention of block 0 | MLP of block 0 | the first three above block 0 |" in text
    assert "Above block 0, spelled and pictured items act through the MLPs of blocks 1 to 3" in text
    for pairs in ("typographic", "spelled"):
        first = places[places["of"] == pairs].sort_values("value", ascending=False).head(3)
        assert {*first["where"]} == {f"blocks.{k}.hook_mlp_out" for k in (1, 2, 3)}, pairs
        assert (first["ci_high"] < 1 / 2).all()
    largest = {
        (pairs, part): own.loc[own["value"].idxmax()]
        for (pairs, part), own in places.groupby(["of", places["where"].str.extract(r"hook_(\w+)_out")[0]])
    }
    at = {key: f"{row.value:.2f}" for key, row in largest.items()}
    for pairs in ("typographic", "wrapper", "spelled", "picture"):
        assert apart(largest[pairs, "mlp"], largest[pairs, "attn"]), pairs
        assert (largest[pairs, "mlp"].value > largest[pairs, "attn"].value) == (pairs != "wrapper"), pairs
    told = ("typographic pairs ({} against {})", "spelled ({} against {})", "picture ({} against {}), and less for the wrapper ({} against {})")  # fmt: skip
    wanted = ", ".join(told[:2]) + " and " + told[2]
    sets = ("typographic", "spelled", "picture", "wrapper")
    figures = [at[pairs, part] for pairs in sets for part in ("mlp", "attn")]
    assert f"Above block 0 the largest MLP carries more than the largest attention for {wanted.format(*figures)}; in all four sets the two intervals are apart." in text  # fmt: skip
    mlp, attention = (max(at[pairs, part] for pairs in ("typographic", "spelled")) for part in ("mlp", "attn"))
    assert f"(each at most {mlp} of the effect, an attention at most {attention}), a wrapper through the attention of block 7 ({at['wrapper', 'attn']}, an MLP at most {at['wrapper', 'mlp']})" in text  # fmt: skip


def test_sentences_about_separability_hold():
    """After block 7 all measures are largest, apart from those after blocks 0 to 4 and not from those after 5 and 6."""
    text, rows = page(), claims("separability")
    assert (
        "| after block | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 |" in text and "All measures are largest after block 7," in text
    )
    assert rows["measure"].nunique() == 4
    for measure, own in rows.groupby("measure"):
        own = own.set_index("where")
        last = own.loc["block 7"]
        assert own["value"].idxmax() == "block 7", measure
        assert [apart(own.loc[f"block {k}"], last) for k in range(7)] == [True] * 5 + [False] * 2, measure
        assert {*own["value"].sort_values().index[:4]} == {f"block {k}" for k in range(4)}, measure
    assert "Their intervals after block 7 are apart from those after blocks 0 to 4, and overlap those after blocks 5 and 6." in text  # fmt: skip
    probe = rows[(rows["measure"] == "probe_auc") & (rows["where"] == "block 0")]["value"].item()
    assert f"the probe is at {probe:.2f} after block 0 already".replace("0.", ".", 1) in text


def test_sentences_about_the_two_modalities_hold():
    """As published no edit is apart from the undefended model; without the faults the textual edit does all, the visual one nothing."""
    text = page()
    rates = claims("modalities").pivot(index="of", columns="where")
    none = rates.xs("undefended", axis=1, level=1)
    edits = ("both", "visual alone", "textual alone")
    published = {edit: rates.xs(f"published CARE, {edit}", axis=1, level=1) for edit in edits}
    for edit, at in published.items():
        assert not apart(at, none).drop(index="benign").any(), edit
    channels = NUMBERS[len(none) - 1]
    assert f"in none of the {channels} channels is the interval apart from that of the undefended model." in text
    assert [edit for edit, at in published.items() if apart(at, none)["benign"]] == ["visual alone"]
    cost = whole((none["value"] - published["visual alone"]["value"])["benign"])
    assert f"The visual edit alone costs {cost} points of right answers." in text
    neutral = [at.loc["plain+neutral"] for at in (none, *published.values())]
    assert [row["value"] for row in neutral] == [0] * 4
    assert f"none of the {neutral[0]['n']:.0f} plain requests in a neutral context is answered, with either edit or both." in text  # fmt: skip
    value = rates["value"]
    assert value["CARE, sound, both"].equals(value["CARE, sound, textual alone"].rename("CARE, sound, both"))
    attacks = value.drop(index="benign")
    assert (attacks["CARE, sound, textual alone"] == 0).all()
    assert attacks["CARE, sound, visual alone"].ge(attacks["undefended"]).all()  # it stops no attack
    cost = whole((value["undefended"] - value["CARE, sound, textual alone"])["benign"])
    assert f"the textual edit stops all attacks, and it costs {cost} points of right answers; the visual edit adds nothing to it." in text  # fmt: skip
