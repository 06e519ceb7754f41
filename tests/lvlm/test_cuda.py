"""Every family on a GPU: the numbers of plain Hugging Face there, and those of the CPU.

On a machine without a GPU all of it is skipped; ``CARE_LENS_TEST_DEVICE=cpu`` runs it on the CPU, to try the tests.
"""

from dataclasses import replace

import pytest
import torch
from on_device import DEVICE, exact, needs_device, require_equal
from test_every_family import SPECIMENS, bump
from zoo.plain import Plain

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM

pytestmark = needs_device


@pytest.fixture(autouse=True)
def exactly():
    with exact():
        yield


@pytest.fixture(scope="module", params=SPECIMENS)
def specimen(request):
    return SPECIMENS[request.param]


def plain_model(specimen, dtype=torch.float32):
    model, processor = specimen.make()
    model.set_attn_implementation("eager")
    # A dtype that is told makes real numbers of complex ones (the rotations of Llama4's pictures), float32 too.
    return (model.to(DEVICE) if dtype == torch.float32 else model.to(DEVICE, dtype)), processor


@pytest.fixture(scope="module")
def twins(specimen):
    """A HookedLVLM and a plain model of the same weights, on the device."""
    return HookedLVLM.from_hf(*plain_model(specimen)), plain_model(specimen)[0]


@pytest.fixture(scope="module")
def rows(picture):
    return [
        Example("what is in the picture", image=picture(0, (32, 32)), response="sure red"),
        Example("how to make a blue", response="sorry i cannot help"),
        Example("red", image=picture(1, (56, 28)), response="no"),
    ]


def greedy(plain, lvlm, inputs, tokens=6):
    """What plain Hugging Face generates."""
    pad = lvlm.tokenizer.pad_token_id
    return plain.generate(**inputs.generate_kwargs(), max_new_tokens=tokens, do_sample=False, pad_token_id=pad)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_equal_plain_hugging_face(twins, rows, side):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows, padding_side=side, responses=True)
    given = inputs.model_kwargs()
    assert {value.device.type for value in given.values()} == {torch.device(DEVICE).type}
    require_equal(lvlm(inputs), plain(**given).logits)


@pytest.mark.parametrize("rows_of", [[0], [1], [0, 1, 2]], ids=["image", "text", "mixed"])
def test_generation_equals_plain_hugging_face(twins, rows, rows_of):
    lvlm, plain = twins
    inputs = lvlm.prepare([rows[row] for row in rows_of])
    assert torch.equal(lvlm.generate(inputs, max_new_tokens=6).sequences, greedy(plain, lvlm, inputs))


@torch.no_grad()
def test_logits_are_those_of_the_cpu(specimen, twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    with HookedLVLM.from_hf(*specimen.make()) as here:
        expected = here(here.prepare(rows))
    real = inputs.attention_mask.bool()
    torch.testing.assert_close(lvlm(inputs)[real].cpu(), expected[real.cpu()], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_equals_hugging_face_and_takes_float32_hooks(specimen, rows, dtype):
    lvlm, plain = HookedLVLM.from_hf(*plain_model(specimen, dtype)), plain_model(specimen, dtype)[0]
    inputs = lvlm.prepare(rows)
    real = inputs.attention_mask.bool()
    clean = lvlm(inputs)
    assert clean.dtype == dtype
    # Where there is nothing but padding, float16 may hold NaN in both, which equals nothing.
    require_equal(clean[real], plain(**inputs.model_kwargs()).logits[real])
    if dtype == torch.bfloat16:
        assert torch.equal(lvlm.generate(inputs, max_new_tokens=4).sequences, greedy(plain, lvlm, inputs, 4))
    for site in lvlm.sites():
        if lvlm.site_info(site).editable and site.layer in (None, 1):
            same = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: a.float())])
            require_equal(same[real], clean[real], str(site))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_gives_the_numbers_of_plain_hugging_face(twins, rows, dtype):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows)
    real = inputs.attention_mask.bool()
    with torch.autocast(torch.device(DEVICE).type, dtype=dtype):
        ours, theirs = lvlm(inputs), plain(**inputs.model_kwargs()).logits
        answer, expected = lvlm.generate(inputs, max_new_tokens=4).sequences, greedy(plain, lvlm, inputs, 4)
    assert theirs.dtype == ours.dtype == dtype and bool(theirs[real].isfinite().all())
    require_equal(ours[real], theirs[real])
    assert torch.equal(answer, expected)


@torch.no_grad()
def test_caches_and_edits_are_those_of_plain_torch_hooks(specimen, twins, rows):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows)
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    require_equal(clean, lvlm(inputs))
    assert {value.device for value in cache.values()} == {lvlm.device}
    reference, real = Plain(specimen, plain, inputs), inputs.attention_mask.bool()
    tried = 0
    for site in lvlm.sites():
        if site.layer not in (None, 1):
            continue
        expected, held = reference.logits(site, bump), cache[str(site)]
        seen = reference.seen
        assert seen is not None, f"{site}: the reference never came there"
        if site.component == "attn.hook_pattern" and site.tower == "language":
            seen, held = seen.transpose(1, 2)[real], held.transpose(1, 2)[real]
        elif site.tower == "language":
            seen, held = seen[real].flatten(1), held[real].flatten(1)
        torch.testing.assert_close(held, seen, rtol=1e-3, atol=1e-4, msg=lambda m, s=site: f"{s} reads wrong: {m}")
        if lvlm.site_info(site).editable:
            edited = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: bump(a))])
            torch.testing.assert_close(
                edited[real], expected[real], rtol=1e-3, atol=1e-3, msg=lambda m, s=site: f"{s} edits wrong: {m}"
            )
            assert (edited - clean)[real].abs().max() > 1e-3, f"{site}: the edit does nothing"
            tried += 1
    assert tried >= 5


@torch.no_grad()
def test_writing_back_what_was_read_changes_no_bit(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    for site in lvlm.sites():
        if lvlm.site_info(site).editable:
            back = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook, held=cache[str(site)]: held)])
            require_equal(back, clean, str(site))


@torch.no_grad()
def test_hooks_are_gone_after_an_exception_in_a_pass_or_between_tokens(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    clean, answer = lvlm(inputs), lvlm.generate(inputs, max_new_tokens=3).sequences
    site, steps = "blocks.1.hook_resid_post", []

    def fail(activation, hook):
        steps.append(activation.shape[1])
        if len(steps) in (1, 3):  # in a forward pass; at the second step of generation
            raise RuntimeError("in the middle")
        return activation + 1

    with pytest.raises(RuntimeError, match="in the middle"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[(site, fail)])
    with pytest.raises(RuntimeError, match="in the middle"):
        lvlm.generate(inputs, max_new_tokens=3, min_new_tokens=3, fwd_hooks=[(site, fail)])
    assert steps[2] == 1
    require_equal(lvlm(inputs), clean)
    assert torch.equal(lvlm.generate(inputs, max_new_tokens=3).sequences, answer) and len(steps) == 3


@torch.no_grad()
def test_what_a_hook_returns_on_another_device_is_refused(twins, rows):
    lvlm, _ = twins
    other = "meta" if lvlm.device.type == "cpu" else "cpu"
    inputs = lvlm.prepare(rows)
    clean = lvlm(inputs)
    with pytest.raises(ValueError, match=f"on {other}"):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.1.hook_resid_post", lambda a, hook: a.to(other))])
    require_equal(lvlm(inputs), clean)


@torch.no_grad()
def test_a_model_that_is_moved_after_it_was_wrapped_takes_its_batches_along(specimen, twins, rows):
    lvlm, _ = twins
    with HookedLVLM.from_hf(*specimen.make()) as moved:
        moved(moved.prepare(rows))
        moved.hf_model.to(DEVICE)
        inputs = moved.prepare(rows)
        assert moved.device == lvlm.device == inputs.input_ids.device
        require_equal(moved(inputs), lvlm(lvlm.prepare(rows)))


def test_gradients_of_pixels_are_those_of_plain_hugging_face(twins, rows):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows)
    real, found = inputs.attention_mask.bool(), []
    for model in (lvlm, plain):
        pixels = inputs.pixel_values.detach().clone().requires_grad_()
        batch = replace(inputs, pixel_values=pixels)
        logits = lvlm(batch) if model is lvlm else plain(**batch.model_kwargs()).logits
        (gradient,) = torch.autograd.grad(logits[real].square().mean(), pixels)
        found.append(gradient)
    ours, theirs = found
    assert float(theirs.norm()) > 0
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
