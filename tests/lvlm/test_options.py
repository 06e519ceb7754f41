"""Options of generation: what is not given is not passed, contradictions are refused, and the settings tell what was used."""

import pytest
import torch
from transformers import GenerationConfig

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import GenerationOptionError


@pytest.fixture()
def twins(llava_maker):
    plain, _ = llava_maker("clip")
    plain.set_attn_implementation("eager")
    return HookedLVLM.from_hf(*llava_maker("clip")), plain


@pytest.fixture()
def inputs(twins, picture):
    return twins[0].prepare([Example("what is red", image=picture(0)), Example("how to make a blue")])


def both(twins, inputs, options, own=None):
    """Our sequences and Hugging Face's, drawn with the same seed."""
    lvlm, plain = twins
    for model in (lvlm.hf_model, plain):
        for name, value in (own or {}).items():
            setattr(model.generation_config, name, value)
    torch.manual_seed(0)
    ours = lvlm.generate(inputs, **options).sequences
    torch.manual_seed(0)
    pad = {} if "generation_config" in options else {"pad_token_id": lvlm.tokenizer.pad_token_id}
    theirs = plain.generate(**inputs.generate_kwargs(), **options, **pad)
    return ours, theirs


CASES = {
    "config": ({"generation_config": GenerationConfig(max_new_tokens=3, do_sample=True, pad_token_id=0)}, {}),
    "max_length": ({"max_length": 40}, {}),
    "length of the config": ({"generation_config": GenerationConfig(max_length=40, pad_token_id=0)}, {}),
    "the model's own": ({}, {"max_new_tokens": 5, "do_sample": True, "temperature": 3.0}),
    "the model's own length, ours sampled": ({"do_sample": True}, {"max_new_tokens": 4}),
    "ours before the model's own": (
        {"max_new_tokens": 2, "do_sample": False},
        {"max_new_tokens": 5, "do_sample": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_hugging_face_with_the_same_options(twins, inputs, case):
    ours, theirs = both(twins, inputs, *CASES[case])
    assert torch.equal(ours, theirs)


def test_a_total_length_is_not_overruled_by_the_models_own_number_of_new_tokens(twins, inputs):
    lvlm, _ = twins
    length = inputs.input_ids.shape[1] + 3
    expected = lvlm.generate(inputs, max_new_tokens=3, min_new_tokens=3).sequences
    lvlm.hf_model.generation_config.max_new_tokens = 7
    for options in ({"max_length": length}, {"generation_config": GenerationConfig(max_length=length)}):
        assert torch.equal(lvlm.generate(inputs, min_new_tokens=3, **options).sequences, expected)
        assert "max_new_tokens" not in lvlm.generation_settings(**options)


def test_nothing_given_is_32_tokens_by_the_likeliest(twins, inputs):
    lvlm, _ = twins
    torch.manual_seed(0)
    found = lvlm.generate(inputs, min_new_tokens=40)
    assert found.new_tokens.shape[1] == 32
    assert torch.equal(found.new_tokens, lvlm.generate(inputs, min_new_tokens=40).new_tokens)
    assert lvlm.generation_settings() == {**lvlm.generation_settings(), "max_new_tokens": 32, "do_sample": False}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_new_tokens": 3, "max_length": 40}, "one length"),
        ({"max_new_tokens": 3, "generation_config": GenerationConfig(max_length=40)}, "one length"),
        ({"max_length": 30, "generation_config": GenerationConfig(max_new_tokens=4)}, "one length"),
        ({"generation_config": GenerationConfig(max_length=40, max_new_tokens=4)}, "one length"),
        ({"max_new_tokens": 3, "generation_config": GenerationConfig(max_new_tokens=4)}, "given once"),
        ({"do_sample": False, "generation_config": GenerationConfig(do_sample=True)}, "given once"),
        ({"do_sample": True, "generation_config": GenerationConfig(do_sample=False)}, "given once"),
        ({"temperature": 0.3, "generation_config": GenerationConfig(temperature=0.7)}, "given once"),
        ({"max_new_tokens": 0}, "from 1"),
        ({"max_length": -3}, "from 1"),
        ({"max_length": True}, "from 1"),
        ({"generation_config": GenerationConfig(use_cache=False)}, "without a cache"),
    ],
)
def test_contradictions_are_refused(twins, inputs, options, match):
    lvlm, _ = twins
    for call in (lambda: lvlm.generate(inputs, **options), lambda: lvlm.generation_settings(**options)):
        with pytest.raises(GenerationOptionError, match=match):
            call()


def test_options_that_agree_are_taken_and_a_dict_is_no_configuration(twins, inputs):
    lvlm, _ = twins
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    found = lvlm.generate(inputs, max_new_tokens=4, do_sample=False, generation_config=config, min_new_tokens=4)
    assert found.new_tokens.shape[1] == 4
    with pytest.raises(TypeError, match="GenerationConfig"):
        lvlm.generate(inputs, generation_config={"max_new_tokens": 3})
