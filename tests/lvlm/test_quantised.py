"""Models quantised by bitsandbytes, on the CPU: as plain Hugging Face quantises them, with hooks that act."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from care_lens import organism
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import neuron_directions

pytest.importorskip("bitsandbytes")

CONFIGS = {
    "4 bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
    "8 bit": BitsAndBytesConfig(load_in_8bit=True),
}
SITE = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module", params=CONFIGS)
def twins(request):
    """A HookedLVLM and plain Hugging Face, loaded with one configuration."""
    where, how = str(organism.path()), CONFIGS[request.param]
    plain = AutoModelForImageTextToText.from_pretrained(where, quantization_config=how, attn_implementation="eager")
    with HookedLVLM.from_pretrained(where, quantization_config=how) as lvlm:
        yield lvlm, plain.eval()


@torch.no_grad()
def test_logits_and_answers_equal_plain_hugging_face(twins):
    lvlm, plain = twins
    assert any("bit" in type(module).__name__ for module in lvlm.hf_model.modules())
    inputs = lvlm.prepare(organism.examples("plain", "fit", n=2) + organism.examples("typographic", "fit", n=2))
    assert torch.equal(lvlm(inputs), plain(**inputs.model_kwargs()).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": lvlm.tokenizer.pad_token_id}
    expected = plain.generate(**inputs.generate_kwargs(), **options)
    assert torch.equal(lvlm.generate(inputs, max_new_tokens=8).sequences, expected)


@torch.no_grad()
def test_edits_act_and_writing_back_changes_nothing(twins):
    lvlm, plain = twins
    inputs = lvlm.prepare(organism.examples("typographic", "fit", n=2))
    before, cache = lvlm.run_with_cache(inputs, sites=[SITE])
    assert torch.equal(lvlm.run_with_hooks(inputs, fwd_hooks=[(SITE, lambda a, hook: cache[SITE])]), before)
    edited = lvlm.run_with_hooks(inputs, fwd_hooks=[(SITE, lambda a, hook: a * 0.5)])
    handle = plain.model.language_model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    try:
        assert torch.equal(edited, plain(**inputs.model_kwargs()).logits) and not torch.equal(edited, before)
    finally:
        handle.remove()


def test_packed_weights_are_no_neuron_directions(twins):
    lvlm, _ = twins
    with pytest.raises(ValueError, match="without quantisation"):
        list(neuron_directions(lvlm))
