"""Hooks at TransformerLens's own points: writing into the activation is refused where it would do nothing or too much, a returned copy acts."""

import pytest
import torch

from care_lens.lvlm.errors import HookError

POINTS = ("blocks.1.ln1.hook_normalized", "ln_final.hook_normalized", "blocks.1.attn.q.hook_in")
SITES = ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "vision.blocks.0.hook_mlp_out")


def zeroed(activation, hook):
    return torch.zeros_like(activation)


def written(activation, hook):
    activation[...] = 0
    return activation


@torch.no_grad()
def test_writing_is_refused_where_it_would_lie_and_nothing_stays(lvlm, examples):
    inputs = lvlm.prepare(examples)
    plain = lvlm(inputs)
    for point in POINTS:
        assert (lvlm.run_with_hooks(inputs, fwd_hooks=[(point, zeroed)]) - plain).abs().max() > 1e-4, point
        with pytest.raises(HookError, match=rf"a hook at {point}.* must not write into the activation"):
            lvlm.run_with_hooks(inputs, fwd_hooks=[(point, written)])
        assert lvlm(inputs).equal(plain)
    for site in SITES:
        assert lvlm.run_with_hooks(inputs, fwd_hooks=[(site, written)]).equal(
            lvlm.run_with_hooks(inputs, fwd_hooks=[(site, zeroed)])
        ), site


def test_a_point_through_which_nothing_flows_warns(lvlm, examples):
    with pytest.warns(UserWarning, match="an edit may do nothing"):
        lvlm.run_with_hooks(lvlm.prepare(examples), fwd_hooks=[("blocks.1.attn.hook_hidden_states", zeroed)])
