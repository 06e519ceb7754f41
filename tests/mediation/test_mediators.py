"""What is exchanged at once: names, columns, refusals."""

import pytest

from care_lens.core import Site
from care_lens.mediation import Mediator, cumulative, heads, neurons, windows

MLPS = [Site("language", layer, "hook_mlp_out") for layer in range(4)]


def names(mediators):
    return [mediator.name for mediator in mediators]


def test_cumulative_from_the_bottom():
    assert names(cumulative(MLPS[::-1])) == [
        "blocks.0.hook_mlp_out",
        "blocks.0-1.hook_mlp_out",
        "blocks.0-2.hook_mlp_out",
        "blocks.0-3.hook_mlp_out",
    ]


def test_windows():
    assert names(windows(MLPS, 2)) == ["blocks.0-1.hook_mlp_out", "blocks.1-2.hook_mlp_out", "blocks.2-3.hook_mlp_out"]
    assert [mediator.sites for mediator in windows(MLPS, 3, step=2)] == [tuple(MLPS[:3])]
    for size, step in ((0, 1), (5, 1), (2, 0)):
        with pytest.raises(ValueError, match="size must be"):
            windows(MLPS, size, step=step)


def test_heads_and_neurons(model):
    found = heads(model, layers=[1])
    assert names(found)[:2] == ["blocks.1.attn.hook_z[0]", "blocks.1.attn.hook_z[1]"]
    assert found[1].columns() == {
        "tower": "language",
        "layer": 1,
        "component": "attn.hook_z",
        "head": 1,
        "neuron": None,
        "mediator": "blocks.1.attn.hook_z[1]",
    }
    one, some = neurons("blocks.0.mlp.hook_post", [3, (5, 1, 5)])
    assert one.columns()["neuron"] == 3 and some.units == (1, 5) and some.columns()["neuron"] is None
    assert neurons("blocks.0.mlp.hook_post", [range(9)])[0].name == "blocks.0.mlp.hook_post[0,1,2,3,...]"


def test_columns_of_groups():
    mixed = Mediator((MLPS[0], Site("vision", 2, "hook_attn_out")), name="both")
    shared = mixed.columns()
    assert (shared["tower"], shared["layer"], shared["component"], shared["mediator"]) == (
        "several",
        None,
        "several",
        "both",
    )
    assert mixed.sites[0].tower == "vision" and mixed.in_language
    assert mixed.key == "vision.blocks.2.hook_attn_out+blocks.0.hook_mlp_out"
    assert Mediator.of("blocks.0.hook_mlp_out").name == "blocks.0.hook_mlp_out"


def test_refusals():
    with pytest.raises(ValueError, match="at least one site"):
        Mediator(())
    with pytest.raises(ValueError, match="units must be of"):
        Mediator((MLPS[0],), (1,))
    with pytest.raises(ValueError, match="indices of heads"):
        Mediator((Site("language", 0, "attn.hook_z"),), ())
    with pytest.raises(ValueError, match=r"mlp\.hook_post"):
        neurons("blocks.0.attn.hook_z", [1])
