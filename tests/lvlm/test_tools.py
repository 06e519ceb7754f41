"""TransformerLens's own tools on every family, with images."""

import pandas as pd
import pytest
import torch
from test_every_family import SPECIMENS
from transformer_lens import patching
from transformer_lens.tools import analysis

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module", params=SPECIMENS)
def bound(request, picture):
    """The bound clean and corrupted batch of a model, their images apart."""
    lvlm = HookedLVLM.from_hf(*SPECIMENS[request.param].make())
    clean, corrupted = (lvlm.prepare(Example("what is in the picture", image=picture(i, (32, 32)))) for i in (0, 1))
    yield lvlm, lvlm.bind(clean), lvlm.bind(corrupted)
    lvlm.close()


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 6]


@torch.no_grad()
def test_patching(bound):
    """Over all positions in one family, which knows what a picture is; in the others at an image token and the last one."""
    lvlm, clean, corrupted = bound
    everywhere = lvlm.family.name == "llava"
    for name in ["resid_pre", "attn_out", "mlp_out"] if everywhere else ["resid_pre"]:
        check_patching(lvlm, clean, corrupted, name, everywhere=everywhere)


@torch.no_grad()
def test_patching_of_attention_patterns_acts(bound):
    lvlm, clean, corrupted = bound
    ids = corrupted.inputs.input_ids
    _, cache = clean.run_with_cache(clean.inputs.input_ids)
    result = patching.get_act_patch_attn_head_pattern_all_pos(corrupted, ids, cache, metric)
    site = "blocks.1.attn.hook_pattern"

    def patch(activation, hook):
        return torch.cat([cache[site][:, :1], activation[:, 1:]], dim=1)

    by_hand = metric(lvlm.run_with_hooks(corrupted.inputs, fwd_hooks=[(site, patch)]))
    torch.testing.assert_close(result[1, 0], by_hand, rtol=1e-3, atol=1e-4)
    assert result.std() > 0


def check_patching(lvlm, clean, corrupted, name, *, everywhere):
    _, cache = clean.run_with_cache(clean.inputs.input_ids)
    function = getattr(patching, f"get_act_patch_{name}")
    last = corrupted.inputs.input_ids.shape[1] - 1
    image = int(corrupted.inputs.spans.image[0].nonzero()[0])
    cells = [(layer, position) for layer in range(3) for position in (image, last)]
    some = {} if everywhere else {"index_axis_names": None, "index_df": pd.DataFrame(cells, columns=["layer", "pos"])}
    result = function(corrupted, corrupted.inputs.input_ids, cache, metric, **some)
    result = result if everywhere else dict(zip(cells, result, strict=True))
    for layer, position in [(0, image), (1, image), (2, last)]:

        def patch(activation, hook, layer=layer, position=position):
            new = activation.clone()
            new[:, position] = cache[f"blocks.{layer}.hook_{name}"][:, position]
            return new

        logits = lvlm.run_with_hooks(corrupted.inputs, fwd_hooks=[(f"blocks.{layer}.hook_{name}", patch)])
        torch.testing.assert_close(result[layer, position], metric(logits), rtol=1e-3, atol=1e-4)
    assert (result if everywhere else torch.stack([*result.values()])).std() > 0


@torch.no_grad()
def test_the_residual_stream_adds_up_at_every_position(bound):
    lvlm, clean, _ = bound
    _, cache = clean.run_with_cache(clean.inputs.input_ids)
    _, ours = lvlm.run_with_cache(clean.inputs, sites=lvlm.sites(tower="language"))
    for held in (cache, ours):
        components, labels = held.decompose_resid(return_labels=True)
        assert len(components) == len(labels)
        final = held[f"blocks.{lvlm.n_layers() - 1}.hook_resid_post"]
        torch.testing.assert_close(components.sum(0), final, rtol=1e-4, atol=1e-4)
        part = held.decompose_resid(pos_slice=(1, 4))
        torch.testing.assert_close(part.sum(0), final[:, 1:4], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_logit_lens_ends_at_the_models_own_logits(bound):
    lvlm, clean, _ = bound
    _, cache = clean.run_with_cache(clean.inputs.input_ids)
    lens = analysis.logit_lens(clean, cache=cache, positions=None)
    torch.testing.assert_close(lens.values[-1], lvlm(clean.inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_interchange_over_rows_of_a_batch(bound, picture):
    lvlm, *_ = bound
    rows = lvlm.prepare([Example("what is in the picture", image=picture(i, (32, 32))) for i in range(3)])
    width = lvlm.width("blocks.1.hook_resid_pre")

    def answers(index):
        return lvlm(rows.rows(index.tolist()), logits_to_keep=1)[:, -1, 5:8]

    index, last = torch.arange(3), torch.full((3,), rows.input_ids.shape[1] - 1)
    site = "blocks.1.hook_resid_pre"
    source = analysis.collect_activations(lvlm.bridge, site, index, answers, positions=last)
    everything = analysis.SubspaceInterchange(torch.eye(width))
    swapped = analysis.run_with_intervention(
        lvlm.bridge, site, everything, index, source.roll(1, 0), answers, positions=last
    )
    held = lvlm.run_with_cache(rows, sites=[site])[1][site]
    torch.testing.assert_close(source, held[:, -1], rtol=1e-4, atol=1e-5)

    def by_hand(activation, hook):
        new = activation.clone()
        new[:, -1] = activation[:, -1].roll(1, 0)
        return new

    expected = lvlm.run_with_hooks(rows, fwd_hooks=[(site, by_hand)], logits_to_keep=1)[:, -1, 5:8]
    torch.testing.assert_close(swapped, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_sparse_probes_take_its_activations(bound, picture):
    lvlm, *_ = bound
    rows = lvlm.prepare(
        [Example(word, image=picture(i, (32, 32))) for i in range(6) for word in ("red", "what is blue")]
    )
    _, cache = lvlm.run_with_cache(rows, sites=["blocks.1.mlp.hook_post"])
    features, labels = cache["blocks.1.mlp.hook_post"][:, -1], torch.arange(12) % 2
    assert analysis.fit_sparse_probe(features, labels, k=2).metrics is not None


@torch.no_grad()
def test_attributions_of_components_add_up_to_the_logits(bound):
    lvlm, clean, _ = bound
    logits, cache = clean.run_with_cache(clean.inputs.input_ids)
    text = lvlm.hf_model.config.text_config
    cap = getattr(text, "final_logit_softcapping", None)
    expected = logits if cap is None else cap * torch.atanh(logits / cap)
    parts = cache.decompose_resid()
    torch.testing.assert_close(cache.logit_attrs(parts, 5).sum(0), expected[..., 5], rtol=1e-4, atol=1e-5)
    difference = cache.logit_attrs(parts[:, :, -1:], 5, 6, pos_slice=-1 if parts.ndim < 4 else [-1]).sum(0)
    torch.testing.assert_close(difference[:, 0], expected[:, -1, 5] - expected[:, -1, 6], rtol=1e-4, atol=1e-5)
    _, own = lvlm.run_with_cache(clean.inputs, sites=None)
    with pytest.raises(ValueError, match="is no site; take it with"):
        own.logit_attrs(parts, 5)


@torch.no_grad()
def test_heads_and_neurons_add_up_to_what_branches_write_or_are_refused(bound):
    lvlm, clean, _ = bound
    _, cache = clean.run_with_cache(clean.inputs.input_ids)
    n = lvlm.n_layers()
    for component, stack in (("hook_attn_out", cache.stack_head_results), ("hook_mlp_out", cache.stack_neuron_results)):
        if lvlm.family.name == "llama4" and component == "hook_mlp_out":
            continue  # experts have no one W_out; TransformerLens says so
        try:
            parts = stack(layer=n)
        except ValueError as error:
            assert "norms or scales" in str(error)
            assert lvlm.bridge.hook_dict[f"blocks.0.{component}"].name not in (
                "blocks.0.attn.hook_out",
                "blocks.0.mlp.hook_out",
            )
            continue
        written = sum(cache[f"blocks.{layer}.{component}"] for layer in range(n))
        torch.testing.assert_close(parts.sum(0), written, rtol=1e-4, atol=1e-5)
    try:
        parts = cache.get_full_resid_decomposition(expand_neurons=False)
    except ValueError as error:
        assert "norms or scales" in str(error) or "adds picture features" in str(error)
    else:
        torch.testing.assert_close(parts.sum(0), cache[f"blocks.{n - 1}.hook_resid_post"], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_cache_answers_to_sites_to_the_names_hooks_see_and_without_a_batch(bound):
    lvlm, clean, _ = bound
    sites = [site for site in lvlm.sites() if site.component != "attn.hook_pattern"]
    _, cache = lvlm.run_with_cache(clean.inputs, sites=sites)
    seen = {}
    lvlm.run_with_hooks(
        clean.inputs, fwd_hooks=[(s, lambda a, hook, s=s: seen.update({s: (hook.name, a.clone())})) for s in sites]
    )
    for site, (name, activation) in seen.items():
        assert torch.equal(cache[site], activation) and torch.equal(cache[str(site)], activation)
        assert torch.equal(cache[name], activation), (site, name)
    assert len(cache) == len(sites)
    whole = cache["blocks.1.hook_resid_post"]
    assert torch.equal(cache.remove_batch_dim()["blocks.1.hook_resid_post"], whole[0])


@torch.no_grad()
def test_a_filter_of_names_edits_each_activation_once(bound):
    lvlm, clean, _ = bound
    for ending in ("0.hook_resid_post", "1.hook_mlp_out", "1.hook_resid_pre"):
        ran = []
        lvlm.run_with_hooks(
            clean.inputs,
            fwd_hooks=[(lambda name, e=ending: name.endswith(e), lambda a, hook, ran=ran: ran.append(hook.name))],
        )
        listed = [site for site in lvlm.sites() if str(site).endswith(ending)]
        assert len(ran) == len(listed) > 0


@torch.no_grad()
def test_attributions_follow_the_forward_pass_not_the_config(picture):
    model, processor = SPECIMENS["llava-next-granite"].make()
    model.config.text_config.logits_scaling = 8.0
    with HookedLVLM.from_hf(model, processor) as lvlm:
        inputs = lvlm.prepare(Example("what is red", image=picture(0)))
        logits, cache = lvlm.bind(inputs).run_with_cache(inputs.input_ids)
        found = cache.logit_attrs(cache.decompose_resid(), 5).sum(0)
        torch.testing.assert_close(found, logits[..., 5], rtol=1e-4, atol=1e-5)
