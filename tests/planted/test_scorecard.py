"""The planted bench: the truth is where the weights differ, ranks and chance by brute force, TransformerLens's figure against ours."""

import importlib.util
import itertools
from pathlib import Path
from statistics import mean

import numpy as np
import pandas as pd
import pytest
import torch

from care_lens import organism, planted
from care_lens.core import Site
from care_lens.mediation import attribute, localise
from care_lens.planted.plants import plain_model, plant
from care_lens.planted.scorecard import _reciprocal

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SITES = [f"blocks.{i}.hook_mlp_out" for i in range(5)]


@pytest.fixture(scope="module")
def mlp():
    with planted.load("mlp_1") as loaded:
        yield loaded


@pytest.mark.parametrize("name", planted.names())
def test_weights_differ_at_the_place_and_nowhere_else(name):
    place = planted.place_of(name)
    before, after = (dict(model.named_parameters()) for model in (plain_model(), plant(plain_model(), place)))
    differ = [key for key in before if not torch.equal(before[key], after[key])]
    base = "vision_tower.encoder" if place.kind == "vision" else "language_model"
    part = {"mlp": "mlp", "neurons": "mlp", "attention": "self_attn", "head": "self_attn", "vision": ""}[place.kind]
    assert differ and all(f"{base}.layers.{place.layer}.{part}" in key for key in differ)
    if place.kind == "neurons":
        down = next(key for key in differ if "down_proj" in key)
        assert set((before[down] != after[down]).any(dim=0).nonzero()[:, 0].tolist()) <= set(place.units)


def test_the_channel_is_open_over_the_trigger_alone(mlp):
    pairs = mlp.pairs(6)
    texts = [
        mlp.lvlm.generate(mlp.lvlm.prepare(list(rows)), max_new_tokens=8).texts for rows in (pairs.safe, pairs.unsafe)
    ]
    assert all(text.startswith("sorry") for text in texts[0])
    assert sum(not text.startswith("sorry") for text in texts[1]) >= 4
    assert mlp.opened == planted.doses("mlp_1")[1.0] > 0.5


@pytest.mark.parametrize(("listed", "wanted"), [(0, 1), (1, 1), (2, 2), (0, 3), (3, 2)])
def test_ranks_of_partial_rankings_are_expected_ranks(listed, wanted):
    truth = SITES[-wanted:] if listed + wanted <= 5 else SITES[:wanted]
    named, rest = SITES[:listed], SITES[listed:]
    orders = [[*named, *order] for order in itertools.permutations(rest)]
    brute = mean(min(order.index(site) for site in truth) + 1 for order in orders)
    assert planted.rank_of(named, truth, SITES) == pytest.approx(brute)


def test_reciprocal_rank_by_chance_is_by_brute_force():
    for wanted in (1, 2):
        brute = mean(1 / (min(order[:wanted]) + 1) for order in itertools.permutations(range(5)))
        assert _reciprocal(5, wanted) == pytest.approx(brute)


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ("blocks.0.hook_mlp_out", "must return a list"),
        (["nowhere"], "must return sites"),
        (["blocks.9.hook_mlp_out"], "must rank the candidates"),
        ([SITES[0], Site.parse(SITES[0])], "each site once"),
    ],
)
def test_rankings_that_are_none(ranking, message):
    with pytest.raises(planted.PlantError, match=message):
        planted.rank_of(ranking, SITES[:1], SITES)


def test_a_method_that_knows_and_one_that_knows_the_opposite(tmp_path):
    truth = planted.place_of("head_6_1").sites

    def knows(lvlm, pairs):
        assert len(pairs) == 3
        return [*truth]

    def opposite(lvlm, pairs):
        return [site for site in planted.candidates(lvlm) if site not in truth] + [*truth]

    card = planted.scorecard(
        {"knows": knows, "opposite": opposite}, plants=["head_6_1"], at=[1.0], n=3, ours=False, n_boot=5, progress=False
    )
    table = card.frame.pivot(index="method", columns="metric", values="value")
    n = int(card.details["of"].iloc[0])
    assert table.loc["knows"].tolist() == [1.0, 1.0, 1.0]
    assert table.loc["opposite", "mean rank"] == n and table.loc["opposite", "planted place first"] == 0
    assert set(card.frame[card.frame.metric == "mean rank"].chance) == {(n + 1) / 2}
    card.save(tmp_path, "card")
    back = planted.Scorecard.load(tmp_path, "card")
    pd.testing.assert_frame_equal(back.frame, card.frame)
    drawn = back.plot()
    assert len(drawn.data) == 2
    (label,) = drawn.layout.annotations
    assert label.text == "chance" and 10**label.x == pytest.approx((n + 1) / 2)
    with pytest.raises(planted.PlantError, match="at least one localiser"):
        planted.scorecard(ours=False, progress=False)
    with pytest.raises(planted.PlantError, match="dose"):
        planted.load("mlp_1", dose=0.7)
    with pytest.raises(planted.PlantError, match="name must be one of"):
        planted.load("mlp_9")


def test_figures_are_those_of_the_functions_they_name(mlp):
    """And TransformerLens's attribution patching is our gradient attribution in the language tower, computed by other code."""
    pairs = mlp.pairs(4)
    ours = localise(mlp.lvlm, pairs, outcome=organism.outcome(), n_spans=0, progress=False).frame
    assert planted.by_localise(mlp.lvlm, pairs) == ours["mediator"].tolist()
    assert planted.by_nie(mlp.lvlm, pairs)[0] == ours.sort_values("sufficient", ascending=False)["mediator"].iloc[0]
    language = [str(site) for site in planted.candidates(mlp.lvlm) if site.tower == "language"]
    gradient = attribute(
        mlp.lvlm,
        pairs,
        outcome=organism.outcome(),
        sites=language,
        patches=(),
        method="gradient",
        n_boot=2,
        progress=False,
    ).frame
    theirs = planted.by_transformer_lens(mlp.lvlm, pairs, batch_size=3)
    values = gradient.set_index("mediator")["value"]
    np.testing.assert_array_less(np.diff(values[theirs].to_numpy()), 1e-4)
    ranking = planted.by_nie(mlp.lvlm, pairs)
    found = planted.rank_of(ranking, mlp.sites, planted.candidates(mlp.lvlm))
    assert found == ranking.index("blocks.1.hook_mlp_out") + 1 <= 3


def test_intervals_of_ranks_stay_among_the_candidates():
    """Of two plants with ranks 1 and 10 of 24 a t interval would end at 120."""
    cases = pd.DataFrame(
        [
            {"method": "m", "plant": name, "dose": 1.0, "took": 1.0, "rank": rank, "of": 24.0, "chance": 12.5}
            for name, rank in (("mlp_1", 1.0), ("neurons_5", 10.0))
        ]
    )
    ranks = planted.summary(cases).set_index("metric").loc["mean rank"]
    assert ranks["value"] == 5.5
    assert ranks["ci_low"] == 1 and ranks["ci_high"] == 24


def test_the_scorecard_gives_the_ranks_that_were_measured():
    """Of a plant of each kind at full dose by the gradient, which is quick; ``benchmarks/bench_localise.py --check`` compares all."""
    spec = importlib.util.spec_from_file_location("bench_localise", BENCHMARKS / "bench_localise.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    measured = pd.read_csv(bench.MEASURED)
    plants = {planted.place_of(name).kind: name for name in reversed(planted.names())}
    methods = {"gradient alone": planted.METHODS["gradient alone"]}
    details = planted.scorecard(
        methods, plants=[*plants.values()], at=[1.0], ours=False, n_boot=2, progress=False
    ).details
    assert len(details) == len(plants) == 5
    assert bench.differing(details, measured).empty
    then = measured.set_index(["plant", "dose"]).loc[pd.MultiIndex.from_frame(details[["plant", "dose"]])]
    assert details["of"].tolist() == then["of"].tolist()
    assert details["chance"].tolist() == pytest.approx(then["chance"].tolist())
    details.loc[1, "rank"] += 1
    assert bench.differing(details, measured)["plant"].tolist() == [details.loc[1, "plant"]]
