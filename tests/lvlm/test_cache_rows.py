"""Rows of a cache: whose the pictures are."""

import copy

import pytest
import torch

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
