"""Hooks at TransformerLens's own points: writing into the activation is the same as returning an edited one, and touches nothing else."""

import warnings
from contextlib import nullcontext

import pytest
import torch

POINTS = (
    "blocks.1.ln1.hook_normalized",
    "ln_final.hook_normalized",
    "blocks.1.attn.q.hook_in",
    "blocks.1.attn.hook_q",
    "blocks.1.mlp.hook_in",
    "blocks.1.ln2.hook_in",
)
SITES = ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "vision.blocks.0.hook_mlp_out")


def zeroed(activation, hook):
    return torch.zeros_like(activation)


def written(activation, hook):
    activation[...] = 0
    return activation


def written_and_kept_silent(activation, hook):
    activation[...] = 0


def read(activation, hook):
    assert activation.isfinite().all()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_writing_is_returning_and_the_batch_stays(lvlm, examples, mode):
    inputs = lvlm.prepare(examples)
    ids, pixels = inputs.input_ids.clone(), inputs.pixel_values.clone()
    with mode():
        plain = lvlm(inputs)
        for point in (*POINTS, *SITES):
            wanted = lvlm.run_with_hooks(inputs, fwd_hooks=[(point, zeroed)])
            assert (wanted - plain).abs().max() > 1e-5, point
            assert lvlm.run_with_hooks(inputs, fwd_hooks=[(point, written)]).equal(wanted), point
            if point in POINTS:
                assert lvlm.run_with_hooks(inputs, fwd_hooks=[(point, written_and_kept_silent)]).equal(wanted), point
                torch.testing.assert_close(
                    lvlm.run_with_hooks(inputs, fwd_hooks=[(point, read)]), plain, atol=1e-5, rtol=1e-5
                )
        lvlm.run_with_hooks(inputs, fwd_hooks=[("embed.hook_in", written_and_kept_silent)])
        assert lvlm(inputs).equal(plain)
    assert inputs.input_ids.equal(ids) and inputs.pixel_values.equal(pixels)


def test_reading_without_gradients_changes_no_bit(lvlm, examples):
    inputs = lvlm.prepare(examples)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # TransformerLens warns where a norm is computed in another way because something was returned
        plain = lvlm(inputs)
        assert lvlm.run_with_hooks(inputs, fwd_hooks=[(point, read) for point in POINTS]).equal(plain)


def test_an_activation_that_a_hook_keeps_has_a_gradient(lvlm, examples):
    inputs, kept = lvlm.prepare(examples), {}
    points = ("blocks.1.attn.q.hook_out", "blocks.1.ln1.hook_in", "blocks.1.mlp.hook_in")
    logits = lvlm.run_with_hooks(inputs, fwd_hooks=[(p, lambda a, hook: kept.update({hook.name: a})) for p in points])
    for name, gradient in zip(kept, torch.autograd.grad(logits[:, -1, 5].sum(), list(kept.values())), strict=True):
        assert gradient.abs().max() > 0, name


def test_a_point_through_which_nothing_flows_warns(lvlm, examples):
    with pytest.warns(UserWarning, match="an edit may do nothing"):
        lvlm.run_with_hooks(lvlm.prepare(examples), fwd_hooks=[("blocks.1.attn.hook_hidden_states", zeroed)])
