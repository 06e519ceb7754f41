"""Honest hook points on a TransformerBridge.

Most of TransformerLens's hook points do what their names say: those get a second, uniform name. Where one
does not, a hook point of our own is made:

- ``hook_resid_mid`` is, in TransformerLens, the input of the second norm: an edit returned there reaches the
  MLP but not the residual stream. Ours sits at the same place and, when the tensor it returns is another one,
  the block's output is computed again as ``edited + mlp_out``, so that both see the edit. The sum is the
  block's own, so writing back what was read changes nothing, to the bit.
- ``hook_resid_post`` of a vision tower is made inside the wrapped block, before transformers records the
  hidden states that the projector reads.

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
from care_lens.lvlm.families.base import Family, TowerMap

_MARK = "_care_lens_seams"


class _Layout(NamedTuple):
    """How an activation lies in memory: kernels, and so the last bit of a result, can depend on it."""

    identity: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def like(self, value: Tensor) -> Tensor:
        """The value in this dtype and, where it can be, in this memory layout."""
        value = value.to(self.dtype)
        if value.stride() == self.stride or 0 in self.stride:
            return value
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=value.device).copy_(value)


class HonestConversion(BaseTensorConversion):
    """Checks and casts what hooks return at a point, around the conversion TransformerLens has there."""

    def __init__(self, name: str, inner: BaseTensorConversion | None, read_only: str | None) -> None:
        super().__init__()
        self.name = name
        self.inner = inner
        self.read_only = read_only
        self.splits_attention_heads = getattr(inner, "splits_attention_heads", False)
        self._layout = _Layout(0, torch.Size(), (), torch.float32)

    def handle_conversion(self, input_value: Any, *full_context: Any) -> Any:
        """What the hook gets to see; its layout is remembered for :meth:`revert`."""
        seen = input_value if self.inner is None else self.inner.convert(input_value)
        self._layout = _Layout(id(seen), seen.shape, seen.stride(), seen.dtype)
        return seen

    def revert(self, input_value: Any, *full_context: Any) -> Any:
        """What goes on into the model for what the hook returned."""
        if not isinstance(input_value, Tensor):
            raise TypeError(f"a hook at {self.name} must return a tensor or None, got {type(input_value).__name__}")
        if self.read_only is not None and id(input_value) != self._layout.identity:
            raise ValueError(f"{self.name} is read-only, got an edit: {self.read_only}")
        if input_value.shape != self._layout.shape:
            raise ValueError(
                f"a hook at {self.name} must return the shape it was given, {tuple(self._layout.shape)}, got "
                f"{tuple(input_value.shape)}"
            )
        value = self._layout.like(input_value)
        return value if self.inner is None else self.inner.revert(value)


class _BlockSeam:
    """The hook points of our own in one block: ``mid`` and, where asked for, ``post``."""

    def __init__(self, block: nn.Module, tower: TowerMap, mid: HookPoint, post: HookPoint | None) -> None:
        self.mid, self.post = mid, post
        self._edited: Tensor | None = None
        self._mlp_out: Tensor | None = None
        wrapped = block.get_submodule("_original_component")
        self.handles: tuple[RemovableHandle, ...] = (
            block.get_submodule(tower.mid_norm).register_forward_pre_hook(self._at_norm, prepend=True),
            block.get_submodule(tower.mlp).register_forward_hook(self._after_mlp),
            wrapped.register_forward_hook(self._after_block, prepend=True),
        )

    def _at_norm(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        seen = args[0]
        returned = self.mid(seen)
        self._edited, self._mlp_out = (None if returned is seen else returned), None
        return None if returned is seen else (returned, *args[1:])

    def _after_mlp(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._edited is not None:
            self._mlp_out = output

    def _after_block(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._edited is not None and self._mlp_out is not None:
            hidden = self._edited + self._mlp_out
            self._edited, self._mlp_out = None, None
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
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def add(self, site: Site, point: HookPoint, read_only: str | None = None) -> None:
        """List a hook point under the site's name."""
        registry, name, conversion = self.bridge._hook_registry, str(site), point.hook_conversion
        before = registry.get(name)
        registry[name] = point
        self._undo.append(lambda: registry.pop(name) if before is None else registry.update({name: before}))
        point.hook_conversion = HonestConversion(name, conversion, read_only)
        self._undo.append(lambda: setattr(point, "hook_conversion", conversion))
        self.points[site] = point
        if read_only is not None:
            self.read_only[site] = read_only

    def make(self, site: Site, block: nn.Module) -> HookPoint:
        """A hook point of our own under the site's name, in place of any alias of that name."""
        point = HookPoint()
        point.name = str(site)
        self.add(site, point)
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
    config = bridge.original_model.config
    known = bridge.hook_dict
    for name, target in family.outside.items():
        seams.add(Site.parse(name), known[target])
    _install_tower(seams, "vision", family.vision, family.vision_depth(config), known)
    _install_tower(seams, "language", family.language, bridge.cfg.n_layers, known)
    seams.points = dict(sorted(seams.points.items()))
    return seams


def _install_tower(seams: Seams, tower: Tower, where: TowerMap, depth: int, known: dict[str, HookPoint]) -> None:
    template = seams.bridge.adapter.component_mapping.get(where.blocks)
    seams.drop_alias(template, "hook_resid_mid")
    blocks = seams.bridge.get_submodule(where.blocks)
    for layer in range(depth):
        block = blocks[layer]
        seams.drop_alias(block, "hook_resid_mid")
        for component, path in where.points.items():
            point = known[f"{where.blocks}.{layer}.{path}"]
            seams.add(Site(tower, layer, component), point, where.read_only.get(component))
        mid = seams.make(Site(tower, layer, "hook_resid_mid"), block)
        post = seams.make(Site(tower, layer, "hook_resid_post"), block) if where.own_resid_post else None
        for handle in _BlockSeam(block, where, mid, post).handles:
            seams.on_remove(handle.remove)
