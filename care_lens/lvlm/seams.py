"""Honest hook points on a TransformerBridge.

Most of TransformerLens's hook points do what their names say: those get a second, uniform name. Where one
does not, a hook point of our own is made:

- ``hook_resid_mid`` is, in TransformerLens, the input of the second norm: an edit returned there reaches the
  MLP but not the residual stream. Ours sits at the same place and, when the tensor it returns is another one,
  the block's output is computed again as ``edited + mlp_out``, so that both see the edit. The sum is the
  block's own, so writing back what was read changes nothing, to the bit.
- ``attn.hook_pattern`` is made inside eager attention where TransformerLens shows a pattern that was used already.
- Where a block scales its branches (InternVL), ``hook_attn_out`` and ``hook_mlp_out`` are made after the scale.
- ``hook_resid_post`` of a vision tower is made inside the wrapped block, before transformers records the
  hidden states that the projector reads.

Towers that lay the patches of all images in one row, in an order of their own, are shown as [image, patch, ...] in raster
order, and edits go back the same way.

Every listed point checks what a hook returns (the shape must stay, read-only points refuse edits) and gives
it the activation's dtype and memory layout, so that float32 hooks work on a half-precision model and writing
back what was read changes no bit there either.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from transformer_lens.hook_points import HookPoint

from care_lens.core.site import Site, Tower
from care_lens.lvlm import attention
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.families.base import Family, TowerMap
from care_lens.lvlm.packing import Packing
from care_lens.lvlm.precision import keep_precision

_MARK = "_care_lens_seams"


class _Layout(NamedTuple):
    """How an activation lies in memory: kernels, and so the last bit of a result, can depend on it."""

    identity: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> "_Layout":
        """That of a tensor."""
        return cls(id(value), value.shape, value.stride(), value.dtype, value.device)

    def like(self, value: Tensor) -> Tensor:
        """The value in this dtype and, where it can be, in this memory layout."""
        value = value.to(self.dtype)
        if value.stride() == self.stride or 0 in self.stride:
            return value
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=value.device).copy_(value)


class HonestConversion(BaseTensorConversion):
    """Checks and casts what hooks return at a point, around the conversion TransformerLens has there.

    Args:
        name: Of the site, for messages.
        inner: TransformerLens's own conversion, or None.
        read_only: Why edits are refused, or None.
        packing: Gives the packing of the forward pass under way, where the tower lays all images in one row.
        heads: Number of heads to split the last axis into where the point itself has it in one piece; None: as it is.
    """

    def __init__(
        self,
        name: str,
        inner: BaseTensorConversion | None,
        read_only: str | None,
        packing: Callable[[], Packing] | None = None,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.inner = inner
        self.read_only = read_only
        self.splits_attention_heads = getattr(inner, "splits_attention_heads", False)
        self._packing, self._heads = packing, heads
        self._layout = _Layout(0, torch.Size(), (), torch.float32, torch.device("cpu"))
        self._native = self._layout
        self._split = False

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        """What the hook gets to see; its layout is remembered for :meth:`revert`."""
        seen = input_value if self.inner is None else self.inner.convert(input_value)
        self._native = _Layout.of(seen)
        if self._packing is not None:
            seen = self._packing().unpack(seen)
        self._split = self._heads is not None and seen.ndim == 3
        if self._split:
            seen = seen.unflatten(-1, (self._heads, -1))
        self._layout = _Layout.of(seen)
        return seen

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        """What goes on into the model for what the hook returned."""
        if not isinstance(input_value, Tensor):
            raise HookError(f"a hook at {self.name} must return a tensor or None, got {type(input_value).__name__}")
        if self.read_only is not None and id(input_value) != self._layout.identity:
            raise HookError(f"{self.name} is read-only, got an edit: {self.read_only}")
        if input_value.shape != self._layout.shape:
            raise HookError(
                f"a hook at {self.name} must return the shape it was given, {tuple(self._layout.shape)}, got "
                f"{tuple(input_value.shape)}"
            )
        if not input_value.is_floating_point() or input_value.device != self._layout.device:
            raise HookError(
                f"a hook at {self.name} must return real numbers of floating point on {self._layout.device}, got {input_value.dtype} "
                f"on {input_value.device}; write value.to(activation)"
            )
        value = self._layout.like(input_value)
        if self._split:
            value = value.flatten(-2)
        if self._packing is not None:
            value = self._packing().pack(value, self._native.shape)
        value = self._native.like(value)
        return value if self.inner is None else self.inner.revert(value)


class BlockParts(NamedTuple):
    """Modules of one block, on a bridge or on a plain model.

    Attributes:
        block: The Hugging Face block.
        mid_norm: Its input is the residual stream between attention and MLP.
        mlp: Its output is added to that stream.
        attn: Attention.
    """

    block: nn.Module
    mid_norm: nn.Module
    mlp: nn.Module
    attn: nn.Module


class BlockSeam:
    """The hook points of our own in one block: ``mid`` and, where asked for, ``post`` and, behind scales, the branches.

    Args:
        parts: The block's modules.
        scales: Names of the block's parameters that scale what attention and MLP give, or none.
        mid: Between attention and MLP.
        post: At the block's end, or None.
        branches: At the scaled outputs of attention and MLP, or None.
    """

    def __init__(
        self,
        parts: BlockParts,
        scales: tuple[str, ...],
        mid: HookPoint,
        post: HookPoint | None,
        branches: tuple[HookPoint, HookPoint] | None,
    ) -> None:
        self.mid, self.post, self.branches = mid, post, branches
        self._stream: Tensor | None = None
        self._attn: Tensor | None = None
        self._edited: Tensor | None = None
        self._mid: Tensor | None = None
        self._mlp_out: Tensor | None = None
        self._mlp_edited = False
        self._scales = tuple(getattr(parts.block, name) for name in scales)
        handles = [
            parts.mid_norm.register_forward_pre_hook(self._at_norm, prepend=True),
            parts.mlp.register_forward_hook(self._after_mlp),
            parts.block.register_forward_hook(self._after_block, prepend=True),
        ]
        if branches is not None:
            handles.append(parts.block.register_forward_pre_hook(self._before_block, with_kwargs=True))
            handles.append(parts.attn.register_forward_hook(self._after_attn))
        self.handles: tuple[RemovableHandle, ...] = tuple(handles)

    def _before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stream, self._attn = (args[0] if args else kwargs["hidden_states"]), None

    def _after_attn(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert self.branches is not None
        scaled = self._scales[0] * (output[0] if isinstance(output, tuple) else output)
        # Where hooks look on, the stream goes through what they left: edits in place act, and gradients reach it.
        self._attn = self.branches[0](scaled) if self.branches[0].has_hooks() else None

    def _at_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen = args[0]
        if self._attn is not None and self._stream is not None:
            seen = self._attn + self._stream
        returned = self.mid(seen)
        self._mid, self._mlp_out, self._mlp_edited = returned, None, False
        self._edited = None if returned is args[0] else returned
        self._stream = self._attn = None
        return None if returned is args[0] else (returned, *args[1:])

    def _after_mlp(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.branches is not None:
            self._mlp_edited = self.branches[1].has_hooks()
            self._mlp_out = self.branches[1](self._scales[1] * output)
        elif self._edited is not None:
            # A layer of experts returns its tokens in one row, with the router's scores.
            self._mlp_out = (output[0] if isinstance(output, tuple) else output).reshape(self._edited.shape)

    def _after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if (self._edited is not None or self._mlp_edited) and self._mlp_out is not None and self._mid is not None:
            hidden = self._mid + self._mlp_out
        self._edited = self._mlp_out = self._mid = None
        if self.post is not None:
            hidden = self.post(hidden)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@dataclass
class Seams:
    """What was put on a bridge, so that it can be taken off again.

    Attributes:
        points: The hook point of each listed site, in the order of the forward pass.
        read_only: The sites that cannot be edited, with the reason.
    """

    bridge: Any
    points: dict[Site, HookPoint] = field(default_factory=dict)
    read_only: dict[Site, str] = field(default_factory=dict)
    packings: dict[str, Packing] = field(default_factory=dict)
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def add(
        self,
        site: Site,
        point: HookPoint,
        read_only: str | None = None,
        *,
        packing: str | None = None,
        heads: int | None = None,
    ) -> None:
        """List a hook point under the site's name.

        Args:
            site: The site.
            point: Its hook point.
            read_only: Why it cannot be edited, or None.
            packing: Key of the packing of its activations, or None.
            heads: Number of heads where the point has them in one piece, or None.
        """
        registry, name, conversion = self.bridge._hook_registry, str(site), point.hook_conversion
        before = registry.get(name)
        registry[name] = point
        self._undo.append(lambda: registry.pop(name) if before is None else registry.update({name: before}))
        point.hook_conversion = HonestConversion(
            name, conversion, read_only, None if packing is None else lambda: self.packings[packing], heads
        )
        self._undo.append(lambda: setattr(point, "hook_conversion", conversion))
        self.points[site] = point
        if read_only is not None:
            self.read_only[site] = read_only

    def make(self, site: Site, block: nn.Module, *, packing: str | None = None) -> HookPoint:
        """A hook point of our own under the site's name, in place of any alias of that name."""
        point = HookPoint()
        point.name = str(site)
        self.add(site, point, packing=packing)
        before = getattr(block, site.component, None)
        if isinstance(before, HookPoint):
            object.__setattr__(block, site.component, point)
            self._undo.append(lambda: object.__setattr__(block, site.component, before))
        self._undo.append(lambda: point.remove_hooks("both", including_permanent=True))
        return point

    def drop_alias(self, component: Any, alias: str) -> None:
        """Take an alias away from a component of the bridge, so that its name is free."""
        before = getattr(component, "hook_aliases", {})
        if alias in before:
            component.hook_aliases = {name: target for name, target in before.items() if name != alias}
            self._undo.append(lambda: setattr(component, "hook_aliases", before))

    def on_remove(self, undo: Callable[[], Any]) -> None:
        """Have something else undone by :meth:`remove`."""
        self._undo.append(undo)

    def remove(self) -> None:
        """Take everything off the bridge."""
        while self._undo:
            self._undo.pop()()
        self.points.clear()


def install(bridge: Any, family: Family) -> Seams:
    """Put a family's sites on a bridge.

    Args:
        bridge: A TransformerBridge of a model of that family; it is changed until ``remove`` is called.
        family: The family.

    Returns:
        The sites and their hook points.

    Raises:
        ValueError: If the bridge has them already.
    """
    if _MARK in bridge.__dict__:
        raise ValueError("bridge must not have care_lens's hook points yet; close the HookedLVLM that put them there")
    seams = Seams(bridge)
    bridge.__dict__[_MARK] = seams
    seams.on_remove(lambda: bridge.__dict__.pop(_MARK))
    model = bridge.original_model
    known = bridge.hook_dict
    for name, target in family.outside.items():
        seams.add(Site.parse(name), known[target], packing=family.outside_packing.get(name))
    _install_tower(seams, "vision", family.vision, family.vision_depth(model.config), known)
    _install_tower(seams, "language", family.language, bridge.cfg.n_layers, known)
    seams.points = dict(sorted(seams.points.items()))
    if family.packings is not None:
        seams.on_remove(watch_packing(seams, family).remove)
    _guard_placeholders(seams)
    for undo in keep_precision(bridge):
        seams.on_remove(undo)
    return seams


def _guard_placeholders(seams: Seams) -> None:
    """Refuse tokens with image placeholders and no pixels, which the model would take for words without a word."""
    model = seams.bridge.original_model

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, past = kwargs.get("input_ids", args[0] if args else None), kwargs.get("past_key_values")
        seen = 0 if past is None else past.get_seq_length()
        if ids is None or seen or kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs"):
            return
        if bool((ids == model.config.image_token_id).any()):
            raise ValueError(
                "tokens must come with the pixels of their images, got image placeholders alone; prepare the batch and run "
                "it through HookedLVLM, or bind(inputs) for TransformerLens's tools"
            )

    seams.on_remove(model.register_forward_pre_hook(before, with_kwargs=True).remove)


def watch_packing(seams: Seams, family: Family) -> RemovableHandle:
    """Have the packings of each forward pass of the vision tower ready before its hooks run.

    Args:
        seams: What keeps them.
        family: A family with packings.

    Returns:
        What ends it.
    """
    packings, model = family.packings, seams.bridge.original_model
    assert packings is not None

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seams.packings.update(packings(model, args, kwargs))

    tower = model.get_submodule(family.tower_module)
    return tower.register_forward_pre_hook(before, prepend=True, with_kwargs=True)


def _install_tower(seams: Seams, tower: Tower, where: TowerMap, depth: int, known: dict[str, HookPoint]) -> None:
    template = seams.bridge.adapter.component_mapping.get(where.blocks)
    # Names of points of our own that are TransformerLens's aliases of points whose edits do something else.
    taken = ("hook_resid_mid", *(("hook_attn_out", "hook_mlp_out") if where.scales else ()))
    for alias in taken:
        seams.drop_alias(template, alias)
    blocks = seams.bridge.get_submodule(where.blocks)
    dims = where.dims(seams.bridge.original_model.config)
    for layer in range(depth):
        block = blocks[layer]
        for alias in taken:
            seams.drop_alias(block, alias)
        for component, path in where.points.items():
            name = f"{where.blocks}.{layer}.{path}"
            if name not in known and component in where.absent:
                continue  # this layer is one of those that do not have it
            point = known[name]
            heads = dims.heads if component == "attn.hook_z" else None
            site, lock = Site(tower, layer, component), where.read_only.get(component)
            seams.add(site, point, lock, packing=where.packing, heads=heads)
        own = {
            component: seams.make(Site(tower, layer, component), block, packing=where.packing)
            for component in (
                "hook_resid_mid",
                *(["hook_resid_post"] if where.own_resid_post else []),
                *(["hook_attn_out", "hook_mlp_out"] if where.scales else []),
            )
        }
        branches = (own["hook_attn_out"], own["hook_mlp_out"]) if where.scales else None
        parts = BlockParts(
            *(block.get_submodule(path) for path in ("_original_component", where.mid_norm, where.mlp, where.attn))
        )
        seam = BlockSeam(parts, where.scales or (), own["hook_resid_mid"], own.get("hook_resid_post"), branches)
        for handle in seam.handles:
            seams.on_remove(handle.remove)
        if where.own_pattern:
            _install_pattern(seams, Site(tower, layer, "attn.hook_pattern"), block, where)


def _install_pattern(seams: Seams, site: Site, block: nn.Module, where: TowerMap) -> None:
    """Put a hook point into the eager attention of a block."""
    module = block.get_submodule(where.attn)
    module = getattr(module, "original_component", None) or module
    point = HookPoint()
    point.name = str(site)
    seams.add(site, point)
    config: Any = module.config
    before = config._attn_implementation
    module.__dict__[attention.POINT], module.__dict__[attention.EAGER] = point, where.eager
    config._attn_implementation = attention.NAME
    seams.on_remove(lambda: point.remove_hooks("both", including_permanent=True))
    seams.on_remove(lambda: setattr(config, "_attn_implementation", before))
    seams.on_remove(lambda: [module.__dict__.pop(name) for name in (attention.POINT, attention.EAGER)])
