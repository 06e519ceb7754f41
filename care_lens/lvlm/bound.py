"""A model with its images fixed, for TransformerLens's own tools, which know tokens only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import ActivationCache

from care_lens.core.display import LinesRepr
from care_lens.lvlm.cache import LVLMCache
from care_lens.lvlm.inputs import LVLMInputs
from care_lens.lvlm.plain import COPYING, refuse_copies

if TYPE_CHECKING:
    from care_lens.lvlm.hooked import HookedLVLM


class BoundLVLM(LinesRepr):
    """Satisfies TransformerLens's ``TransformerLensModel`` protocol; made by ``HookedLVLM.bind``.

    Tokens given to it must be of the bound batch's shape, with image placeholders at the same positions:
    pixels, mask and positions are the batch's. Attributes it does not have are the bridge's.
    """

    def __init__(self, lvlm: "HookedLVLM", inputs: LVLMInputs) -> None:
        self._lvlm = lvlm
        self.inputs = inputs
        self._fixed = {name: value for name, value in inputs.model_kwargs().items() if name != "input_ids"}

    def shown(self) -> tuple[str, dict[str, str]]:
        """Which model, and which batch."""
        batch, pos = self.inputs.input_ids.shape
        rows = {"batch": f"{batch} rows of {pos} positions, pictures fixed", "tokens": ".inputs.input_ids"}
        return f"BoundLVLM: {type(self._lvlm.hf_model).__name__}", rows

    @property
    def cfg(self) -> Any:
        """The bridge's configuration (of the language tower)."""
        return self._lvlm.bridge.cfg

    def __call__(self, input: Int[Tensor, "batch pos"], **kwargs: Any) -> Any:
        """The bridge's forward pass with the bound images."""
        with self._batch(input) as tokens:
            return self._lvlm.bridge(tokens, **self._fixed, **kwargs)

    def run_with_hooks(self, input: Int[Tensor, "batch pos"], **kwargs: Any) -> Any:
        """``TransformerBridge.run_with_hooks`` with the bound images."""
        with self._batch(input) as tokens:
            return self._lvlm.bridge.run_with_hooks(tokens, **self._fixed, **kwargs)

    def run_with_cache(self, input: Int[Tensor, "batch pos"], **kwargs: Any) -> Any:
        """``TransformerBridge.run_with_cache`` with the bound images; the cache is an :class:`LVLMCache`."""
        with self._batch(input) as tokens:
            logits, cache = self._lvlm.bridge.run_with_cache(tokens, **self._fixed, **kwargs)
        if isinstance(cache, ActivationCache):
            cache = LVLMCache(
                cache.cache_dict,
                self._lvlm.bridge,
                has_batch_dim=cache.has_batch_dim,
                image_rows=self.inputs.image_rows,
                batch_size=self.inputs.batch_size,
            )
        return logits, cache

    def to_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """``TransformerBridge.to_tokens``: words alone, without a chat template."""
        return self._lvlm.bridge.to_tokens(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises:
            TypeError: Always; it says what to do instead.
        """
        return refuse_copies("a bound model", COPYING)()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lvlm.bridge, name)

    @contextmanager
    def _batch(self, tokens: Tensor) -> Iterator[Tensor]:
        tokens = self._check(tokens)
        with self._lvlm.batch_hooks(replace(self.inputs, input_ids=tokens)):
            yield tokens

    def _check(self, tokens: Tensor) -> Tensor:
        image_token = self._lvlm.hf_model.config.image_token_id
        bound = self.inputs
        if not isinstance(tokens, Tensor):
            raise TypeError(
                f"input must be the bound batch's tokens, got {type(tokens).__name__}; give inputs.input_ids"
            )
        if tokens.shape != bound.input_ids.shape:
            raise ValueError(
                f"tokens must be of the bound batch's shape {tuple(bound.input_ids.shape)}, "
                f"got {tuple(tokens.shape)}; bind the batch they belong to"
            )
        tokens = tokens.to(bound.input_ids.device)
        if not torch.equal((tokens == image_token) & ~bound.spans.padding, bound.spans.image):
            raise ValueError("tokens must have image placeholders where the bound batch has them; bind another batch")
        return tokens
