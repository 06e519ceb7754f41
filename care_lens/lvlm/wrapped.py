"""A TransformerBridge with the sites of its family on it: their names, their facts, and hooks at them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from care_lens.core.blocks import with_block
from care_lens.core.display import as_html, as_text
from care_lens.core.identity import repair_fingerprint
from care_lens.core.site import BLOCK_COMPONENTS, Site, SiteLike, Tower
from care_lens.lvlm.advice import HOOKED, Advice
from care_lens.lvlm.blocks import Blocks
from care_lens.lvlm.display import shown_model
from care_lens.lvlm.doors import Doors
from care_lens.lvlm.families import family_of
from care_lens.lvlm.hooks import FwdHooks, hook_pairs, owned, without_hooks
from care_lens.lvlm.inputs import LVLMInputs, require_inputs
from care_lens.lvlm.loading import require_processor
from care_lens.lvlm.missing import missing
from care_lens.lvlm.patches import patches_in
from care_lens.lvlm.places import names_at
from care_lens.lvlm.plain import COPYING, KEYED, make_plain, plain, refuse_copies
from care_lens.lvlm.seams import Seams, install
from care_lens.lvlm.sites import SiteInfo, describe, why_missing

Wrapped = TypeVar("Wrapped", bound="WrappedBridge")


def _require_tower(tower: str) -> None:
    if tower not in get_args(Tower):
        raise ValueError(f"tower must be one of {get_args(Tower)}, got {tower!r}")


class WrappedBridge:
    """A bridge and its processor, with honest hook points under the sites' names until :meth:`close`.

    Attributes:
        bridge: The TransformerBridge.
        processor: The processor.
        tokenizer: The processor's tokenizer.
        family: How models of this kind are laid out.
        advice: What messages tell the user to do.
    """

    advice: ClassVar[Advice] = HOOKED

    def __init__(self, bridge: Any, processor: Any) -> None:
        model = bridge.original_model
        self.family = family_of(model)
        require_processor(model, processor, self.family)
        self.bridge = bridge
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self._seams = self._installed()
        self._blocks = Blocks(self.advice.threads)
        doors = Doors(self)
        self._seams.on_remove(doors.remove)
        self._keep_plain(doors)

    def _installed(self) -> Seams:
        """The sites, put on the bridge."""
        return install(self.bridge, self.family)

    def _keep_plain(self, doors: Doors) -> None:
        """Have the model's own names of weights, and no copies of it."""
        model = self.hf_model
        for name in KEYED:
            doors.stand_in(model, name, self._as_plain)
        self._refuse_copies(refuse_copies("a wrapped model", COPYING))

    def _refuse_copies(self, refuse: Callable[..., Any]) -> None:
        model = self.hf_model
        for name in ("__deepcopy__", "__reduce_ex__"):
            model.__dict__[name] = refuse
            self._seams.on_remove(lambda name=name: model.__dict__.pop(name, None))

    def close(self) -> None:
        """Take the hook points off the bridge, which is then as it was before. Closing twice does nothing."""
        with self._blocks.lock:
            self._seams.remove()

    def unwrap(self) -> Any:
        """Close this, take the bridge's components out of the Hugging Face model, and give the model back.

        It is then what it was before :meth:`HookedLVLM.from_hf`: the same logits, names of weights and attention implementation, in
        evaluation mode, with the weights that it has now. The bridge must not be used any more. To save a model there is no need
        for this: ``hf_model.save_pretrained``, ``state_dict`` and ``load_state_dict`` have plain names while it is wrapped.

        Returns:
            The plain model.
        """
        model = self.hf_model
        self.close()
        make_plain(model)
        return model

    def _as_plain(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._blocks.lock, plain(self.hf_model):
            return original(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled.

        Raises:
            TypeError: Always; it says what to do instead.
        """
        return refuse_copies(f"a {type(self).__name__}", COPYING)()

    def __repr__(self) -> str:
        return as_text(*shown_model(self))

    def _repr_html_(self) -> str:
        return as_html(*shown_model(self))

    if not TYPE_CHECKING:  # a type checker would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            """Say what to write for a name of TransformerLens's that is not here (MissingNameError)."""
            raise missing(self, name, self.__dict__.get("bridge"))

    def __enter__(self: Wrapped) -> Wrapped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def first_block(self) -> nn.Module:
        """The first block of the language tower, which every forward pass over tokens goes through."""
        return self.bridge.get_submodule("blocks.0")

    @property
    def hf_model(self) -> Any:
        """The Hugging Face model, with bridge components inside."""
        return self.bridge.original_model

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.hf_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.hf_model.get_input_embeddings().weight.dtype

    def n_layers(self, tower: Tower = "language") -> int:
        """Number of layers of a tower that have sites; of the vision tower, those that are read.

        Raises:
            ValueError: If there is no such tower.
            RuntimeError: If this HookedLVLM is closed.
        """
        self._require_open()
        _require_tower(tower)
        return len({site.layer for site in self._seams.points if site.tower == tower and site.layer is not None})

    def sites(self, *, tower: Tower | None = None, component: str | None = None) -> list[Site]:
        """The sites of this model, in the order of the forward pass.

        Args:
            tower: Only those of this tower.
            component: Only those of this component.

        Returns:
            Every site that can be read; ``site_info(site).editable`` says whether it can be edited.

        Raises:
            ValueError: If there is no such tower, or no family has such a component.
            RuntimeError: If this HookedLVLM is closed.
        """
        self._require_open()
        if tower is not None:
            _require_tower(tower)
        known = {*BLOCK_COMPONENTS, "hook_embed", *(site.component for site in self._seams.points)}
        if component is not None and component not in known:
            raise ValueError(f"component must be one of {sorted(known)}, got {component!r}")
        return [
            site for site in self._seams.points if tower in (None, site.tower) and component in (None, site.component)
        ]

    def site_info(self, site: SiteLike) -> SiteInfo:
        """Axes, width and editability of a site.

        Raises:
            ValueError: If this model has no such site; the message says why.
        """
        site = self._require(site)
        return describe(site, self.hf_model.config, self.family, self._seams.read_only.get(site))

    def width(self, site: SiteLike) -> int:
        """Size of the last axis of a site's activation.

        Raises:
            ValueError: If this model has no such site, or it is an attention pattern.
        """
        info = self.site_info(site)
        if info.width is None:
            raise ValueError(f"site must have a fixed width, got {info.site}: its last axis is as long as the keys")
        return info.width

    def hook_name(self, site: SiteLike) -> str:
        """The name of a site's hook point on the bridge, which is ``str(site)``.

        Raises:
            ValueError: If this model has no such site; the message says why.
        """
        return str(self._require(site))

    def patch_mask(
        self, site: SiteLike, activation: Tensor, *, class_tokens: bool = False
    ) -> Bool[Tensor, "image patch"]:
        """Which entries of a vision or projector activation are patches of the picture, not padding.

        To be asked inside a hook, of the forward pass under way: where images of different sizes share one row, their
        uniform form is padded.

        Args:
            site: A site of the vision tower or the projector.
            activation: What the hook there was given, [image, patch, ...].
            class_tokens: Whether class tokens count too.

        Raises:
            ValueError: If the site is of the language tower, whose positions ``inputs.spans`` tells apart, or the activation
                is not of the forward pass that ran last.
        """
        site = self._require(site)
        if site.tower == "language":
            raise ValueError(f"site must be of the vision tower or the projector, got {site}; see inputs.spans")
        return patches_in(
            activation, site, self.family, self.hf_model.config, self._seams.packings, class_tokens=class_tokens
        )

    @with_block("lvlm.hooks(fwd_hooks)")
    def hooks(self: Wrapped, fwd_hooks: FwdHooks = ()) -> Iterator[Wrapped]:
        """Have hooks on the model in a ``with`` block; they are gone after it, come what may.

        Hooks belong to the thread that opened the block, and blocks may be left in any order. While a block is open, a run in a
        thread that has no block of its own is refused; ``with lvlm.hooks():`` there says that the model is meant as it is, and
        :meth:`carry_hooks` takes these hooks along.

        Args:
            fwd_hooks: Pairs of a place and a function. Where one place has several, each sees what those
                before returned.

        Raises:
            ValueError: If this model has no such site or hook point, the message says why; or these are no such pairs (HookError).

        Warns:
            UserWarning: If a place is TransformerLens's own name of a point in the vision tower or the projector: an edit there may do
                nothing, which the sites' names exclude.
        """
        self._require_open()
        placed = [(name, fn) for place, fn in hook_pairs(fwd_hooks) for name in names_at(self, place)]
        with self._blocks.opened() as block:
            # A forward pass of another thread must not see the hooks come and go.
            context = self.bridge.hooks(fwd_hooks=[(name, owned(fn, block)) for name, fn in placed]) if placed else None
            if context is not None:
                with self._blocks.lock:
                    context.__enter__()
            try:
                yield self
            finally:
                if context is not None:
                    with self._blocks.lock:
                        context.__exit__(None, None, None)

    @with_block("lvlm.hooks_for_each_batch(make)")
    def hooks_for_each_batch(self: Wrapped, make: Callable[[LVLMInputs], FwdHooks]) -> Iterator[Wrapped]:
        """Have hooks made anew for every batch that is run or generated from in a ``with`` block.

        They come after the hooks of a ``with lvlm.hooks(...)`` block and before those given to the call
        itself, so that caches and interventions see what they did. Where blocks nest, the outer one's come first; they may be
        left in any order. They belong to the thread that opened the block, as those of :meth:`hooks` do.

        Calls of ``lvlm.hf_model(...)`` and ``lvlm.hf_model.generate(...)`` with a processor's outputs have them too.

        Args:
            make: From a batch to its hooks.
        """
        self._require_open()
        with self._blocks.opened(make):
            yield self

    def plain_modules(self) -> dict[str, nn.Module]:
        """The Hugging Face model's own modules by the names they have on a plain model; the bridge's components are left out."""
        with self._blocks.lock, plain(self.hf_model):
            return dict(self.hf_model.named_modules())

    @contextmanager
    def module_hooks(
        self: Wrapped,
        edits: Mapping[nn.Module, Callable[[Tensor, Tensor], Tensor]],
        make: Callable[[LVLMInputs], FwdHooks],
    ) -> Iterator[Wrapped]:
        """Edit the outputs of modules that are no sites, such as linear maps, in a ``with`` block; no module is changed or replaced.

        For what changes weights, and so every position alike. It belongs to this thread, as :meth:`hooks_for_each_batch` does.

        Args:
            edits: From a module of :meth:`plain_modules` to a function of its input and its output that returns a new output.
            make: What :meth:`hooks_for_each_batch` takes; it may make no hooks, and says by its owner what is on the model.
        """
        self._require_open()
        with self._blocks.opened(make) as block:

            def owned(edit: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
                def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
                    return edit(args[0], output) if block in self._blocks.mine else None

                return hook

            handles = []
            try:
                with self._blocks.lock:
                    handles += [module.register_forward_hook(owned(edit)) for module, edit in edits.items()]
                yield self
            finally:
                with self._blocks.lock:
                    for handle in handles:
                        handle.remove()

    @contextmanager
    def batch_hooks(self: Wrapped, inputs: LVLMInputs) -> Iterator[Wrapped]:
        """Have the hooks of :meth:`hooks_for_each_batch` for this batch on, and the model to this thread alone.

        Every way of running the model does this.

        Raises:
            TypeError: If the inputs are not a prepared batch.
            ValueError: If its pixels are of other images than the batch's.
            ThreadError: If this thread has no hooks and another one has.
        """
        require_inputs(inputs).require_pixels()
        self._require_open()
        with self._blocks.turn():
            made = [pair for make in self._makers for pair in make(inputs)]
            with self.hooks(made), self._blocks.run():
                yield self

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the model to this thread alone: others that run it wait. For running parts of it, whose hook points keep state.

        Raises:
            ThreadError: If this thread has no hooks and another one has.
        """
        with self._blocks.turn():
            yield

    @property
    def blocks_open(self) -> int:
        """How many blocks of hooks are open on the model, of all threads."""
        return self._blocks.open

    def for_every_thread(self) -> AbstractContextManager[None]:
        """Have the blocks of hooks that are opened in this ``with`` block act whichever thread runs the model, until they are left.

        For programs that run the model in a thread of their own, which cannot open a block itself.
        """
        return self._blocks.for_every_thread()

    def carry_hooks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function for another thread that runs the model with this thread's hooks and repairs.

        Args:
            function: What the other thread is to do, for instance ``lvlm.generate``.

        Returns:
            The function, to be given to ``threading.Thread(target=...)`` or to a pool. The blocks must be open until it has run.

        Raises:
            ThreadError: When it is called after one of the blocks was left.

        Example:
            >>> with repair.on(lvlm):  # doctest: +SKIP
            ...     thread = threading.Thread(target=lvlm.carry_hooks(lvlm.generate), args=(inputs,))
            ...     thread.start()
            ...     thread.join()
        """
        self._require_open()
        blocks = self._blocks.mine

        @wraps(function)
        def with_hooks(*args: Any, **kwargs: Any) -> Any:
            with self._blocks.lent(blocks):
                return function(*args, **kwargs)

        return with_hooks

    @property
    def _makers(self) -> list[Callable[[LVLMInputs], FwdHooks]]:
        """What makes hooks for each batch in this thread."""
        return self._blocks.makers

    @contextmanager
    def bare(self: Wrapped) -> Iterator[Wrapped]:
        """The model without any hooks in a ``with`` block, in the middle of a forward pass too; all are back after it.

        A defence that asks the model something more (a caption, the same request with a warning) does so here, so that neither its
        own hooks, nor another defence's, nor a recorder of activations run on what it asks.
        """
        with without_hooks(self.bridge.hook_dict.values()), self._blocks.muted():
            yield self

    @property
    def is_hooked(self) -> bool:
        """Whether hooks are on the model now, those of a repair included."""
        return bool(self._makers) or any(point.fwd_hooks for point in self.bridge.hook_dict.values())

    def acting(self) -> list[str]:
        """What is on the model now: the hook points that have hooks, and what was given to :meth:`hooks_for_each_batch`, a repair
        by a digest of its settings and numbers. Of other hook functions only the places are known."""
        points = [name for name, point in self.bridge.hook_dict.items() if point.has_hooks()]
        functions = [getattr(make, "func", make) for make in self._makers]  # of a partial, what is called
        owners: list[tuple[Any, Any]] = [(getattr(make, "__self__", None), make) for make in functions]
        return points + [
            repair_fingerprint(owner) if hasattr(owner, "describe") else getattr(make, "__qualname__", repr(make))
            for owner, make in owners
        ]

    def _require_open(self) -> None:
        if not self._seams.points:
            raise RuntimeError(f"this {type(self).__name__} is closed; go on with {self.advice.again}")

    def _require(self, site: SiteLike) -> Site:
        self._require_open()
        try:
            site = Site.parse(site)
        except ValueError as error:
            if not isinstance(site, str) or site not in self.bridge.hook_dict:
                raise
            raise ValueError(
                f"{error}; that is a hook point of TransformerLens and no site: hooks may be there, and "
                "lvlm.bind(inputs).run_with_cache(inputs.input_ids, names_filter=...) keeps its activations"
            ) from None
        if site not in self._seams.points:
            raise ValueError(f"this model has no site {site}: {why_missing(site, self.hf_model.config, self.family)}")
        return site
