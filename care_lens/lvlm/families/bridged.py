"""Bridge components for what TransformerLens leaves opaque: blocks of vision towers, attention left to Hugging Face."""

import inspect
from typing import Any

from transformer_lens.model_bridge.generalized_components import AttentionBridge, BlockBridge, LinearBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

_ALIASES = {
    "hook_resid_pre": "hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_in": "attn.hook_in",
    "hook_attn_out": "attn.hook_out",
    "hook_mlp_in": "mlp.hook_in",
    "hook_mlp_out": "mlp.hook_out",
}


class TowerBlock(GeneralizedComponent):
    """A block of a vision tower: runs the wrapped block and shows what goes in and what comes out.

    Its parts are :class:`GeneralizedComponent` throughout, which run the wrapped module as it is, so that no bit changes.

    Args:
        name: Path of the list of blocks inside the tower.
        norms: Names of the norms before attention and before the MLP.
        attn: Name of attention.
        attn_out: Name of its output projection; the others are ``q_proj``, ``k_proj`` and ``v_proj``.
        mlp: Name of the MLP.
        mlp_parts: Name on the bridge to name of the MLP's linear maps.
    """

    is_list_item = True

    def __init__(
        self,
        name: str,
        *,
        norms: tuple[str, str],
        attn: str,
        attn_out: str,
        mlp: str,
        mlp_parts: dict[str, str],
    ) -> None:
        projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": attn_out}
        super().__init__(
            name,
            submodules={
                "ln1": GeneralizedComponent(name=norms[0]),
                "attn": GeneralizedComponent(name=attn, submodules=_linears(projections)),
                "ln2": GeneralizedComponent(name=norms[1]),
                "mlp": GeneralizedComponent(name=mlp, submodules=_linears(mlp_parts)),
            },
            hook_alias_overrides=_ALIASES,
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; its stream may be given under whatever name the block has for it."""
        if not args and self.original_component is not None:
            first = next(iter(inspect.signature(self.original_component.forward).parameters))
            args = (kwargs.pop(first),)
        return super().forward(*args, **kwargs)


def _linears(names: dict[str, str]) -> dict[str, GeneralizedComponent]:
    return {key: LinearBridge(name=name) for key, name in names.items()}


def native_attention(blocks: GeneralizedComponent) -> None:
    """Leave a decoder's attention to Hugging Face, whatever its text model does there (query scales, sliding windows).

    Args:
        blocks: The decoder's blocks in an adapter's component mapping, with attention of TransformerLens's own; changed in place.
    """
    assert isinstance(blocks, BlockBridge)
    before = blocks.submodules["attn"]
    blocks.submodules["attn"] = AttentionBridge(
        name=before.name,
        config=before.config,
        submodules=before.submodules,
        maintain_native_attention=True,
        requires_attention_mask=True,
        requires_position_embeddings=True,
    )
