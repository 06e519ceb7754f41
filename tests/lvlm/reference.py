"""An independent forward pass of LLaVA, written out over the plain modules, with one edit anywhere.

It shares nothing with the bridge: no hook points, no output recording. ``Edit`` says at which site what is
done to the activation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv


@dataclass
class Edit:
    site: str
    fn: Callable[[Tensor], Tensor]
    seen: Tensor | None = None

    def __call__(self, name: str, activation: Tensor) -> Tensor:
        if name != self.site:
            return activation
        self.seen = activation
        return self.fn(activation)


def forward(model, inputs, edit: Edit) -> Tensor:
    """Logits of a batch with the edit."""
    core = model.model
    hidden = core.language_model.embed_tokens(inputs.input_ids)
    if inputs.pixel_values is not None:
        features = project(model, vision(model, inputs.pixel_values, edit), edit)
        hidden = hidden.clone()
        hidden[inputs.spans.image] = features.flatten(0, 1)
    return language(model, hidden, inputs, edit)


def vision(model, pixels: Tensor, edit: Edit) -> Tensor:
    tower, config = model.model.vision_tower, model.config
    hidden = edit("vision.hook_embed", tower.embeddings(pixels))
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    states = [hidden]
    for i, layer in enumerate(tower.encoder.layers):
        at = f"vision.blocks.{i}."
        hidden = edit(at + "hook_resid_pre", hidden)
        attention = layer.self_attn
        x = layer.layer_norm1(hidden)
        heads = config.vision_config.num_attention_heads
        q, k, v = (p(x).unflatten(-1, (heads, -1)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        pattern = edit(at + "attn.hook_pattern", scores.softmax(-1))
        z = edit(at + "attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        mid = hidden + edit(at + "hook_attn_out", attention.out_proj(z.flatten(2)))
        mid = edit(at + "hook_resid_mid", mid)
        post = edit(at + "mlp.hook_post", layer.mlp.activation_fn(layer.mlp.fc1(layer.layer_norm2(mid))))
        hidden = edit(at + "hook_resid_post", mid + edit(at + "hook_mlp_out", layer.mlp.fc2(post)))
        states.append(hidden)
    taps = config.vision_feature_layer
    taps = [taps] if isinstance(taps, int) else taps
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([states[tap][:, first:] for tap in taps], dim=-1)


def project(model, features: Tensor, edit: Edit) -> Tensor:
    projector = model.model.multi_modal_projector
    hidden = projector.linear_1(edit("projector.hook_in", features))
    return edit("projector.hook_out", projector.linear_2(projector.act(hidden)))


def language(model, hidden: Tensor, inputs, edit: Edit) -> Tensor:
    tower, config = model.model.language_model, model.config.text_config
    cos_sin = tower.rotary_emb(hidden, inputs.position_ids)
    n = hidden.shape[1]
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & inputs.attention_mask.bool()[:, None, None, :]
    bias = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
    groups = config.num_attention_heads // config.num_key_value_heads
    for i, layer in enumerate(tower.layers):
        at = f"blocks.{i}."
        hidden = edit(at + "hook_resid_pre", hidden)
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        scores = q @ repeat_kv(k, groups).transpose(-1, -2) * attention.head_dim**-0.5 + bias
        pattern = edit(at + "attn.hook_pattern", scores.softmax(-1))
        z = edit(at + "attn.hook_z", (pattern @ repeat_kv(v, groups)).transpose(1, 2))
        mid = hidden + edit(at + "hook_attn_out", attention.o_proj(z.flatten(2)))
        mid = edit(at + "hook_resid_mid", mid)
        x, mlp = layer.post_attention_layernorm(mid), layer.mlp
        post = edit(at + "mlp.hook_post", mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        hidden = edit(at + "hook_resid_post", mid + edit(at + "hook_mlp_out", mlp.down_proj(post)))
    return model.lm_head(tower.norm(hidden))
