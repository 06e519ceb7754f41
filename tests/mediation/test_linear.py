"""A linear LLaVA: NDE + NIE = TE, and every effect equals the value worked out by hand.

Norms are made the identity (an epsilon that dwarfs the variance, undone by the weight), attention uniform (no
queries and keys), MLPs silent. Then with A_l = W_O W_V of layer l and c_p the mean over positions up to p,
h_{l+1}[p] = h_l[p] + A_l c_p(h_l), and the logits are linear in the last position.
"""

import pytest
import torch

from care_lens.core import UnsafeMargin
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import mediate

BIG = 1e6


@pytest.fixture(scope="module")
def linear(llava_maker):
    model, processor = llava_maker("clip", num_key_value_heads=4, num_hidden_layers=2)
    decoder = model.model.language_model
    norms = [decoder.norm]
    with torch.no_grad():
        for layer in decoder.layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for norm in norms:
            norm.variance_epsilon = BIG**2
            norm.weight.fill_(BIG)
    mixers = [
        (layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight).detach().double() for layer in decoder.layers
    ]
    read_out = model.lm_head.weight.detach().double().clone()
    return HookedLVLM.from_hf(model, processor), mixers, read_out


def by_hand(delta, image, mixers, direction):
    """Effects of one pair, from the difference of its embeddings [pos, d]."""
    first, second = mixers
    n = len(delta)

    def upto(h):
        return h.cumsum(dim=0) / torch.arange(1, n + 1, dtype=h.dtype)[:, None]

    def forward(h):
        h = h + upto(h) @ first.T
        return direction @ (h + upto(h) @ second.T)[-1]

    attn0, only_image = upto(delta) @ first.T, delta * image[:, None]
    after0 = delta + attn0

    def from_layer_1(h):
        return direction @ (h + upto(h) @ second.T)[-1]

    last = torch.zeros_like(delta)
    last[-1] = 1
    return {
        "TE": forward(delta),
        ("blocks.0.hook_resid_pre", "all"): forward(delta),
        ("blocks.0.hook_resid_pre", "image"): forward(only_image),
        ("blocks.0.hook_resid_pre", "text"): forward(delta - only_image),
        ("blocks.0.hook_resid_pre", "last"): forward(delta * last),
        ("blocks.0.hook_attn_out", "all"): from_layer_1(attn0),
        ("blocks.0.hook_attn_out", "image"): from_layer_1(attn0 * image[:, None]),
        ("blocks.0.hook_attn_out", "last"): from_layer_1(attn0 * last),
        ("blocks.1.hook_resid_pre", "text"): from_layer_1(after0 * ~image[:, None]),
        ("blocks.1.hook_attn_out", "last"): direction @ (upto(after0) @ second.T)[-1],
        ("blocks.1.hook_attn_out", "image"): torch.tensor(0.0),
        ("blocks.1.hook_resid_post", "last"): forward(delta),
        ("blocks.0.hook_mlp_out", "all"): torch.tensor(0.0),
    }


def test_every_effect_is_what_was_worked_out(linear, pictured, read):
    lvlm, mixers, read_out = linear
    comply, refuse = lvlm.tokenizer.convert_tokens_to_ids(["sure", "sorry"])
    direction = read_out[comply] - read_out[refuse]
    cells = None
    for pair in (pictured[:1], pictured[1:2]):
        inputs = lvlm.prepare([*pair.safe, *pair.unsafe])
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=["blocks.0.hook_resid_pre"])
        safe, unsafe = cache["blocks.0.hook_resid_pre"].double()
        expected = by_hand(unsafe - safe, inputs.spans.image[0], mixers, direction)
        cells = [key for key in expected if key != "TE"]
        result = mediate(
            lvlm,
            pair,
            outcome=UnsafeMargin((comply,), (refuse,)),
            sites=sorted({site for site, _ in cells}),
            n_boot=10,
            progress=False,
        )
        scale = float(expected["TE"].abs()) + 1
        for site, position in cells:
            want = float(expected[site, position])
            te, nie, nde, tie, interaction = (
                read(result, site, position, name) for name in ("TE", "NIE", "NDE", "TIE", "interaction")
            )
            assert te == pytest.approx(float(expected["TE"]), abs=1e-4 * scale)
            assert nie == pytest.approx(want, abs=1e-4 * scale), (site, position)
            assert nde == pytest.approx(float(expected["TE"]) - want, abs=1e-4 * scale)
            assert nie + nde == pytest.approx(te, abs=1e-4 * scale)
            assert tie == pytest.approx(nie, abs=1e-4 * scale)
            assert interaction == pytest.approx(0.0, abs=1e-4 * scale)
    assert cells
