"""Replay gives the numbers of whole forward passes, runs less, and stands aside where it would not be exact."""

import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core import Example, KLDivergence, PairedExamples, ResponseLogProb, Site
from care_lens.lvlm import HookedLVLM, Replay
from care_lens.mediation import Mediator, Swap, cumulative, heads, mediate, neurons, patched_outcomes, windows

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}


def language_sites(model):
    return [site for site in model.sites(tower="language") if site.component != "attn.hook_pattern"]


def both_ways(model, pairs, outcome, **options):
    """Details with replay, and of one whole forward pass a cell."""
    return [
        mediate(model, pairs, outcome=outcome, n_boot=10, progress=False, replay=replay, **options)
        .details[["safe_patched", "unsafe_patched"]]
        .to_numpy()
        for replay in (True, False)
    ]


@pytest.mark.parametrize("batch_size", [7, 32])
def test_every_site_and_position_as_whole_passes(model, pairs, margin, batch_size):
    replayed, whole = both_ways(
        model,
        pairs,
        margin,
        sites=language_sites(model),
        positions=("each", "image", "text", "last", "all"),
        batch_size=batch_size,
    )
    np.testing.assert_allclose(replayed, whole, atol=1e-5, rtol=1e-5)
    assert np.abs(whole[:, 0] - whole[0, 0]).max() > 0.01


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_family(name, picture):
    model = HookedLVLM.from_hf(*SPECIMENS[name].make())
    pairs = PairedExamples.from_pairs(
        [
            (Example("what is red", image=picture(0, (32, 32))), Example("how is blue", image=picture(1, (32, 32)))),
            (
                Example("make a red picture", image=picture(2, (32, 32))),
                Example("make no blue red", image=picture(3, (32, 32))),
            ),
        ]
    )

    def last_logit(logits, inputs):
        return logits[:, -1, 5]

    editable = [site for site in language_sites(model) if model.site_info(site).editable]
    # One block a component, the blocks in turn: what replay must know of a family is in its components, "each" of all sites is above.
    by_component: dict = {}
    for site in editable:
        by_component.setdefault(site.component, []).append(site)
    sites = [there[i % len(there)] for i, there in enumerate(by_component.values())]
    positions = ("3", "last", "all")
    lengths = [(~model.prepare(list(pair)).spans.padding).sum(1).tolist() for pair in pairs]
    if any(first != second for first, second in lengths):
        positions = ("image", "last")
    replayed, whole = both_ways(model, pairs, last_logit, sites=sites, positions=positions)
    np.testing.assert_allclose(replayed, whole, atol=1e-4, rtol=1e-4)


def test_groups_heads_and_neurons_as_whole_passes(model, pictured, margin):
    mlps = model.sites(tower="language", component="hook_mlp_out")
    streams = model.sites(tower="language", component="hook_resid_pre")
    mixed = [site for site in language_sites(model) if site.layer == 1]
    mediators = [
        *cumulative(mlps),
        *windows(streams, 2),
        *heads(model, layers=[0, 2]),
        *neurons("blocks.1.mlp.hook_post", [0, (1, 3, 5)]),
        Mediator((*mixed, *mlps), name="mixed"),
        Mediator((Site.parse("vision.blocks.1.hook_mlp_out"), mlps[0])),
    ]
    replayed, whole = both_ways(model, pictured, margin, sites=mediators, positions=("text", "last", "5"))
    np.testing.assert_allclose(replayed, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("outcome", [KLDivergence(), KLDivergence(reverse=True), ResponseLogProb()])
def test_outcomes_as_whole_passes(model, pictured, outcome):
    answered = PairedExamples(
        *(tuple(replace(one, response="sure red") for one in side) for side in (pictured.safe, pictured.unsafe))
    )
    sites = ["blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out", "blocks.2.hook_resid_pre"]
    replayed, whole = both_ways(model, answered, outcome, sites=sites, positions=("each", "all"))
    np.testing.assert_allclose(replayed, whole, atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_random_patches_of_random_sets_of_sites(model, margin, pictured, seed):
    """Any set of sites, any positions at each, any rows."""
    generator = np.random.default_rng(seed)
    inputs = model.prepare([*pictured.safe, *pictured.unsafe])
    sites = language_sites(model)
    sites = [sites[i] for i in generator.choice(len(sites), size=generator.integers(1, 5), replace=False)]
    keep = int(generator.choice([1, inputs.input_ids.shape[1]]))
    made, logits = Replay.of(model, inputs, logits_to_keep=keep)
    assert made is not None and made.lowest == 0 and made.causal
    own = made.read(sites)
    with torch.no_grad():
        cached = model.run_with_cache(inputs, sites=sites)[1]
    tokens = ~inputs.spans.padding
    for site in sites:
        torch.testing.assert_close(own[site][tokens], cached[str(site)][tokens], atol=1e-5, rtol=1e-5)
    rows, pos = tokens.shape
    patches = [
        {
            site: Swap(
                torch.from_numpy(generator.random((rows, pos)) < generator.random()) & tokens,
                torch.arange(pos).repeat(rows, 1),
            )
            for site in sites
        }
        for _ in range(3)
    ]
    shared = {
        "patches": patches,
        "own": own,
        "donor": {site: held[[2, 3, 0, 1]] for site, held in own.items()},
        "untouched": margin(logits, inputs).double(),
        "outcome": margin,
        "batch_size": 5,
        "logits_to_keep": keep,
    }
    found = patched_outcomes(model, inputs, replay=made, **shared)
    torch.testing.assert_close(found, patched_outcomes(model, inputs, **shared), atol=1e-5, rtol=1e-5)


def test_less_is_run(model, pictured, margin):
    """The vision tower and blocks below the patch are run by the untouched passes only; single positions are single."""
    seen: list[tuple[str, int]] = []
    blocks = model.bridge.blocks
    handles = [
        block.register_forward_pre_hook(lambda m, args, i=i: seen.append((f"block {i}", args[0].shape[1])))
        for i, block in enumerate(blocks)
    ]
    handles.append(model.hf_model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.append(("vision", 0))))

    def count(sites):
        seen.clear()
        mediate(model, pictured, outcome=margin, sites=sites, positions=("last",), n_boot=10, progress=False)
        return list(seen)

    try:
        few, none = count(["blocks.2.hook_mlp_out"]), count(["vision.blocks.0.hook_mlp_out"])
        streams = count(["blocks.1.hook_resid_pre"])
    finally:
        for handle in handles:
            handle.remove()
    assert sum(name == "vision" for name, _ in few) == 2  # outcomes, what replay keeps
    assert sum(name == "vision" for name, _ in none) > 2
    after = few[max(i for i, (name, _) in enumerate(few) if name == "vision") :]
    assert after[-1] == ("block 2", 1)
    assert streams[-2:] == [("block 1", 1), ("block 2", 1)]


def test_it_stands_aside_where_hooks_are_on(model, pictured, margin):
    inputs = model.prepare([*pictured.safe, *pictured.unsafe])
    site = Site.parse("blocks.1.hook_mlp_out")
    with model.hooks([(site, lambda activation, hook: 0.5 * activation)]):
        assert model.is_hooked and Replay.of(model, inputs)[0] is None
        found = both_ways(model, pictured, margin, sites=["blocks.0.hook_mlp_out"], positions=("all",))
    np.testing.assert_array_equal(*found)
    with model.hooks_for_each_batch(lambda batch: [(site, lambda activation, hook: 0.5 * activation)]):
        assert Replay.of(model, inputs)[0] is None
    plain = both_ways(model, pictured, margin, sites=["blocks.0.hook_mlp_out"], positions=("all",))
    assert np.abs(plain[0] - found[0]).max() > 1e-3
    assert not model.is_hooked and Replay.of(model, inputs)[0] is not None


@pytest.fixture
def fresh(llava_maker):
    return HookedLVLM.from_hf(*llava_maker("clip"))


def test_it_stands_aside_below_a_place_where_something_is_done_between_blocks(fresh, pictured, margin):
    """As DeepStack does; layers above the place are replayed all the same, those below run whole."""
    between = fresh.bridge.blocks[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 1.1, *args[1:]), prepend=True
    )
    try:
        made, _ = Replay.of(fresh, fresh.prepare([*pictured.safe, *pictured.unsafe]))
        assert made is not None and made.lowest == 2
        found = both_ways(fresh, pictured, margin, sites=language_sites(fresh), positions=("each",))
    finally:
        between.remove()
    np.testing.assert_allclose(*found, atol=1e-5, rtol=1e-5)


def test_it_stands_aside_where_a_block_gives_another_thing_alone(fresh, pictured, margin):
    calls = []

    def first_time_only(module, args, output):
        calls.append(1)
        return output if len(calls) % 2 else output + 1

    inputs = fresh.prepare([*pictured.safe, *pictured.unsafe])
    handle = fresh.bridge.blocks[1].mlp.register_forward_hook(first_time_only)
    try:
        assert Replay.of(fresh, inputs)[0].lowest == 2
    finally:
        handle.remove()
    top = fresh.hf_model.register_forward_hook(lambda m, a, out: setattr(out, "logits", out.logits.tanh()))
    try:
        assert Replay.of(fresh, inputs)[0] is None
    finally:
        top.remove()
    assert Replay.of(fresh, inputs)[0].lowest == 0


def test_positions_are_not_cut_where_the_mask_looks_ahead(fresh, pictured, margin):
    """Some models let image tokens see each other: then a patch changes what is before it."""

    def look_ahead(module, args, kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[..., 1:5, 1:5] = 0
        return args, {**kwargs, "attention_mask": mask}

    handles = [
        block.register_forward_pre_hook(look_ahead, with_kwargs=True, prepend=True) for block in fresh.bridge.blocks
    ]
    try:
        inputs = fresh.prepare(list(pictured[1]))
        made, _ = Replay.of(fresh, inputs)
        assert made is not None and not made.causal
        found = both_ways(fresh, pictured, margin, sites=language_sites(fresh), positions=("each", "all"))
    finally:
        for handle in handles:
            handle.remove()
    np.testing.assert_allclose(*found, atol=1e-5, rtol=1e-5)
