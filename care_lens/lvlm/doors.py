"""The ways into a wrapped model other than ``HookedLVLM``'s own: ``hf_model(...)``, ``hf_model.generate(...)``, ``bridge(...)``.

Evaluation harnesses call the Hugging Face model with a processor's outputs. Where a repair is on, its hooks are made here for the
batch that those are about, so that the model answers as ``lvlm.generate`` does; a call about which that cannot be known is refused.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from care_lens.lvlm import options
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.marker import Marker, answer_marker
from care_lens.lvlm.raw import RawInputs, inferred_mask, raw_inputs

if TYPE_CHECKING:
    from care_lens.lvlm.wrapped import WrappedBridge

_CACHE = "past_key_values"


class Doors:
    """Stands in the ways into one model until :meth:`remove`.

    Args:
        lvlm: The wrapped model.
    """

    def __init__(self, lvlm: "WrappedBridge") -> None:
        self._lvlm, self._blocks = lvlm, lvlm._blocks
        self._undo: list[Callable[[], Any]] = []
        self._steps: WeakKeyDictionary[Any, tuple[list[Any], list[Any]]] = WeakKeyDictionary()
        model = lvlm.hf_model
        self._layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        inner = getattr(model, "model", None)
        for module in (model, inner) if isinstance(inner, nn.Module) else (model,):
            if "input_ids" in inspect.signature(module.forward).parameters:
                self.stand_in(module, "forward", self._forward)
        self.stand_in(model, "generate", self._generate)
        self._undo.append(lvlm.first_block.register_forward_pre_hook(self._at_first_block).remove)

    def stand_in(self, owner: nn.Module, name: str, call: Callable[..., Any]) -> None:
        """Have ``call(original, args, kwargs)`` answer for a method, for this object alone."""
        original, before = getattr(owner, name), owner.__dict__.get(name)

        @functools.wraps(original)
        def door(*args: Any, **kwargs: Any) -> Any:
            return call(original, args, kwargs)

        owner.__dict__[name] = door
        self._undo.append(
            lambda: owner.__dict__.pop(name, None) if before is None else owner.__dict__.update({name: before})
        )

    def remove(self) -> None:
        """Leave the ways as they were."""
        while self._undo:
            self._undo.pop()()

    def _forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._blocks.running:
            self._refuse_checkpointing()
            return original(*args, **kwargs)
        with self._blocks.turn():
            makers = self._blocks.makers
            given = _named(original, args, kwargs) if makers else {}
            made = self._made_before(given, makers) if makers else []
            if made is None:
                inputs = self._read(given)
                made = [pair for make in makers for pair in make(inputs)]
            with self._blocks.run(), self._lvlm.hooks(made):
                self._refuse_checkpointing()
                output = original(*args, **kwargs)
            if makers and (cache := _cache_of(output)) is not None:
                self._steps[cache] = (makers, made)
            return output

    def _made_before(self, given: Mapping[str, Any], makers: list[Any]) -> list[Any] | None:
        """The hooks that were made when the tokens in this call's cache were read; None at the start of a batch."""
        cache = given.get(_CACHE)
        if cache is None or not cache.get_seq_length():
            return None
        before, made = self._steps.get(cache, (None, []))
        if before != makers:
            raise HookError(
                "a repair is on, and the tokens in past_key_values were read without it or under another one; "
                f"{self._lvlm.advice.afresh}"
            )
        return made

    def _generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return self._generate_in_turn(original, args, kwargs)
        except Exception:
            if (streamer := kwargs.get("streamer")) is not None and not self._blocks.running:
                streamer.end()  # who reads from it in another thread would wait for ever
            raise

    def _generate_in_turn(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._blocks.running:
            return original(*args, **kwargs)
        with self._blocks.turn():
            makers = self._blocks.makers
            made = [pair for make in makers for pair in make(self._generated_from(original, args, kwargs))]
            if self._blocks.mine:
                # A step that was compiled before the hooks came does not notice them.
                kwargs = {**kwargs, "disable_compile": True}
            with self._blocks.run(), self._lvlm.hooks(made):
                return original(*args, **kwargs)

    def _generated_from(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _named(original, args, kwargs)
        in_force = _in_force(self._lvlm.hf_model.generation_config, given)
        options.refuse(in_force, allowed=("return_dict_in_generate",), instead=self._lvlm.advice.plainly)
        if (cache := given.get(_CACHE)) is not None and cache.get_seq_length():
            raise HookError(
                "a repair is on, and it must read the whole prompt: past_key_values must be empty, got "
                f"{cache.get_seq_length()} tokens; leave it out"
            )
        ids = given.get("input_ids", given.get("inputs"))
        if given.get("attention_mask") is None and isinstance(ids, Tensor):
            given["attention_mask"] = inferred_mask(ids, in_force)
        mask = given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool((mask[:, -1] != 0).all()):
            raise HookError(
                "a repair is on, and generate must be given rows that end with the prompt, got padding at the end of one: its answer would "
                "go on from the padding; set processor.tokenizer.padding_side = 'left'"
            )
        if in_force.get("cache_implementation") == "paged":
            raise HookError(
                "a repair is on, and cache_implementation must not be 'paged': the tokens of several requests share one row there, which the "
                "repair cannot tell apart; leave it out"
            )
        copies = options.copies(in_force, stateful=True)
        return self._read({**given, "input_ids": ids}, generating=True, copies=copies)

    def _read(self, given: Mapping[str, Any], **how: Any) -> RawInputs:
        lvlm = self._lvlm
        return raw_inputs(given, config=lvlm.hf_model.config, family=lvlm.family, marker=self._marker, **how)

    @functools.cached_property
    def _marker(self) -> Marker:
        return answer_marker(self._lvlm.processor, self._lvlm.family)

    def _at_first_block(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._blocks.running:
            return
        self._blocks.require_mine()
        if self._blocks.makers:
            raise HookError(
                "a repair is on, which must know what each position is, and the language tower was run without its tokens; call "
                f"{self._lvlm.advice.calls}"
            )

    def _refuse_checkpointing(self) -> None:
        """Refuse hooks where layers are computed again in the backward pass, after the hooks are gone."""
        if not any(layer.gradient_checkpointing and layer.training for layer in self._layers):
            return
        if acting := sorted({name for name, point in self._lvlm.bridge.hook_dict.items() if point.has_hooks()}):
            raise HookError(
                "hooks must not be on a model with gradient checkpointing, which computes its layers again without them in the "
                f"backward pass, got hooks at {acting[:3]}; call the model's gradient_checkpointing_disable() or eval()"
            )


def _in_force(own: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation in force in Hugging Face's own order: the call, its configuration, the model's."""
    config = given.get("generation_config")
    said = [{} if source is None else source.to_dict() for source in (own, config)]
    values: dict[str, Any] = {}
    for source in (*said, given):
        values |= {name: value for name, value in source.items() if value is not None}
    return values


def _named(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    signature = inspect.signature(call)
    given: dict[str, Any] = {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        given |= value if rest else {name: value}
    return given


def _cache_of(output: Any) -> Any:
    """The key-value cache in a model's output, or None."""
    found = getattr(output, _CACHE, None)
    if found is None and isinstance(output, tuple):
        found = next((part for part in output if hasattr(part, "get_seq_length")), None)
    return found
