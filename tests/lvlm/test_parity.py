"""The same numbers as plain Hugging Face, with and without hooks, in one pass and step by step."""

import pytest
import torch

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def plain(lvlm, llava_maker):
    kind = "clip" if lvlm.hf_model.config.vision_config.model_type.startswith("clip") else "siglip"
    return llava_maker(kind)[0]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_plain_hugging_face(lvlm, plain, examples, side):
    inputs = lvlm.prepare(examples, padding_side=side)
    logits = lvlm(inputs)
    assert torch.equal(logits, plain(**inputs.model_kwargs()).logits)
    assert torch.equal(lvlm(inputs, logits_to_keep=2), logits[:, -2:])
    assert torch.equal(lvlm.run_with_cache(inputs, sites=["blocks.0.hook_mlp_out"])[0], logits)


@torch.no_grad()
def test_one_row_equals_what_the_processor_alone_would_give(lvlm, plain, examples):
    for example in examples:
        inputs = lvlm.prepare(example)
        text = lvlm.processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}] * (example.image is not None)
                    + [{"type": "text", "text": example.prompt}],
                }
            ],
            add_generation_prompt=True,
        )
        raw = lvlm.processor(text=text, images=example.image, return_tensors="pt")
        assert torch.equal(raw["input_ids"], inputs.input_ids)
        assert torch.equal(plain(**raw).logits, lvlm(inputs))


@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_batch(lvlm, examples):
    inputs = lvlm.prepare(examples)
    batch = lvlm(inputs)
    for row, example in enumerate(examples):
        alone = lvlm(lvlm.prepare(example))[0]
        torch.testing.assert_close(batch[row][~inputs.spans.padding[row]], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2]], ids=["image", "text", "mixed"])
def test_generation_equals_plain_hugging_face(lvlm, plain, examples, rows):
    inputs = lvlm.prepare([examples[row] for row in rows])
    ours = lvlm.generate(inputs, max_new_tokens=7)
    theirs = plain.generate(**inputs.generate_kwargs(), max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.sequences, theirs)
    assert torch.equal(ours.new_tokens, theirs[:, inputs.input_ids.shape[1] :])
    assert ours.texts == lvlm.tokenizer.batch_decode(ours.new_tokens, skip_special_tokens=True)


def test_hooks_act_at_prefill_and_at_each_step(lvlm, plain, examples):
    inputs, shapes, images = lvlm.prepare(examples), [], []
    vector = torch.linspace(-4, 4, 32)

    def add(activation, hook):
        shapes.append(tuple(activation.shape))
        return activation + vector

    def see(activation, hook):
        images.append(activation.shape[0])

    ours = lvlm.generate(
        inputs, max_new_tokens=5, fwd_hooks=[("blocks.1.hook_resid_post", add), ("projector.hook_out", see)]
    )
    handle = plain.model.language_model.layers[1].register_forward_hook(lambda module, args, out: out + vector)
    theirs = plain.generate(**inputs.generate_kwargs(), max_new_tokens=5, do_sample=False, pad_token_id=0)
    handle.remove()
    assert torch.equal(ours.sequences, theirs)
    assert shapes[0] == (3, inputs.input_ids.shape[1], 32) and set(shapes[1:]) == {(3, 1, 32)}
    assert len(shapes) == ours.new_tokens.shape[1]
    assert images == [2]
    assert not torch.equal(ours.new_tokens, lvlm.generate(inputs, max_new_tokens=5).new_tokens)


def test_teacher_forcing_predicts_what_was_generated(lvlm, examples):
    generation = lvlm.generate(lvlm.prepare(examples[0]), max_new_tokens=4)
    answer = " ".join(generation.texts[0].split())
    inputs = lvlm.prepare(Example(examples[0].prompt, image=examples[0].image, response=answer), responses=True)
    with torch.no_grad():
        predicted = lvlm(inputs).argmax(-1)[0]
    start = inputs.spans.last_index()[0]
    forced = inputs.input_ids[0][inputs.spans.response[0]]
    n = len(forced) - 1
    assert torch.equal(predicted[start : start + n], forced[:n])


def test_generation_refuses_batches_that_do_not_end_with_the_prompt(lvlm, examples):
    for inputs in (lvlm.prepare(examples, responses=True), lvlm.prepare(examples, padding_side="right")):
        with pytest.raises(ValueError, match="must end with the prompt"):
            lvlm.generate(inputs)


def test_gradients_reach_pixels_and_hooks_unless_turned_off(lvlm, examples):
    from dataclasses import replace

    inputs = lvlm.prepare(examples)
    pixels = inputs.pixel_values.clone().requires_grad_()
    inputs = replace(inputs, pixel_values=pixels)
    kept = {}

    def keep(activation, hook):
        activation.retain_grad()
        kept["mid"] = activation

    logits = lvlm.run_with_hooks(
        inputs,
        fwd_hooks=[
            ("blocks.1.hook_resid_mid", keep),
            ("vision.blocks.1.hook_resid_mid", lambda a, hook: a * 1.1),
        ],
    )
    logits[:, -1].logsumexp(-1).sum().backward()
    assert pixels.grad.abs().sum() > 0 and kept["mid"].grad.abs().sum() > 0
    with torch.no_grad():
        assert not lvlm(inputs).requires_grad


def test_float32_hooks_work_on_a_bfloat16_model(llava_maker, examples):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip", dtype=torch.bfloat16))
    inputs = lvlm.prepare(examples)
    with torch.no_grad():
        clean = lvlm(inputs)
        for site in lvlm.sites():
            if lvlm.site_info(site).editable:
                same = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: a.float())])
                assert same.dtype == torch.bfloat16 and torch.equal(same, clean), site
    assert (
        len(
            lvlm.generate(
                inputs, max_new_tokens=2, fwd_hooks=[("blocks.0.hook_mlp_out", lambda a, hook: a.float())]
            ).texts
        )
        == 3
    )


def test_a_saved_model_loads(tmp_path, llava_maker, examples):
    model, processor = llava_maker("clip")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with HookedLVLM.from_pretrained(tmp_path) as lvlm, torch.no_grad():
        inputs = lvlm.prepare(examples)
        assert torch.equal(lvlm(inputs), model(**inputs.model_kwargs()).logits)
        assert lvlm.dtype == torch.float32 and lvlm.device.type == "cpu"
