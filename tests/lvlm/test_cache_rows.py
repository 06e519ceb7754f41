"""Rows of a cache: whose the pictures are."""

import copy

import pytest
import torch
from transformer_lens import ActivationCache

from care_lens.core import Example
from care_lens.lvlm import LVLMCache


@pytest.fixture
def inputs(lvlm, examples):
    return lvlm.prepare(examples)


@torch.no_grad()
def test_rows_of_a_cache_whose_pictures_are_nobodys_are_refused(lvlm, inputs):
    _, cache = lvlm.run_with_cache(inputs, sites=["vision.blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out"])
    with pytest.raises(ValueError, match="not known which rows"):
        LVLMCache(cache.cache_dict, lvlm.bridge).apply_slice_to_batch_dim(0)
    words = LVLMCache({"blocks.0.hook_mlp_out": cache["blocks.0.hook_mlp_out"]}, lvlm.bridge)
    assert torch.equal(words.apply_slice_to_batch_dim(1)["blocks.0.hook_mlp_out"], cache["blocks.0.hook_mlp_out"][1])
    with pytest.raises(ValueError, match="batch axis"):
        words.apply_slice_to_batch_dim(1).apply_slice_to_batch_dim(0)


@torch.no_grad()
def test_a_row_of_several_pictures_has_all_of_them(lvlm, picture):
    rows = [
        Example("what is", image=picture(0, (16, 16))),
        Example("how to make a blue"),
        Example("red then blue", image=picture(1, (16, 16)), more_images=(picture(2, (16, 16)),)),
    ]
    inputs = lvlm.prepare(rows)
    assert inputs.image_rows == (0, 2, 2)
    for cache in (
        lvlm.run_with_cache(inputs, sites=["vision.blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out"])[1],
        lvlm.bind(inputs).run_with_cache(inputs.input_ids)[1],
    ):
        whole = cache["vision.blocks.0.hook_mlp_out"]
        assert torch.equal(cache.apply_slice_to_batch_dim([2])["vision.blocks.0.hook_mlp_out"], whole[1:])
        assert torch.equal(cache.apply_slice_to_batch_dim(2)["vision.blocks.0.hook_mlp_out"], whole[1:])
        assert torch.equal(cache.apply_slice_to_batch_dim(0)["vision.blocks.0.hook_mlp_out"], whole[0])
        assert "vision.blocks.0.hook_mlp_out" not in cache.apply_slice_to_batch_dim(1)
        turned = cache.apply_slice_to_batch_dim([2, 0])
        assert turned.image_rows == (0, 0, 1)
        assert torch.equal(turned["vision.blocks.0.hook_mlp_out"], whole[[1, 2, 0]])
        assert torch.equal(turned["blocks.0.hook_mlp_out"], cache["blocks.0.hook_mlp_out"][[2, 0]])


@torch.no_grad()
def test_a_copy_of_a_cache_knows_whose_the_pictures_are(lvlm, inputs):
    _, cache = lvlm.run_with_cache(inputs, sites=["vision.blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out"])
    taken, expected = copy.deepcopy(cache).apply_slice_to_batch_dim([2]), cache.apply_slice_to_batch_dim([2])
    assert taken.image_rows == expected.image_rows == (0,) and len(taken.cache_dict) == 2
    for name, value in expected.items():
        assert torch.equal(taken[name], value)


@torch.no_grad()
def test_the_norm_of_every_layer_and_of_the_end_is_transformer_lens_s(lvlm, inputs):
    bound = lvlm.bind(inputs)
    _, cache = bound.run_with_cache(inputs.input_ids)
    n = lvlm.n_layers("language")
    plain = ActivationCache(cache.cache_dict, lvlm.bridge)
    for layer, mlp_input in ((0, False), (1, True), (n, False), (n, True), (None, False), (-1, False)):
        stack = cache.decompose_resid(layer=layer, mlp_input=mlp_input and layer != n)
        ours = cache.apply_ln_to_stack(stack, layer, mlp_input)
        assert torch.equal(ours, plain.apply_ln_to_stack(stack, layer, mlp_input)), layer
    end = cache.apply_ln_to_stack(cache.decompose_resid(), layer=n)
    assert torch.equal(end, cache.decompose_resid() / cache["ln_final.hook_scale"])
    _, sites = lvlm.run_with_cache(inputs, sites=lvlm.sites(tower="language"))
    stack = sites.decompose_resid()
    for layer in (n, None, -1):  # TransformerLens looks for a block of that number, and finds none: IndexError
        with pytest.raises(ValueError, match=r"must hold 'ln_final.hook_scale' for a norm.*lvlm.bind\(inputs\)"):
            sites.apply_ln_to_stack(stack, layer)
    with pytest.raises(ValueError, match=r"must hold 'blocks.1.ln2.hook_scale'"):
        sites.apply_ln_to_stack(stack, 1, mlp_input=True)
    with pytest.raises(ValueError, match=rf"layer must be from 0 to {n} .* got {n + 1}"):
        sites.apply_ln_to_stack(stack, n + 1)
    with pytest.raises(ValueError, match=r"must hold 'ln_final\.hook_scale'"):
        sites.decompose_resid(apply_ln=True)
    assert sites.apply_ln_to_stack(stack, n, recompute_ln=True).shape == stack.shape
