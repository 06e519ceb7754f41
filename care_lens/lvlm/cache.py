"""TransformerLens's activation cache, with a residual stream that adds up at image positions too."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

_START = "blocks.0.hook_resid_pre"


class LVLMCache(ActivationCache):
    """Activations of a vision-language model, with all of TransformerLens's methods.

    What enters the language tower is not the token embeddings alone: image features take the place of those of the
    placeholders, and some models (DeepStack) add features again between the first blocks. So ``cache["hook_embed"]`` is what
    enters the first block, if that is in the cache, and :meth:`decompose_resid` has a component for what is added later.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: Any, *, has_batch_dim: bool = True) -> None:
        super().__init__(cache_dict, model, has_batch_dim)
        self.has_embed = self.has_embed or _START in cache_dict

    def __getitem__(self, key: Any) -> Tensor:
        """As in TransformerLens; ``"hook_embed"`` and ``"embed"`` are what enters the first block, if it is here."""
        if key in ("hook_embed", "embed") and _START in self.cache_dict:
            return self.cache_dict[_START]
        return super().__getitem__(key)

    def added_between(self, layer: int) -> Float[Tensor, "..."] | None:
        """What is added to the stream between a block and the next: DeepStack features, or None.

        Args:
            layer: The block; its ``hook_resid_post`` and the next one's ``hook_resid_pre`` must be in the cache to say.
        """
        after = self.cache_dict.get(f"blocks.{layer}.hook_resid_post")
        before = self.cache_dict.get(f"blocks.{layer + 1}.hook_resid_pre")
        if after is None or before is None or torch.equal(after, before):
            return None
        return before - after

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """TransformerLens's decomposition, with one component more for each block after which features are added.

        Args:
            layer: Up to the input of this block; None: up to the end.
            mlp_input: As in TransformerLens.
            mode: As in TransformerLens.
            apply_ln: As in TransformerLens.
            pos_slice: As in TransformerLens.
            incl_embeds: Whether to include what enters the language tower: "embed", and the features added later, which are
                labelled "0_deepstack" and so on.
            return_labels: Whether to return the components' labels too.

        Returns:
            [component, ..., d_model], and the labels if asked for.
        """
        shared = {"mlp_input": mlp_input, "pos_slice": pos_slice}
        components, labels = super().decompose_resid(
            layer, mode=mode, apply_ln=apply_ln, incl_embeds=incl_embeds, return_labels=True, **shared
        )
        last = self.model.cfg.n_layers if layer in (None, -1) else layer
        for block in range(last if incl_embeds else 0):
            if (added := self.added_between(block)) is not None:
                part = Slice(pos_slice).apply(added, dim=-2)[None]
                part = self.apply_ln_to_stack(part, last, **shared) if apply_ln else part
                components, labels = torch.cat([components, part]), [*labels, f"{block}_deepstack"]
        return (components, labels) if return_labels else components
