"""The plan of a repair: what it says is what the repair does, and it is short."""

import dataclasses

import pandas as pd
import pytest
import torch
from fitted import make_correction, make_subspace
from torch.utils.flop_counter import FlopCounterMode

from care_lens.core import Site
from care_lens.repair import (
    ConformalGate,
    Correction,
    EnergyReader,
    FitRows,
    HookRepair,
    HybridFusion,
    LinearReader,
    MaxReader,
    NoRepair,
    PlanPart,
    RepairError,
    TokenRows,
    Writer,
    explain,
    read_scores,
)
from care_lens.repair.plan import RepairPlan
from care_lens.repair.positions import includes_generated
from care_lens.repair.reading import BatchView
from care_lens.subspace import ModelIdentity

SITE = Site.parse("blocks.1.hook_resid_post")
GATE = ConformalGate(threshold=2.5, epsilon=0.05, n=60, width=0.5)


def gated(**options):
    return make_correction("blocks.1.hook_resid_post", gate=GATE, reader_site="blocks.0.hook_resid_post", **options)


@pytest.fixture()
def fusion():
    return HybridFusion(
        visual=(dataclasses.replace(gated(scope="last"), modality="visual", pulse=True, name="see"),),
        textual=(make_correction("blocks.2.hook_mlp_out", alpha=0.5, scope="generated"),),
        name="ours",
        provenance={"rank_rule": "permutation, level 0.05"},
        model=ModelIdentity("tiny", fingerprint="0" * 16),
    )


def test_the_frame_says_what_the_parts_hold(fusion):
    plan = fusion.explain()
    first, second = plan.frame.to_dict("records")
    expected = {
        "part": "visual[0]",
        "modality": "visual",
        "site": "blocks.1.hook_resid_post",
        "layer": 1,
        "positions": "last",
        "acts_on": "prompt",
        "writer": "Writer",
        "rank": 3,
        "width": 32,
        "rank_rule": "permutation, level 0.05",
        "alpha": 1.0,
        "reader": "EnergyReader (last)",
        "reader_site": "blocks.0.hook_resid_post",
        "gate": "ConformalGate",
        "threshold": 2.5,
        "epsilon": 0.05,
        "n_calibration": 60,
        "fusion": "adaptive",
        "weighting": "token",
        "multiply_adds": 2 * 2 * 32 * 3 + 32 * 3 + 3,
    }
    assert {name: first[name] for name in expected} == expected
    assert "pulse" in first["note"] and "opens over 0.5 above" in first["note"] and "see" in first["note"]
    assert (second["acts_on"], second["alpha"], second["gate"], second["multiply_adds"]) == ("answer", 0.5, "", 384)
    assert pd.isna(second["threshold"]) and pd.isna(second["epsilon"]) and pd.isna(second["n_calibration"])
    text = str(plan)
    for said in (
        "ours (HybridFusion), made for tiny (exact)",
        "visual[0] at blocks.1.hook_resid_post, tokens: last (prompt)",
        "EnergyReader (last) at blocks.0.hook_resid_post -> ConformalGate above 2.5 (epsilon 0.05, 60 benign prompts)",
        "Writer, rank 3 of 32 (rule permutation, level 0.05), alpha 1; adaptive, weights per token",
        "always open",
        "cost: 867 multiply-adds per token; extra forward passes: none",
    ):
        assert said in text, text
    assert repr(plan) == text and explain(fusion).frame.equals(plan.frame)


@pytest.mark.parametrize("rule", ["adaptive", "sequential", "parallel", "joint"])
def test_the_cost_is_what_the_hooks_multiply(model, inputs, rule):
    """Counted by torch; it sees matrix products, not the k squares of an energy. Where no gate is open, the tokens are read and not written."""
    activation = torch.randn(*inputs.input_ids.shape, 32)
    counted = {}
    for threshold in (-1e9, 1e9):
        gate = dataclasses.replace(GATE, threshold=threshold)
        visual = make_correction(gate=gate, reader_site="blocks.0.hook_resid_post")
        textual = Correction(writer=make_correction(seed=5).writer, reader=visual.reader, gate=gate)
        fusion = HybridFusion(visual=(visual,), textual=(textual,), rule=rule)
        frame = fusion.explain().frame
        hooks = [(Site.parse(name), fn) for name, fn in fusion.fwd_hooks(inputs)[1:]]
        for _, fn in hooks:  # once before, so that what is made once is made
            fn(activation, hook=None)
        with FlopCounterMode(display=False) as counter:
            for _, fn in hooks:
                fn(activation, hook=None)
        counted[threshold] = counter.get_total_flops() / 2
    tokens = activation[..., 0].numel()
    assert frame["multiply_adds"].sum() == counted[-1e9] / tokens + 3  # the shared reader once
    written = counted[-1e9] / tokens - 96  # three directions of 32 are read at every token
    assert counted[1e9] == 96 * tokens + written * len(activation)  # of one closed token a row
    if rule == "parallel":
        assert list(frame["fusion"]) == ["parallel, weight 0.5"] * 2
    assert all((frame["weighting"] == "token") == (rule == "adaptive"))


def test_which_part_of_the_run_it_acts_on(inputs):
    """As the masks of the batch and of a generated token have it."""
    view = BatchView(inputs)
    for positions in (
        "all",
        "image",
        "text",
        "prompt",
        "last",
        "response",
        "generated",
        ("last", "generated"),
        ("image", "last"),
    ):
        part = PlanPart(name="x", site=None, positions=positions)
        prompt = bool(view.mask(positions, prefill=True).any())  # the batch holds no answers
        answer = includes_generated(positions)
        assert part.acts_on == {(True, True): "both", (True, False): "prompt", (False, True): "answer"}[prompt, answer]
    assert PlanPart(name="x", site=None, positions="all", within=("image",)).acts_on == "prompt"
    assert PlanPart(name="x", site=None, positions="last", within=("generated",)).acts_on == "nothing"
    assert PlanPart(name="x", site=None).acts_on == ""
    fusion = HybridFusion(
        visual=(make_correction(scope="text"),), textual=(make_correction(),), rule="modality", scope="prompt"
    )
    assert list(fusion.explain().frame["positions"]) == [
        "text within prompt within image",
        "all within prompt within text",
    ]
    assert list(fusion.explain().frame["acts_on"]) == ["prompt", "prompt"]


def test_readers_of_several_sites_are_told_and_counted_once():
    energy = EnergyReader.from_subspace(make_subspace("blocks.0.hook_resid_post"), positions=("last", "generated"))
    linear = LinearReader.from_subspace(make_subspace(seed=4), pooling="mean")
    both = MaxReader(readers=(energy, linear))
    writer = Writer.towards("blocks.2.hook_resid_pre", target=torch.ones(32), source=torch.zeros(32))
    made = HybridFusion(
        visual=(Correction(writer=writer, reader=both, gate=GATE),),
        textual=(Correction(writer=writer, reader=both, gate=GATE),),
    )
    frame = made.explain().frame
    assert frame["reader"][0] == "MaxReader of EnergyReader (last and generated, max), LinearReader (last)"
    assert frame["reader_site"][0] == "blocks.0.hook_resid_post, blocks.1.hook_resid_post"
    assert list(frame["multiply_adds"]) == [128 + (96 + 3) + 32, 128]


def test_it_stays_short_whatever_it_holds(model, inputs):
    many = HybridFusion(
        visual=tuple(make_correction(f"blocks.{i % 3}.hook_mlp_out", alpha=0.01 * i) for i in range(40)),
        name="<script>x</script>\nsecond line" * 9,
    )
    plan = many.explain()
    assert len(str(plan).splitlines()) <= 25 and max(map(len, str(plan).splitlines())) <= 140
    assert "and 34 more: see .frame" in str(plan) and len(plan.frame) == 40
    alike = HybridFusion(visual=tuple(make_correction(f"blocks.{i % 3}.hook_mlp_out") for i in range(40)))
    assert len(str(alike.explain()).splitlines()) == 5 and "and 37 more at blocks.0" in str(alike.explain())
    for repair in (many, alike, many.visual[0], many.visual[0].writer, gated().reader, NoRepair()):
        assert len(repr(repair).splitlines()) <= 8 and max(map(len, repr(repair).splitlines())) <= 360
        assert "tensor(" not in repr(repair) and "tensor(" not in repair._repr_html_()
    for html in (many._repr_html_(), plan._repr_html_()):
        assert "<script>" not in html and "&lt;script&gt;" in html
    sites = "blocks.0.hook_mlp_out, blocks.1.hook_mlp_out and 1 more"
    assert repr(alike) == f"HybridFusion: care\n  visual[0], visual[1] and 38 more  at {sites}, tokens: all (both)"
    assert str(NoRepair().explain()).splitlines() == [
        "none (NoRepair)",
        "  cost: nothing is added; extra forward passes: none",
    ]


def test_what_the_gates_read_is_told_on_request(model, examples):
    correction = gated(positions=("last", "generated"))
    low = dataclasses.replace(correction, gate=dataclasses.replace(GATE, threshold=-1.0))
    fusion = HybridFusion(visual=(correction,), textual=(low, make_correction("blocks.2.hook_mlp_out")))
    inputs = model.prepare(examples)
    plan = fusion.explain(model, inputs)
    scores = read_scores(model, examples, [correction.reader], progress=False)[:, 0]
    read = plan.readings
    assert list(read["part"]) == ["visual[0]"] * 3 + ["textual[0]"] * 3 and list(read["id"]) == ["a", "b", "c"] * 2
    torch.testing.assert_close(torch.tensor(read["score"][:3].to_list()), scores)
    assert read["gate"].to_list() == [*correction.gate(scores).tolist(), *low.gate(scores).tolist()]
    opened = int((correction.gate(scores) > 0).sum())
    assert f"on this batch open: visual[0] in {opened} of 3, textual[0] in 3 of 3" in str(plan)
    assert "score" in plan._repr_html_() and model.acting() == []
    with pytest.raises(RepairError, match="must both be given"):
        fusion.explain(model)
    with pytest.raises(RepairError, match="must have corrections"):
        NoRepair().explain(model, inputs)


def test_a_repair_that_does_not_say_its_parts_is_explained_from_its_description():
    class Sited(HookRepair):
        name = "sited"

        def fwd_hooks(self, inputs):
            return []

        def check(self, lvlm):
            pass

        def describe(self):
            return {
                "kind": "Sited",
                "edits": [{"site": "blocks.1.hook_mlp_out", "alpha": 2, "scope": ["last", "generated"]}],
            }

    (row,) = Sited().explain().frame.to_dict("records")
    assert (row["part"], row["site"], row["alpha"]) == ("Sited.edits[0]", "blocks.1.hook_mlp_out", 2.0)
    assert (row["positions"], row["acts_on"]) == ("last and generated", "both") and pd.isna(row["multiply_adds"])
    assert "those of 1 parts that do not say" in str(Sited().explain())

    class Bare:
        name = "bare"

        def describe(self):
            return {}

    assert "does not say where it acts" in str(explain(Bare()))


def test_rows_and_records_are_short_too(model, inputs):
    rows = TokenRows({SITE: torch.randn(9, 3, 32)}, torch.ones(9, 3).bool(), ("a",) * 9)
    held = FitRows(benign=rows, malicious={"visual": rows}, refused=rows)
    with HybridFusion(visual=(make_correction(),)).recording(model) as seen, torch.no_grad():
        model(inputs)
    for thing in (rows, held, seen):
        assert "tensor(" not in repr(thing) and len(repr(thing)) <= 360 and "<table" in thing._repr_html_()
    assert "passes=1" in repr(seen) and "blocks.1.hook_resid_post" in repr(seen)


def test_long_lines_are_broken_and_lose_nothing():
    words = [f"word{i}" for i in range(40)]
    text = str(RepairPlan(" ".join(words), "HybridFusion", ()))
    assert [word for word in text.split() if word in words] == words and max(map(len, text.splitlines())) <= 140
    assert len(str(RepairPlan("x" * 10_000, "HybridFusion", ())).splitlines()) < 10
