"""A LLaVA whose language tower is linear: norms are the identity, attention uniform, MLPs linear or silent."""

import torch

from care_lens.lvlm import HookedLVLM

BIG = 1e6


def straight(llava_maker, *, layers: int = 2, mlps: bool = False) -> HookedLVLM:
    """Norms divide by a constant that their weights undo; queries and keys are zero; MLPs write nothing, or are linear."""
    model, processor = llava_maker("clip", num_key_value_heads=4, num_hidden_layers=layers)
    decoder = model.model.language_model
    norms = [decoder.norm]
    with torch.no_grad():
        for layer in decoder.layers:
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
            if mlps:
                # One branch of the gated MLP is made a constant: h -> down(up(h)).
                layer.mlp.act_fn = Ones()
            else:
                layer.mlp.down_proj.weight.zero_()
        for norm in norms:
            norm.variance_epsilon = BIG**2
            norm.weight.fill_(BIG)
    return HookedLVLM.from_hf(model, processor)


class Ones(torch.nn.Module):
    """1 whatever it is given."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(value)
