"""Sampling, several answers a row, beams, kept activations, and what generation refuses."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig
from zoo.tiny import make_llava

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def plain():
    return make_llava("clip")[0]


@pytest.fixture(scope="module")
def clip():
    return HookedLVLM.from_hf(*make_llava("clip"))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
    ],
)
def test_other_ways_of_decoding_equal_plain_hugging_face(clip, plain, examples, options):
    inputs = clip.prepare(examples)
    torch.manual_seed(5)
    ours = clip.generate(inputs, max_new_tokens=5, **options)
    torch.manual_seed(5)
    options = {"do_sample": False, **options}
    theirs = plain.generate(**inputs.generate_kwargs(), max_new_tokens=5, pad_token_id=0, **options)
    assert torch.equal(ours.sequences, theirs) and len(ours.texts) == len(theirs)


def test_hooks_of_a_batch_get_the_spans_of_all_its_copies(clip, examples):
    inputs, seen = clip.prepare(examples), []

    def make(batch):
        seen.append(batch)
        image = batch.spans.image

        def shift(activation, hook):
            return activation + 3.0 * image[..., None] if activation.shape[1] == image.shape[1] else activation

        return [("blocks.1.hook_resid_post", shift)]

    torch.manual_seed(1)
    with clip.hooks_for_each_batch(make):
        three = clip.generate(inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert seen[0].batch_size == 9 and seen[0].image_rows == (0, 1, 2, 6, 7, 8)
    copies = clip.prepare([e for e in examples for _ in range(3)])
    torch.manual_seed(1)
    with clip.hooks_for_each_batch(make):
        by_hand = clip.generate(copies, max_new_tokens=4, do_sample=True)
    assert torch.equal(three.sequences, by_hand.sequences)


@torch.no_grad()
def test_kept_activations_are_those_of_a_teacher_forced_run(clip, examples):
    example = examples[0]
    sites = ["blocks.0.attn.hook_z", "blocks.2.hook_resid_post", "vision.blocks.1.hook_mlp_out", "projector.hook_out"]
    generation = clip.generate(clip.prepare(example), max_new_tokens=4, sites=sites)
    assert set(generation.activations) == set(sites)
    n = generation.sequences.shape[1] - 1
    answer = " ".join(generation.texts[0].split())
    forced = clip.prepare(Example(example.prompt, image=example.image, response=answer), responses=True)
    _, cache = clip.run_with_cache(forced, sites=sites)
    for site in sites:
        kept, held = generation.activations[site], cache[site]
        if site.startswith("blocks"):
            assert kept.shape[1] == n
            m = min(n, held.shape[1])
            kept, held = kept[:, :m], held[:, :m]
        torch.testing.assert_close(kept, held, rtol=1e-4, atol=1e-4)


def test_what_hooks_would_not_see_once_is_refused(clip, plain, examples):
    inputs = clip.prepare(examples[1])
    for name, value in (
        ("assistant_model", plain),
        ("prompt_lookup_num_tokens", 2),
        ("prefill_chunk_size", 4),
        ("guidance_scale", 2.0),
        ("use_cache", False),
        ("return_dict_in_generate", True),
    ):
        with pytest.raises(ValueError, match=rf"got \['{name}'\].*not defined here"):
            clip.generate(inputs, **{name: value})
    with pytest.raises(ValueError, match="num_beams must be 1"):
        clip.generate(inputs, num_beams=2, sites=["blocks.0.hook_mlp_out"])
    with clip.hooks_for_each_batch(lambda batch: []), pytest.raises(ValueError, match="num_beams must be 1"):
        clip.generate(inputs, num_beams=2)
    with pytest.raises(ValueError, match="keep their shape"):
        clip.generate(inputs, sites=["blocks.0.attn.hook_pattern"])


def test_options_of_the_models_own_generation_config_count(clip, examples, monkeypatch):
    inputs, given = clip.prepare(examples), GenerationConfig(pad_token_id=0)
    monkeypatch.setattr(clip.hf_model.generation_config, "num_beams", 2)
    with pytest.raises(ValueError, match="num_beams must be 1"):
        clip.generate(inputs, sites=["blocks.0.hook_mlp_out"], generation_config=given)
    monkeypatch.undo()
    monkeypatch.setattr(clip.hf_model.generation_config, "do_sample", True)
    monkeypatch.setattr(clip.hf_model.generation_config, "num_return_sequences", 2)
    found = clip.generate(
        inputs, max_new_tokens=3, do_sample=True, sites=["projector.hook_out"], generation_config=given
    )
    assert len(found.texts) == 6 and len(found.activations["projector.hook_out"]) == 4


def test_placeholders_without_pixels_are_refused_on_the_bridge_too(clip, examples):
    inputs = clip.prepare(examples)
    with pytest.raises(ValueError, match="image placeholders alone"):
        clip.bridge(inputs.input_ids)
    with pytest.raises(ValueError, match="image placeholders alone"):
        clip(replace(inputs, pixel_values=None))
    with pytest.raises(TypeError, match="LVLMInputs"):
        clip(inputs.input_ids)
