"""Edge scores: exact on a linear way, against path patching on the bundled world, and circuits of them against random ones."""

import numpy as np
import pandas as pd
import pytest
import torch

from care_lens import organism
from care_lens.core import PairedExamples, ResponseLogProb, Site
from care_lens.mediation import (
    EdgeResult,
    Mediator,
    attribute,
    circuit_faithfulness,
    edge_attribution,
    path_effects,
    verify_edges,
)


@pytest.fixture(scope="module")
def world():
    with organism.load() as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def twins():
    return organism.picture_pairs("fit")[:2]


@pytest.fixture(scope="module")
def scored(world, twins):
    receivers = [
        "blocks.0.attn.hook_z[0]",
        "blocks.0.hook_mlp_out",
        "vision.blocks.1.hook_mlp_out",
        "vision.blocks.3.attn.hook_z[0]",
        "end",
    ]
    return edge_attribution(
        world, twins, outcome=ResponseLogProb(), receivers=receivers, points=2, n_boot=20, progress=False
    )


def test_scores_rank_edges_as_exact_path_patching_does(world, twins, scored):
    """On the bundled world, through both towers and the projector. Misses are reported, and none is among so few."""
    checked = verify_edges(world, twins, scored, outcome=ResponseLogProb(), top=8, random=6, n_boot=50, progress=False)
    frame = checked.frame[checked.frame.kind == "all"].set_index("effect")
    assert frame.loc["spearman", "value"] > 0.7
    assert 0 <= frame.loc["miss rate", "value"] < 0.5
    leading = checked.details[checked.details.top == 1]
    assert {"vision", "language", "vision to language"} <= set(leading.kind)
    assert (np.sign(leading.estimate) == np.sign(leading["value"])).mean() > 0.8
    assert leading["value"].abs().max() > 0.3
    assert len(checked.plot().data) == 3


def test_exact_effects_are_those_of_path_effects(world, twins, scored, tmp_path):
    """Edges within one tower that have an MLP or the end as receiver are its paths."""
    frame = scored.frame
    names = [("blocks.0.attn.hook_z[0]", "blocks.0.hook_mlp_out"), ("blocks.0.hook_mlp_out", "end")]
    names += [("vision.blocks.0.hook_mlp_out", "vision.blocks.1.hook_mlp_out")]
    some = pd.concat([frame[(frame.sender == a) & (frame.receiver == b)] for a, b in names], ignore_index=True)
    assert len(some) == 3
    checked = verify_edges(
        world,
        twins,
        EdgeResult(some, scored.settings, scored.details),
        outcome=ResponseLogProb(),
        top=3,
        random=0,
        n_boot=5,
        progress=False,
    ).details.set_index("sender")
    for sender, receiver in names:
        place = Mediator((Site.parse("blocks.0.attn.hook_z"),), (0,)) if "hook_z" in sender else sender
        path = path_effects(
            world, twins, outcome=ResponseLogProb(), senders=[place], receivers=[receiver], n_boot=2, progress=False
        ).frame
        assert checked.loc[sender, "value"] == pytest.approx(path["value"].iloc[0], abs=1e-5)
    scored.save(tmp_path, "edges")
    pd.testing.assert_frame_equal(EdgeResult.load(tmp_path, "edges").frame, frame)


def test_what_all_read_of_a_sender_is_its_attribution(model, pictured, margin):
    """The chain rule: a sender's gradient is the sum over those that read it directly, whatever is between."""
    found = edge_attribution(model, pictured, outcome=margin, method="gradient", n_boot=2, progress=False).frame
    sites = [
        "vision.blocks.1.attn.hook_z",
        "blocks.1.attn.hook_z",
        "blocks.0.hook_mlp_out",
        "vision.blocks.0.hook_mlp_out",
        "projector.hook_out",
    ]
    whole = attribute(
        model, pictured, outcome=margin, sites=sites, patches=(), method="gradient", n_boot=2, progress=False
    ).frame
    whole = whole.set_index("mediator")["value"]
    for name, value in whole.items():
        tower = "vision" if name.startswith("vision") else "language"
        mine = found[(found.sender == name)]
        assert mine["value"].sum() == pytest.approx(value, abs=1e-5), (name, tower)
    assert set(whole.index) <= set(found.sender)


def test_circuits_against_random_ones(world, twins, scored):
    found = circuit_faithfulness(
        world, twins, scored, outcome=ResponseLogProb(), sizes=(0, 30, 10**6), random=3, n_boot=20, progress=False
    ).frame.set_index("edges")
    everything = int(found.index.max())
    assert found.loc[0, "nodes"] == 0 and found.loc[0, "value"] == pytest.approx(found.loc[0, "chance"], abs=1e-9)
    assert found.loc[30, "value"] > found.loc[30, "chance_high"] and found.loc[30, "value"] > 0.5
    assert everything == len(scored.frame) and found.loc[everything, "value"] >= found.loc[30, "value"] - 0.1


def test_a_circuit_of_nothing_and_of_everything_by_hand(model, pictured, margin):
    scored = edge_attribution(model, pictured, outcome=margin, method="gradient", n_boot=2, progress=False)
    found = circuit_faithfulness(
        model, pictured, scored, outcome=margin, sizes=(0, 10**6), random=1, n_boot=2, progress=False
    )
    inputs = [model.prepare(list(side)) for side in (pictured.safe, pictured.unsafe)]
    sites = [
        site
        for site in model.sites()
        if site.component in ("attn.hook_z", "hook_mlp_out") and site.tower != "projector"
    ]
    with torch.no_grad():
        safe = model.run_with_cache(inputs[0], sites=sites)[1]
        hooks = [(site, lambda a, hook, site=site: safe[str(site)]) for site in sites]
        nothing = margin(model.run_with_hooks(inputs[1], fwd_hooks=hooks), inputs[1])
        unsafe = margin(model(inputs[1]), inputs[1])
    details = found.details[found.details.kind == "leading"]
    np.testing.assert_allclose(details[details.edges == 0]["value"], nothing, atol=1e-5)
    np.testing.assert_allclose(details[details.edges > 0]["value"], unsafe, atol=1e-5)


def test_refusals(model, pictured, margin):
    with pytest.raises(ValueError, match="receivers must be heads"):
        edge_attribution(model, pictured, outcome=margin, receivers=["nowhere"], progress=False)
    with pytest.raises(ValueError, match="points must be 1"):
        edge_attribution(model, pictured, outcome=margin, points=0, progress=False)
    longer = PairedExamples((pictured.safe[0],), (pictured.unsafe[1],))
    with pytest.raises(ValueError, match="aligned"):
        edge_attribution(model, longer, outcome=margin, progress=False)
