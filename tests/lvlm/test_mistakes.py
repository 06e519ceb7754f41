"""What a new user gets wrong, and what they are told.

The suite checks types as it runs, so that here some mistakes are told by that check; without it by our own messages.
"""

import pytest
import torch

from care_lens.core import Example, Site
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    with HookedLVLM.from_hf(*llava_maker("clip")) as made:
        yield made


def test_a_model_is_not_wrapped_twice(llava_maker):
    model, processor = llava_maker("clip")
    with HookedLVLM.from_hf(model, processor), pytest.raises(ValueError, match="in a bridge already"):
        HookedLVLM.from_hf(model, processor)
    with pytest.raises(ValueError, match="in a bridge already"):
        HookedLVLM.from_hf(model, processor)


def test_a_tokenizer_is_not_a_processor(llava_maker):
    model, processor = llava_maker("clip")
    with pytest.raises((ValueError, AttributeError), match="tokenizer"):
        HookedLVLM.from_hf(model, processor.tokenizer)


def test_names_that_are_none(lvlm, picture):
    inputs = lvlm.prepare(Example("what is red", image=picture(0)))
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.0\.hook_z'.*site"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_z", lambda a, hook: a)])
    with pytest.raises((ValueError, TypeError), match="fwd_hooks"):
        lvlm.run_with_hooks(inputs, fwd_hooks=("blocks.0.hook_mlp_out", lambda a, hook: a))
    with pytest.raises((ValueError, TypeError), match="tower"):
        lvlm.sites(tower="lang")
    with pytest.raises(ValueError, match="component must be one of"):
        lvlm.sites(component="hook_z")


def test_one_site_is_a_list_of_one(lvlm, picture):
    inputs = lvlm.prepare(Example("what is red", image=picture(0)))
    for one in ("blocks.0.hook_mlp_out", Site("language", 0, "hook_mlp_out")):
        _, cache = lvlm.run_with_cache(inputs, sites=one)
        assert list(cache) == ["blocks.0.hook_mlp_out"]
        assert set(lvlm.generate(inputs, max_new_tokens=2, sites=one).activations) == {"blocks.0.hook_mlp_out"}


def test_points_of_pictures_in_text_alone(lvlm):
    inputs = lvlm.prepare(Example("what is red"))
    with pytest.warns(UserWarning, match="projector.hook_out.*the batch holds no image"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("projector.hook_out", lambda a, hook: a)])
    with pytest.raises(ValueError, match="must hold an image"):
        lvlm.generate(inputs, max_new_tokens=2, sites=["projector.hook_out"])


def test_transformer_lens_names_of_the_vision_tower_are_warned_of(lvlm, picture):
    inputs = lvlm.prepare(Example("what is red", image=picture(0)))
    name = next(name for name in lvlm.bridge.hook_dict if name.startswith("vision_encoder.encoder_layers.0.attn"))
    with pytest.warns(UserWarning, match="an edit may do nothing"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[(name, lambda a, hook: None)])


@pytest.mark.parametrize("given", ["what is red", ["what is red"]])
def test_plain_strings_are_no_examples(lvlm, given):
    with pytest.raises(TypeError, match="examples"):
        lvlm.prepare(given)


def test_tensors_are_no_pictures():
    with pytest.raises(TypeError, match="image"):
        Example("what is red", image=torch.zeros(3, 8, 8))


def test_batches_of_no_rows_and_words_for_tokens(lvlm, picture):
    inputs = lvlm.prepare(Example("what is red", image=picture(0)))
    with pytest.raises(ValueError, match="at least one row"):
        inputs.rows([])
    with pytest.raises(TypeError, match="input"):
        lvlm.bind(inputs)("what is red")


def test_a_closed_one_says_so(llava_maker):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    lvlm.close()
    for ask in (lvlm.sites, lvlm.n_layers):
        with pytest.raises(RuntimeError, match="closed"):
            ask()
