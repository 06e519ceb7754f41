"""Hook points on a plain Hugging Face model: plain torch forward hooks on its own modules, under the sites' names.

No bridge stands in for any module. Where a site is, the family says (:class:`~care_lens.lvlm.families.PlainTower`). Torch hooks are
on a module only while a hook function is at one of its sites; a site without hook functions costs nothing.

What a hook function is shown and what becomes of what it returns is the same as on a bridge, by the same code
(:mod:`care_lens.lvlm.seams`): shapes, dtypes and memory layouts, patches of pictures in raster order, and an edit of
``hook_resid_mid`` that reaches the MLP and the residual stream alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from care_lens.core.site import BLOCK_COMPONENTS, Site, Tower
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.families import Family, TowerMap
from care_lens.lvlm.seams import BlockParts, BlockSeam, Seams, watch_packing

TOKENS, LOGITS = "embed.hook_in", "unembed.hook_out"
"""Hook points that are no sites: the token ids that come in, and the logits that go out."""

_PATTERN = (
    "attention patterns exist only inside the model's attention function, where no torch hook reaches them; wrap the model with "
    "HookedLVLM.from_hf(model, processor) and use `with repair.on(lvlm)`"
)
_PACKING = "packing"


class PlainPoints:
    """The hook points of a plain model, in the place that a TransformerBridge has in a HookedLVLM.

    Args:
        model: The Hugging Face model. Nothing on it changes before a hook function is added.
        family: Its family.

    Attributes:
        original_model: The model.
        hook_dict: Hook points by name: the sites', of the token ids and of the logits.
        missing: Sites that other models of this family or a bridge have and this model has not, with the reason.

    Raises:
        HookError: If the family does not say where its sites are on a plain model, or the model is not laid out so.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.original_model: Any = model
        self._hook_registry: dict[str, HookPoint] = {}
        self.missing: dict[Site, str] = {}
        self._family = family
        self._hooking: dict[str, Callable[[], Sequence[Any]]] = {}
        self._groups: dict[str, str] = {}
        self._users: dict[str, int] = {}
        self._handles: dict[str, Sequence[Any]] = {}
        self._seams = Seams(self)
        language, vision = _required(family, "language"), _required(family, "vision")
        self._blocks = self._found(language.blocks)
        self._norm = language.final_norm
        for name, place in family.plain_outside.items():
            self._put_outside(Site.parse(name), *place)
        if family.packings is not None:
            self._hooking[_PACKING] = lambda: [watch_packing(self._seams, family)]
        self._put_tower("vision", family.vision, self._found(vision.blocks), family.vision_depth(model.config))
        self._put_tower("language", family.language, self._blocks, len(self._blocks))
        self._put(TOKENS, self.original_model.get_input_embeddings(), "in")
        self._put(LOGITS, self.original_model.get_output_embeddings(), "out")
        self._seams.points = dict(sorted(self._seams.points.items()))

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Hook points by name."""
        return self._hook_registry

    @property
    def seams(self) -> Seams:
        """The sites and what is known of them."""
        return self._seams

    @property
    def first_block(self) -> nn.Module:
        """The first block of the language tower."""
        return self._blocks[0]

    @property
    def ln_final(self) -> nn.Module:
        """The norm before the unembedding."""
        return self.original_model.get_submodule(self._norm)

    @property
    def unembed(self) -> nn.Module:
        """The unembedding."""
        return self.original_model.get_output_embeddings()

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits."""
        return self.original_model(input_ids=input_ids, **kwargs).logits

    @contextmanager
    def hooks(self, *, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Iterator["PlainPoints"]:
        """Have hook functions on the model in a ``with`` block. Each block takes its own away, whatever others did meanwhile.

        Args:
            fwd_hooks: Names of hook points and functions; at one point they run in this order.
        """
        with ExitStack() as added:
            for name, fn in fwd_hooks:
                for group in self._needed(name):
                    self._use(group)
                    added.callback(self._leave, group)
                point = self._hook_registry[name]
                added.callback(_take_away, point, point.add_hook(fn))
            yield self

    def _use(self, group: str) -> None:
        if not self._users.get(group):
            self._handles[group] = self._hooking[group]()
        self._users[group] = self._users.get(group, 0) + 1

    def _leave(self, group: str) -> None:
        self._users[group] -= 1
        if not self._users[group]:
            for handle in self._handles.pop(group):
                handle.remove()

    def _needed(self, name: str) -> list[str]:
        """The groups of torch hooks that a hook point needs: those of its block or module, and the packing of pictures."""
        pictured = name.startswith(("vision.", "projector."))
        return [*([_PACKING] if pictured and _PACKING in self._hooking else []), self._groups[name]]

    def _found(self, path: str) -> Any:
        try:
            return self.original_model.get_submodule(path)
        except AttributeError:
            raise HookError(
                f"the model must have a module {path!r} for plain hooks, got a {type(self.original_model).__name__} without; wrap it with "
                "HookedLVLM.from_hf(model, processor) and use `with repair.on(lvlm)`, or say in its Family where its modules are "
                "(TowerMap.plain)"
            ) from None

    def _point(self, name: str) -> HookPoint:
        point = HookPoint()
        point.name = name
        return point

    def _put(self, name: str, module: Any, side: str) -> None:
        """A hook point that is no site."""
        point = self._hook_registry[name] = self._point(name)
        self._groups[name] = name
        self._hooking[name] = lambda: [_through(module, side, point)]

    def _put_outside(self, site: Site, path: str, side: str) -> None:
        name = str(site)
        try:
            module = self.original_model.get_submodule(path)
        except AttributeError:
            self.missing[site] = f"the model has no module {path!r}"
            return
        point = self._point(name)
        self._seams.add(site, point, packing=self._family.outside_packing.get(name))
        self._groups[name] = name
        self._hooking[name] = lambda: [_through(module, side, point)]

    def _put_tower(self, tower: Tower, where: TowerMap, blocks: Any, depth: int) -> None:
        assert where.plain is not None
        dims = where.dims(self.original_model.config)
        for layer in range(depth):
            group, block = f"{tower}.{layer}", blocks[layer]
            points: dict[str, HookPoint] = {}
            for component in BLOCK_COMPONENTS:
                site = Site(tower, layer, component)
                if component == "attn.hook_pattern":
                    self.missing[site] = where.absent.get(component, _PATTERN)
                    continue
                path, _ = where.plain.points.get(component, ("", ""))
                if not _has(block, path):
                    self.missing[site] = where.absent.get(component, f"its block has no module {path!r}")
                    continue
                if component != "hook_resid_mid" and component not in where.plain.points:
                    self.missing[site] = where.absent.get(
                        component, "the family does not say where it is on a plain model"
                    )
                    continue
                point = points[component] = self._point(str(site))
                heads = dims.heads if component == "attn.hook_z" else None
                self._seams.add(site, point, where.read_only.get(component), packing=where.packing, heads=heads)
                self._groups[str(site)] = group
            self._hooking[group] = lambda block=block, points=points: _hook_block(block, where, points)


def _required(family: Family, tower: Tower) -> Any:
    """Where a tower is on a plain model."""
    plain = (family.language if tower == "language" else family.vision).plain
    if plain is None:
        raise HookError(
            f"the {family.name} family must say where its {tower} tower is on a plain model (TowerMap.plain), got None; say it, or wrap the "
            "model with HookedLVLM.from_hf(model, processor) and use `with repair.on(lvlm)`"
        )
    return plain


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _hook_block(block: nn.Module, where: TowerMap, points: Mapping[str, HookPoint]) -> list[Any]:
    """The torch hooks of one block, in the order in which they must run."""
    plain = where.plain
    assert plain is not None
    parts = BlockParts(*(block.get_submodule(path) for path in ("", plain.mid_norm, plain.mlp, plain.attn)))
    scaled = ("hook_attn_out", "hook_mlp_out") if where.scales else ()
    handles = [
        _through(block.get_submodule(path), side, points[component], rows=component == "hook_mlp_out")
        for component, (path, side) in plain.points.items()
        if component in points and component not in (*scaled, "hook_resid_post")
    ]
    branches = (points["hook_attn_out"], points["hook_mlp_out"]) if where.scales else None
    seam = BlockSeam(parts, where.scales or (), points["hook_resid_mid"], points["hook_resid_post"], branches)
    return [*handles, *seam.handles]


def _take_away(point: HookPoint, handle: Any) -> None:
    """Take one hook function off a hook point."""
    handle.hook.remove()
    point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def _through(module: nn.Module, side: str, point: HookPoint, *, rows: bool = False) -> Any:
    """A torch hook that leads one side of a module through a hook point.

    Args:
        module: The module.
        side: "in" or "out".
        point: The hook point.
        rows: Whether the module may return its tokens in one row (layers of experts do), to be shown as they came in.

    Returns:
        What takes the hook away.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not point._forward_hooks:
            return None
        name = None if args else _first(kwargs)
        given = args[0] if name is None else kwargs[name]
        made = point(given)
        if made is given:
            return None
        return ((made, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: made})

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not point._forward_hooks:
            return None
        given = output[0] if isinstance(output, tuple) else output
        shape = None
        if rows:
            came = args[0] if args else kwargs[_first(kwargs)]
            shape = None if came.ndim == given.ndim else given.shape
        shown = given if shape is None else given.reshape(came.shape)
        made = point(shown)
        if made is shown:
            return None
        made = made if shape is None else made.reshape(shape)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    if side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after, with_kwargs=True)


def _first(kwargs: Mapping[str, Any]) -> str:
    """The name of a module's first argument where it was given by name."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next(name for name, value in kwargs.items() if isinstance(value, Tensor))
