"""Tables of README and of the results pages are those of the measured files, cell by cell."""

from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "measured"


def tables(page, first):
    """Cells of the rows of every table whose heading begins so."""
    lines, found = (ROOT / page).read_text(encoding="utf-8").splitlines(), []
    for start, line in enumerate(lines):
        if line.startswith(f"| {first} |"):
            rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]]]
            for row in lines[start + 2 :]:
                if not row.startswith("|"):
                    break
                rows.append([cell.strip(" *") for cell in row.split("|")[1:-1]])
            found.append(rows)
    assert found, first
    return found


def cells_of(frame):
    """Percentages with intervals, by whatever is left of the index."""
    return {
        key: f"{100 * row['value']:.0f} [{100 * row['ci_low']:.0f}, {100 * row['ci_high']:.0f}]"
        for key, row in frame.iterrows()
    }


def read(name, *index):
    return cells_of(pd.read_csv(MEASURED / name).rename(columns={"asr": "value"}).set_index(list(index)))


def test_the_table_of_the_readme():
    measured = read("readme.csv", "defence", "channel", "metric")
    rows = pd.read_csv(MEASURED / "readme.csv")
    names = {
        "undefended": "none",
        "refusal direction (Arditi et al.)": "refusal direction",
        "difference of means (after CAA)": "difference of means, all tokens",
    }
    channels = {"typographic, second turn": "typographic second turn", "PGD, whole answer": "gradient: PGD, whole answer"}  # fmt: skip
    ((heading, *table),) = tables("README.md", "defence")
    assert len(table) == 7
    for name, *cells, right in table:
        defence = names.get(name, name)
        for channel, cell in zip(heading[1:-1], cells, strict=True):
            assert cell == measured[defence, channels.get(channel, channel), "asr"], (name, channel)
        own = rows[rows.defence == defence]
        benign = own[own.channel.isin(own[own.metric == "accuracy"].channel)]
        pooled = [
            100 * (part.value * part.n).sum() / part.n.sum()
            for part in (benign[benign.metric == metric] for metric in ("accuracy", "refusal"))
        ]
        assert right == f"{pooled[0]:.1f} ({pooled[1]:.1f})", name


def test_the_tables_of_the_seeds():
    measured = read("seeds.csv", "seed", "defence", "channel", "metric")
    for metric, (heading, *table) in zip(("asr", "accuracy"), tables("docs/results/seeds.md", "channel"), strict=True):
        for channel, *cells in table:
            for told, cell in zip(heading[1:], cells, strict=True):
                defence, seed = told.split(", seed ")
                key = (f"seed{seed}", {"repair": "care_lens"}.get(defence, defence), channel, metric)
                assert cell == measured[key], key


def test_the_tables_of_the_defences():
    measured = read("defences_balanced.csv", "defence", "channel", "metric")
    names = {"the repair, as `tune` chooses it": "care_lens", "the repair (12 settings, as the others)": "CARE repair"}
    kinds = (("seen attacks", "asr"), ("held-out attacks", "asr"), ("plain requests", "asr"))
    kinds += (("benign", "accuracy"), ("benign", "refusal"))
    chosen, earlier = tables("docs/results/defences.md", "defence")
    (controls,) = tables("docs/results/defences.md", "control")
    assert len(chosen) + len(controls) - 2 == len({key[0] for key in measured})
    for name, *cells in [*chosen[1:], *controls[1:]]:
        for kind, cell in zip(kinds, cells):
            assert cell == measured[(names.get(name, name), *kind)], (name, kind)
    then = read("defences.csv", "defence", "channel", "metric")
    for name, *cells in [row for row in earlier[1:] if row[0] in {key[0] for key in then}]:
        for kind, cell in zip(kinds, cells):
            assert cell == then[(name, *kind)], (name, kind)


def test_the_table_of_the_attack_that_sees_the_repair():
    measured = read("adaptive.csv", "epsilon", "defence", "channel")
    ((_, *table),) = tables("docs/results/bundled_model.md", "pictures")
    names = ("clean", "random noise {}", "PGD {}", "PGD {}, adaptive")
    for name, (_, *cells) in zip(names, table, strict=True):
        wanted = [measured[e, d, name.format(e)] for e in (16, 64) for d in ("none", "repair")]
        assert cells == wanted, name


def test_the_tables_of_what_gets_round_the_repair():
    """Answers that are begun for the model: repaired, with its interval, and undefended; attacks in other words and with marks between the letters."""
    rows = pd.read_csv(MEASURED / "round_the_repair.csv").fillna({"given": ""}).query("harmful")
    shares = {
        (row.request, row.given, row.repaired): (
            f"{100 * row.share:.0f} [{100 * row.ci_low:.0f}, {100 * row.ci_high:.0f}]", f"{100 * row.share:.0f}",
        )
        for row in rows.itertuples()
    }  # fmt: skip
    ((_, *begun),) = tables("docs/results/bundled_model.md", "the answer begins with")
    given = ("", "sure", "sure X first", "X first first", "X first STEP then", "yes allowed", "no sorry", "bad words")
    for opening, (_, *cells) in zip(given, begun, strict=True):
        for request, cell in zip(("pictured", "spelled", "wrapper", "named"), cells, strict=True):
            assert cell == f"{shares[request, opening, True][0]} / {shares[request, opening, False][1]}", (
                opening,
                request,
            )
    ((_, *attacks),) = tables("docs/results/bundled_model.md", "attack")
    single = {
        "letters spelled with commas between them": ("spelled with commas", ""),
        "with full stops": ("spelled with full stops", ""),
        "with colons": ("spelled with colons", ""),
        'with "and"': ("spelled with and", ""),
        "pictured, over a shaded ground": ("pictured over a shaded ground", ""),
        "best of 8 samples at temperature 1.5, pictured": ("pictured", "best of 8 at temperature 1.5"),
        "search over renderings and wordings, pictured, 9 queries": ("pictured", "search of 9 queries"),
        "search over wordings, spelled, 9 queries": ("spelled", "search of 9 queries"),
    }
    told = {name: cell for name, _, cell in attacks}
    for name, key in single.items():
        assert told[name] == f"{shares[(*key, True)][0]} / {shares[(*key, False)][1]}", name
    lost = pd.read_csv(MEASURED / "round_the_repair.csv").query("not harmful and request == 'spelled 2'").iloc[0]
    cell = f"{100 * lost.lost_share:.0f} [{100 * lost.lost_ci_low:.0f}, {100 * lost.lost_ci_high:.0f}]"
    ((_, *benign),) = tables("docs/results/bundled_model.md", "benign request")
    assert [row[1] for row in benign if "you spell" in row[0]] == [cell]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = pd.read_csv(MEASURED / "round_the_repair.csv").query(
        "not harmful and request.str.startswith('spelled with')"
    )
    worst = marked.loc[marked["lost_share"].idxmax()]
    assert f"{100 * worst.lost_share:.0f} % [{100 * worst.lost_ci_low:.0f}, {100 * worst.lost_ci_high:.0f}]" in readme
    foreign = (
        pd.read_csv(MEASURED / "wordings.csv")
        .query("half == 'held out' and request == 'harmless' and repair == 'several blocks'")
        .iloc[0]
    )
    told = [100 * (1 - value) for value in (foreign.share, foreign.ci_high, foreign.ci_low)]
    assert "{:.1f} % [{:.1f}, {:.1f}]".format(*told) in readme
    through = rows[rows["request"].str.startswith("spelled with") & rows["repaired"]]["share"]
    assert f"{100 * through.min():.0f} to {100 * through.max():.0f} % of the spelled ones" in readme


def test_the_tables_of_one_block_or_several():
    frame = pd.read_csv(MEASURED / "wordings.csv")
    frame[["share", "ci_low", "ci_high"]] *= 100
    shown = {
        (row.half, row.request, row.repair): (
            f"{row.share:.1f} [{row.ci_low:.1f}, {row.ci_high:.1f}]",
            f"{row.share:.0f} [{row.ci_low:.0f}, {row.ci_high:.0f}]",
            f"{row.n} of {row.asked}",
        )
        for row in frame.itertuples()
    }
    ((heading, *table),) = tables("docs/results/bundled_model.md", "repair")
    chosen = {"one block": "1.5", "several blocks": "1", "one block, learned jointly": "1"}
    kinds = [("world", kind) for kind in ("attacks of the fit", "other attacks", "harmless")]
    kinds += [("held out", kind) for kind in ("attacks", "harmless")]
    names = set()
    for name, *cells in table:
        reader, threshold = name.split(" (")[0].removesuffix(" %").rsplit(", ", 1)
        repair = reader if threshold == chosen[reader] else f"{reader} at {float(threshold) / 100:g}"
        names.add(repair)
        for kind, cell in zip(kinds, cells, strict=True):
            assert cell == shown[(*kind, repair)][0], (name, kind)
    assert names == {name for name in frame["repair"] if " - " not in name}
    counts = [f"{cell.split('(')[1]}".rstrip(")").replace(",", "") for cell in heading[1:]]
    assert counts == [shown[(*kind, "several blocks")][2].split()[0] for kind in kinds]
    (_, *foreign) = next(t for t in tables("docs/results/bundled_model.md", "request") if "one block" in t[0])
    for request, answered, *cells in foreign:
        pooled = {"all attacks": "attacks", "all harmless requests": "harmless"}.get(request)
        for cell, repair in zip(cells, ("several blocks", "one block"), strict=True):
            exact, rounded, counted = shown["held out", pooled or request, repair]
            assert (answered, cell) == (counted, exact if pooled else rounded), request
    text = (ROOT / "docs" / "results" / "bundled_model.md").read_text(encoding="utf-8")
    wide = {
        of: frame[(frame.half == "held out") & (frame.request == of)].set_index("repair")
        for of in ("harmless", "attacks")
    }
    apart = frame[frame["repair"].str.contains(" - ") & (frame["table"] == "pooled")]

    def threshold(repair):
        return repair.split(" at ")[1] if " at " in repair else f"{float(chosen[repair]) / 100:g}"

    at_one = apart[[len({threshold(one) for one in pair.split(" - ")}) == 1 for pair in apart["repair"]]]
    at_one = at_one[
        (at_one["half"] == "held out")
        | (at_one["request"].isin(["other attacks", "harmless"]) & (at_one["half"] == "world"))
    ]
    told_apart = at_one[(at_one["ci_low"] > 0) | (at_one["ci_high"] < 0)]
    assert (
        f"The other {len(at_one) - len(told_apart)} of the {len(at_one)} differences" in text and len(told_apart) == 3
    )
    for row in told_apart.itertuples():
        assert f"{-row.share:.1f} points [{-row.ci_high:.1f}, {-row.ci_low:.1f}]" in text or (
            f"{-row.share:.1f} [{-row.ci_high:.1f}, {-row.ci_low:.1f}] more than one learned jointly" in text
        ), row
    foreign = wide["harmless"]
    for name, words in (
        ("one block at 0.01 - several blocks", "(with both at 1 % it is {:.1f} [{:.1f}, {:.1f}]"),
        ("one block - several blocks at 0.015", "at 1.5 % {:.1f} [{:.1f}, {:.1f}]"),
        ("one block at 0.02 - several blocks at 0.02", "at 2 % {:.1f} [{:.1f}, {:.1f}]"),
    ):
        told = foreign.loc[name]
        assert words.format(-told.share, -told.ci_high, -told.ci_low) in text, name
    told = wide["harmless"].loc["one block - several blocks"]
    assert f"{-told.share:.1f} points [{-told.ci_high:.1f}, {-told.ci_low:.1f}]" in text and told.ci_high < 0
    told = wide["attacks"].loc["one block - several blocks"]
    assert (
        f"({told.share:.1f} points [{told.ci_low:.1f}, {told.ci_high:.1f}])" in text and told.ci_low < 0 < told.ci_high
    )


def test_the_table_of_corrected_intervals():
    measured = pd.read_csv(MEASURED / "correction.csv").set_index(["defence", "labels", "interval"])
    names = {"the undefended model": "none", "the repair": "care_lens", "the random writer": "control: random writer"}
    kinds = ("not corrected", "ppi", "rogan-gladen, labels of its own", "rogan-gladen, labels of the undefended")
    ((_, *table),) = tables("docs/results/judges.md", "answers of")
    assert len(table) == len(measured) / len(kinds)
    for name, rates, labels, *cells in table:
        own = [measured.loc[(names.get(name, name), int(labels), kind)] for kind in kinds]
        assert rates == f"{100 * own[0].true_rate:.1f}, {100 * own[0].judged_rate:.1f}"
        assert cells == [f"{100 * row.coverage:.0f} ({100 * row.width:.0f})" for row in own], (name, labels)


def test_the_page_on_choices_says_what_its_file_says():
    frame = pd.read_csv(MEASURED / "choices.csv")
    frame = frame.rename(columns={"margin change": "margin", "margin change low": "low", "margin change high": "high"})

    def nats(value):
        return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "\N{MINUS SIGN}")

    after_4 = frame[frame["site"] == "blocks.4.hook_resid_post"]
    ((_, *table),) = tables("docs/results/subspaces.md", "contrast")
    assert len(table) == 18
    for contrast, reference, tokens, *cells in table:
        rank = 1 if contrast == "mean" else 4
        (row,) = after_4[
            (after_4["contrast"] == contrast)
            & (after_4["reference"] == reference)
            & (after_4["tokens"] == tokens.strip("`"))
            & (after_4["rank"] == rank)
        ].to_dict("records")
        assert cells == [
            f"{row['stable cosine']:.2f}",
            f"{row['held-out energy ratio']:.0f}",
            f"{nats(row['margin'])} [{nats(row['low'])}, {nats(row['high'])}]",
            f"{nats(row['random'])} [{nats(row['random low'])}, {nats(row['random high'])}]",
            f"{row['benign KL']:.2f}",
        ], (contrast, reference, tokens)
    read = frame[frame["tokens"].isin(["last", "text", "text:attributed"])]
    residual, mlp = (read[read["site"].str.contains(name)] for name in ("resid_post", "mlp_out"))
    ordinary, refused = (residual[residual["reference"] == name] for name in ("ordinary answers", "refusals"))
    text = " ".join((ROOT / "docs" / "results" / "subspaces.md").read_text(encoding="utf-8").split())
    assert (
        f"(by {-refused['margin'].max():.1f} to {-refused['margin'].min():.1f} nats in "
        f"{(refused['margin'] < 0).sum()} of {len(refused)} cells" in text
    )
    assert (
        f"(by up to {ordinary['margin'].max():.1f} nats, in {(ordinary['margin'] > 0).sum()} of {len(ordinary)} cells)"
        in text
    )
    assert (
        f"MLP outputs moved the margin by at most {mlp['margin'].abs().max():.1f} nats in all {len(mlp)} cells" in text
    )
    images = frame[frame["tokens"].str.startswith("image")]
    assert f"by at most {images['margin'].abs().max():.2f} nats in all {len(images)} of their cells" in text
    wide = refused[refused["rank"] == 4]
    random = -wide[wide["site"] == "blocks.4.hook_resid_post"]["random"]
    assert f"lowers the margin by {random.min():.1f} to {random.max():.1f} nats itself" in text
    share = (wide["random"] / wide["margin"])[wide["tokens"] != "last"]
    here, later = (share[wide["site"] == f"blocks.{block}.hook_resid_post"] for block in (4, 6))
    assert "two thirds of what the fitted one does, or all of it (after block 6 six to eight tenths)" in text
    assert here.min() > 0.65 and here.max() > 1 and (round(10 * later.min()), round(10 * later.max())) == (6, 8)
    narrow = refused[refused["rank"] == 1]
    assert f"at rank 1 (random: at most {narrow['random'].abs().max():.1f} nats)" in text
    for site, words in (
        (4, "{} nats after block 4 (random {}) at a KL of {}"),
        (6, "after block 6 {} (random {}) at {}"),
    ):
        (row,) = wide[
            (wide["site"] == f"blocks.{site}.hook_resid_post")
            & (wide["contrast"] == "second_moment")
            & (wide["tokens"] == "last")
        ].to_dict("records")
        assert words.format(nats(row["margin"]), nats(row["random"]), f"{row['benign KL']:.2f}") in text
    claims = " ".join((ROOT / "docs" / "results" / "claims.md").read_text(encoding="utf-8").split())
    ordinary, refused = (part[part["site"] == "blocks.4.hook_resid_post"]["margin"] for part in (ordinary, refused))
    assert f"in {(ordinary > 0).sum()} of {len(ordinary)} cells, by up to {ordinary.max():.1f} nats" in claims
    assert f"less likely in all, by {-refused.max():.1f} to {-refused.min():.1f} nats" in claims and (refused < 0).all()


def test_the_table_of_attacks_by_defences():
    measured = read("attacks.csv", "defence", "channel", "metric")
    ((heading, *table),) = tables("docs/results/defences.md", "under attack")
    assert len(table) == 4
    for name, *cells in table:
        for channel, cell in zip(heading[1:], cells, strict=True):
            known = measured.get((name, channel, "accuracy" if channel == "benign" else "asr"), "\u2013")
            assert cell == known, (name, channel)
