"""LLaVA with either tower."""

from zoo.specimen import Specimen
from zoo.tiny import make_llava

_DECODER = {
    "hook_resid_pre": ("", "in"),
    "attn.hook_z": ("self_attn.o_proj", "in"),
    "hook_attn_out": ("self_attn", "out"),
    "mlp.hook_post": ("mlp.down_proj", "in"),
    "hook_mlp_out": ("mlp", "out"),
    "hook_resid_post": ("", "out"),
}
_ENCODER = {**_DECODER, "attn.hook_z": ("self_attn.out_proj", "in"), "mlp.hook_post": ("mlp.fc2", "in")}
_OUTSIDE = {
    "vision.hook_embed": ("model.vision_tower.embeddings", "out"),
    "projector.hook_in": ("model.multi_modal_projector", "in"),
    "projector.hook_out": ("model.multi_modal_projector", "out"),
}


def _specimen(kind: str) -> Specimen:
    models = "transformers.models"
    return Specimen(
        name=f"llava-{kind}",
        make=lambda: make_llava(kind),
        language_layers="model.language_model.layers",
        vision_layers="model.vision_tower.encoder.layers",
        language=_DECODER,
        vision=_ENCODER,
        outside=_OUTSIDE,
        mid="post_attention_layernorm",
        vision_mid="layer_norm2",
        language_eager=(f"{models}.llama.modeling_llama", "eager_attention_forward"),
        vision_eager=(f"{models}.{kind}.modeling_{kind}", "eager_attention_forward"),
        depth=3,
    )


SPECIMENS = [_specimen("clip"), _specimen("siglip")]
