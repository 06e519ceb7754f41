"""Edits of a plain Hugging Face model through plain torch hooks, by a specimen's own list of locations."""

import importlib
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from zoo.specimen import Specimen

Fn = Callable[[Tensor], Tensor]


class Plain:
    """A plain model with one site edited at a time.

    Args:
        specimen: Where things are.
        model: A plain Hugging Face model.
        inputs: A prepared batch; its keyword arguments are given to the model as they are.
    """

    def __init__(self, specimen: Specimen, model: Any, inputs: Any) -> None:
        self.specimen, self.model, self.inputs = specimen, model, inputs
        self.seen: Tensor | None = None

    @torch.no_grad()
    def logits(self, site: Any = None, fn: Fn | None = None) -> Tensor:
        """Logits, with the site's activation replaced by what fn makes of it."""
        self.seen = None
        with ExitStack() as stack:
            if site is not None:
                stack.enter_context(self._edit(site, fn))
            return self.model(**self.inputs.model_kwargs()).logits

    def _edit(self, site: Any, fn: Fn) -> Any:
        if site.layer is None:
            return self._at(*self.specimen.outside[str(site)], str(site), fn)
        tower = "vision" if site.tower == "vision" else "language"
        layer = f"{getattr(self.specimen, f'{tower}_layers')}.{site.layer}"
        if site.component == "hook_resid_mid":
            return self._mid(tower, layer, fn)
        if site.component == "attn.hook_pattern":
            return self._pattern(tower, layer, fn)
        path, side = getattr(self.specimen, tower)[site.component]
        heads = site.component == "attn.hook_z"
        key = "vision" if tower == "vision" else ""
        return self._at(
            ".".join(part for part in (layer, path) if part),
            side,
            key,
            fn,
            heads=heads,
            layer=layer,
            component=site.component,
        )

    @contextmanager
    def _at(self, path: str, side: str, key: str, fn: Fn, *, heads: bool = False, layer: str = "", component: str = ""):
        module = self.model.get_submodule(path)
        scale = self._scale(key, layer, component)

        def change(native: Tensor) -> Tensor:
            value = native if scale is None else native * scale
            uniform = self._unpack(key, value)
            split = heads and uniform.ndim == 3
            if split:
                uniform = uniform.unflatten(-1, (self._heads(layer), -1))
            self.seen = uniform.clone()
            edited = fn(uniform)
            edited = self._pack(key, edited.flatten(-2) if split else edited, value)
            return edited if scale is None else edited / scale

        def pre(module, args, kwargs):
            if args:
                return (change(args[0]), *args[1:]), kwargs
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            return args, {**kwargs, name: change(kwargs[name])}

        def post(module, args, output):
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        handle = (
            module.register_forward_pre_hook(pre, with_kwargs=True)
            if side == "in"
            else module.register_forward_hook(post, prepend=True)
        )
        try:
            yield
        finally:
            handle.remove()

    def _scale(self, key: str, layer: str, component: str) -> Tensor | float | None:
        scales = self.specimen.vision_scales if key == "vision" else self.specimen.language_scales
        if scales is None or component not in ("hook_attn_out", "hook_mlp_out"):
            return None
        name = scales[0 if component == "hook_attn_out" else 1]
        return getattr(self.model.get_submodule(layer), name)

    def _heads(self, layer: str) -> int:
        config = self.model.config
        vision = layer.startswith(self.specimen.vision_layers)
        tower = config.vision_config if vision else config.text_config
        return getattr(tower, "num_attention_heads", None) or tower.num_heads

    def _unpack(self, key: str, native: Tensor) -> Tensor:
        if key not in self.specimen.orders:
            return native
        orders = self.specimen.orders[key](self.inputs)
        rows = native.reshape(-1, native.shape[-1])
        return torch.nn.utils.rnn.pad_sequence([rows[order] for order in orders], batch_first=True)

    def _pack(self, key: str, uniform: Tensor, native: Tensor) -> Tensor:
        if key not in self.specimen.orders:
            return uniform
        out = torch.empty_like(native).reshape(-1, native.shape[-1])
        for image, order in enumerate(self.specimen.orders[key](self.inputs)):
            out[order] = uniform[image, : len(order)]
        return out.reshape(native.shape)

    @contextmanager
    def _mid(self, tower: str, layer: str, fn: Fn):
        """An edit of the stream between attention and MLP, as the same change of what attention adds to it."""
        norm = self.specimen.vision_mid if tower == "vision" else self.specimen.mid
        key = "vision" if tower == "vision" else ""
        with self._at(f"{layer}.{norm}", "in", key, lambda mid: mid):
            self.model(**self.inputs.model_kwargs())
        mid = self.seen
        assert mid is not None
        delta = fn(mid) - mid
        path, side = getattr(self.specimen, tower)["hook_attn_out"]
        with self._at(f"{layer}.{path}", side, key, lambda out: out + delta, layer=layer, component="hook_attn_out"):
            yield
            self.seen = mid

    @contextmanager
    def _pattern(self, tower: str, layer: str, fn: Fn):
        """An edit inside the eager attention function of the model's file."""
        file, name = getattr(self.specimen, f"{tower}_eager")
        home, target = importlib.import_module(file), self.model.get_submodule(layer)
        inside = set(target.modules())
        eager = getattr(home, name)

        def edited(module, query, key, value, attention_mask, **kwargs):
            out, pattern = eager(module, query, key, value, attention_mask, **kwargs)
            if module not in inside:
                return out, pattern
            self.seen = pattern.clone()
            values = value.repeat_interleave(pattern.shape[1] // value.shape[1], dim=1)
            return (fn(pattern) @ values).transpose(1, 2).contiguous(), pattern

        setattr(home, name, edited)
        try:
            yield
        finally:
            setattr(home, name, eager)
