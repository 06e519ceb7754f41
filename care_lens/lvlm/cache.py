"""TransformerLens's activation cache, with a residual stream that adds up at image positions too."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

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

    def decompose_resid(self, layer: int | None = None, *args: Any, return_labels: bool = False, **kwargs: Any) -> Any:
        """TransformerLens's decomposition, with one component more for each block after which features are added.

        Args:
            layer: As in TransformerLens: up to the input of this block; None: up to the end.
            *args: As in TransformerLens.
            return_labels: Whether to return the components' labels too; those added are "0_deepstack" and so on.
            **kwargs: As in TransformerLens.

        Returns:
            [component, ..., d_model], and the labels if asked for.
        """
        components, labels = super().decompose_resid(layer, *args, return_labels=True, **kwargs)
        kept = kwargs.get("incl_embeds", True) and not kwargs.get("apply_ln") and kwargs.get("pos_slice") is None
        last = self.model.cfg.n_layers if layer in (None, -1) else layer
        for block in range(last if kept else 0):
            if (added := self.added_between(block)) is not None:
                components, labels = torch.cat([components, added[None]]), [*labels, f"{block}_deepstack"]
        return (components, labels) if return_labels else components
