"""TransformerLens's activation cache, with a residual stream that adds up at image positions too."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from care_lens.core.display import as_html, as_text
from care_lens.core.held import not_held
from care_lens.core.site import Site
from care_lens.lvlm.display import shown_cache
from care_lens.lvlm.plain import refuse_copies

_START, _SCALE = "blocks.0.hook_resid_pre", "ln_final.hook_scale"
_PICTURES = ("vision", "projector.")
"""How the names of activations about pictures begin, the sites' and TransformerLens's own."""


def _lacking(scale: str, what: str) -> str:
    """What to do where a norm's scale is not in the cache."""
    return (
        f"the cache must hold {scale!r} for {what}, which is no site; take it with "
        "lvlm.bind(inputs).run_with_cache(inputs.input_ids)"
    )


class LVLMCache(ActivationCache):
    """Activations of a vision-language model, with all of TransformerLens's methods.

    What enters the language tower is not the token embeddings alone: image features take the place of those of the
    placeholders, and some models (DeepStack) add features again between the first blocks. So ``cache["hook_embed"]`` is what
    enters the first block, if that is in the cache, and :meth:`decompose_resid` has a component for what is added later.

    The first axis of the language tower's activations is the batch; that of the vision tower's and the projector's goes over
    the pictures (or their tiles) of all rows, of which a row may have none or several.

    Args:
        cache_dict: Activations by name.
        model: The bridge.
        has_batch_dim: Whether language activations have the batch axis.
        image_rows: The row of each entry of vision activations; None: not known, so that rows cannot be taken.
        batch_size: Number of rows; None: the first axis of the language tower's activations.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        *,
        has_batch_dim: bool = True,
        image_rows: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(cache_dict, model, has_batch_dim)
        self.has_embed = self.has_embed or _START in cache_dict
        self.image_rows = None if image_rows is None else tuple(image_rows)
        self._rows = batch_size

    def __repr__(self) -> str:
        return as_text(*shown_cache(self.cache_dict, self._rows, type(self).__name__))

    def _repr_html_(self) -> str:
        return as_html(*shown_cache(self.cache_dict, self._rows, type(self).__name__))

    def __deepcopy__(self, memo: Any) -> "LVLMCache":
        """A cache of copies of the activations, of the same model."""
        copies = {name: value.detach().clone() for name, value in self.cache_dict.items()}
        return type(self)(
            copies, self.model, has_batch_dim=self.has_batch_dim, image_rows=self.image_rows, batch_size=self._rows
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises:
            TypeError: Always; it says what to do instead.
        """
        return refuse_copies(
            "a cache", "write its tensors, cache.cache_dict, with safetensors.torch.save_file(cache.cache_dict, file)"
        )()

    def __getitem__(self, key: Any) -> Tensor:
        """As in TransformerLens, and by site.

        Args:
            key: A name, a shorthand of TransformerLens's, or a ``Site``. ``"hook_embed"`` and ``"embed"`` are what enters the first
                block, if it is here. ``hook.name``, which is TransformerLens's own name of the point that a hook runs at, finds
                the site's activation.

        Raises:
            NotHeldError: If it is not here; the message names what is. It is a KeyError.
        """
        if isinstance(key, Site):
            key = str(key)
        if key in ("hook_embed", "embed") and _START in self.cache_dict:
            return self.cache_dict[_START]
        if isinstance(key, str) and key not in self.cache_dict:
            registry = getattr(self.model, "_hook_registry", {})
            for name in self.cache_dict:
                if name in registry and registry[name].name == key:
                    return self.cache_dict[name]
        try:
            return super().__getitem__(key)
        except (KeyError, TypeError, IndexError) as error:
            raise not_held(
                "activation", key, self.cache_dict, advice="run_with_cache keeps the sites it is given, sites=[...]"
            ) from error

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: Any,
        incorrect_tokens: Any = None,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """TransformerLens's direct logit attribution, with the final norm's weight, which the bridge does not fold. Components
        that add up to the final residual stream have attributions that add up to the logits (before a soft cap, where the
        model has one).

        Args:
            residual_stack: [component, ..., d_model], before the final norm.
            tokens: As in TransformerLens.
            incorrect_tokens: As in TransformerLens.
            pos_slice: As in TransformerLens.
            batch_slice: As in TransformerLens.
            has_batch_dim: As in TransformerLens.

        Raises:
            ValueError: If the final norm's scale is not in the cache, or that norm is not an RMS norm.
        """
        if _SCALE not in self.cache_dict:
            raise ValueError(_lacking(_SCALE, "logits"))
        if self._uses_ln_centering(self.model.cfg.n_layers):
            raise ValueError(
                "the final norm must be an RMS norm: a layer norm's weight cannot be applied before it centres"
            )
        ones = torch.ones(1, 1, self.model.cfg.d_model, device=residual_stack.device, dtype=residual_stack.dtype)
        with torch.no_grad():
            gain = (self.model.ln_final(ones) - self.model.ln_final(-ones))[0, 0] / 2 * (1 + self.model.cfg.eps) ** 0.5
        return super().logit_attrs(
            residual_stack * gain.to(residual_stack.dtype),
            tokens,
            incorrect_tokens,
            pos_slice,
            batch_slice,
            has_batch_dim,
        )

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens.

        Raises:
            ValueError: If the model norms or scales what attention writes: heads then do not add up to it.
        """
        self._require_plain("hook_attn_out", "attn.hook_out")
        return super().stack_head_results(*args, **kwargs)

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens.

        Raises:
            ValueError: If the model norms or scales what the MLP writes: neurons then do not add up to it.
        """
        self._require_plain("hook_mlp_out", "mlp.hook_out")
        return super().stack_neuron_results(*args, **kwargs)

    def get_full_resid_decomposition(self, layer: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in TransformerLens.

        Raises:
            ValueError: If the model norms or scales what a branch writes, or adds features between blocks (DeepStack): the
                components would not add up to the stream.
        """
        self._require_plain("hook_attn_out", "attn.hook_out")
        self._require_plain("hook_mlp_out", "mlp.hook_out")
        last = self.model.cfg.n_layers if layer in (None, -1) else layer
        if added := [block for block in range(last) if self.added_between(block) is not None]:
            raise ValueError(
                f"this model adds picture features after blocks {added}, which heads and neurons do not write; use decompose_resid"
            )
        return super().get_full_resid_decomposition(layer, *args, **kwargs)

    def _require_plain(self, component: str, native: str) -> None:
        registry = getattr(self.model, "_hook_registry", {})
        name = f"blocks.0.{component}"
        if name in registry and registry[name].name != f"blocks.0.{native}":
            raise ValueError(
                f"this model norms or scales what its branches write ({name} is not {native}), so that heads and neurons do "
                "not add up to it; use decompose_resid, or exchange them with care_lens.mediation"
            )

    def _batch_size(self) -> int:
        """Number of rows, which the entries of vision activations say nothing about."""
        if self._rows is not None:
            return self._rows
        language = [value for name, value in self.cache_dict.items() if name.startswith("blocks.")]
        return len(language[0]) if language else super()._batch_size()

    def remove_batch_dim(self, batch_size: int | None = None) -> ActivationCache:
        """As in TransformerLens; the batch is that of the language tower, since pictures may be cut in tiles. Vision activations
        lose their first axis where the row has one picture in one piece.

        Args:
            batch_size: The batch size, if it is known better.
        """
        return super().remove_batch_dim(self._batch_size() if batch_size is None else batch_size)

    def apply_slice_to_batch_dim(self, batch_slice: Any) -> "LVLMCache":
        """The cache of some rows, as if they had been run alone (but for padding).

        Args:
            batch_slice: As in TransformerLens: a number (whose row loses its batch axis, as :meth:`remove_batch_dim` does), a slice,
                indices or None.

        Returns:
            Their cache: of vision activations the entries of those rows' pictures. Rows without any have none.

        Raises:
            ValueError: If there is no batch axis, a row is not there, it is not known whose the pictures are, or an activation about
                pictures has other entries than the batch (TransformerLens's own points in towers that lay all pictures in one row).
        """
        wanted = batch_slice if isinstance(batch_slice, Slice) else Slice(batch_slice)
        if wanted.mode == "identity":
            return self._with(dict(self.cache_dict), self.has_batch_dim, self.image_rows, self._rows)
        if not self.has_batch_dim:
            raise ValueError("the cache must have its batch axis for rows to be taken, got one that was removed")
        n = self._batch_size()
        try:
            kept = wanted.apply(torch.arange(n), dim=0).reshape(-1).tolist()
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"batch_slice must name rows of the batch of {n}, got {batch_slice!r}") from error
        if not kept:
            raise ValueError(f"batch_slice must name at least one row of the batch of {n}, got {batch_slice!r}")
        single = wanted.mode == "int"
        owners = self.image_rows
        # Entries of rows in the new order; a row that is taken twice has its pictures twice.
        picked = [(new, entry) for new, row in enumerate(kept) for entry, of in enumerate(owners or ()) if of == row]
        made: dict[str, Tensor] = {}
        for name, value in self.cache_dict.items():
            if not name.startswith(_PICTURES) or value.ndim == 0:
                batched = value.ndim > 0 and len(value) == n
                made[name] = (value[kept[0]] if single else value[kept]) if batched else value
                continue
            if owners is None or len(value) != len(owners):
                about = (
                    "it is not known which rows its pictures are of"
                    if owners is None
                    else f"the batch has {len(owners)}"
                )
                raise ValueError(
                    f"rows must be told apart at {name}, got {len(value)} entries on its first axis, and {about}; take the cache with "
                    "lvlm.run_with_cache(inputs, sites=...), by the sites' names"
                )
            if picked:
                part = value[[entry for _, entry in picked]]
                made[name] = part[0] if single and len(picked) == 1 else part
        rows = None if owners is None else tuple(new for new, _ in picked)
        return self._with(made, not single, rows, len(kept))

    def _with(
        self, cache_dict: dict[str, Tensor], has_batch_dim: bool, image_rows: Sequence[int] | None, rows: int | None
    ) -> "LVLMCache":
        return LVLMCache(cache_dict, self.model, has_batch_dim=has_batch_dim, image_rows=image_rows, batch_size=rows)

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

    def apply_ln_to_stack(
        self, residual_stack: Tensor, layer: int | None = None, mlp_input: bool = False, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As in TransformerLens: the stack divided by the scale of the norm before a block, or of the final norm.

        Args:
            residual_stack: [component, ..., d_model].
            layer: The block whose input it is; the number of layers, -1 or None: the unembedding, whose norm is the final one.
            mlp_input: Whether it is the input of the block's MLP; of no meaning at the unembedding.
            args: As in TransformerLens.
            kwargs: As in TransformerLens.

        Raises:
            ValueError: If there is no such layer, or the scale of its norm is not in the cache.
        """
        n_layers = self.model.cfg.n_layers
        if layer is not None and not -1 <= layer <= n_layers:
            raise ValueError(
                f"layer must be from 0 to {n_layers} ({n_layers}, -1 or None: the unembedding), got {layer}"
            )
        final = layer in (None, -1, n_layers)
        scale = _SCALE if final else f"blocks.{layer}.ln{2 if mlp_input else 1}.hook_scale"
        # Without the model's own norm of that name TransformerLens says what kind of block it is.
        known = scale in getattr(self.model, "hook_dict", {})
        anew = final and (kwargs.get("recompute_ln") or (len(args) > 3 and args[3]))
        if known and not anew and scale not in self.cache_dict:
            raise ValueError(_lacking(scale, "a norm"))
        return super().apply_ln_to_stack(residual_stack, layer, mlp_input, *args, **kwargs)

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
