"""HookedLVLM: a vision-language model with honest hook points on both towers and the projector.

It wraps a TransformerBridge and a processor. The hook points are on the bridge, under the sites' names, so
that a name means one thing whether it is run through HookedLVLM or through ``.bridge``. Hooks are functions
``fn(activation, hook)`` that return a new tensor, or None to leave the activation as it is. At every editable
site a returned edit changes what the model computes from there on, exactly as the site's name says. Logits
equal the plain Hugging Face model's with eager attention, given the same inputs (positions are counted
without padding, as ``generate`` does).

Gradients: nothing here turns them off except ``generate``; put calls under ``torch.no_grad()`` to save
memory. Dtypes: what a hook returns is cast to the activation's dtype, so float32 hooks work on a
half-precision model.
"""

import logging
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from care_lens.core.examples import Example
from care_lens.core.site import Site, SiteLike
from care_lens.lvlm.attention import NAME as ATTENTION
from care_lens.lvlm.bound import BoundLVLM
from care_lens.lvlm.bridging import bridged
from care_lens.lvlm.cache import LVLMCache
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.footprint import LARGE, language_bytes, told
from care_lens.lvlm.given import NOT_GIVEN, count_of, listed
from care_lens.lvlm.hooks import FwdHooks, HookFn, hook_pairs
from care_lens.lvlm.inputs import Generation, LVLMInputs, require_inputs
from care_lens.lvlm.loading import load_processor, require_known, require_loadable
from care_lens.lvlm.options import COPIES, REFUSED, copies, refuse, resolve
from care_lens.lvlm.prepare import prepare_batch
from care_lens.lvlm.recorder import Recorder
from care_lens.lvlm.wrapped import WrappedBridge

__all__ = ["REFUSED", "HookedLVLM"]


log = logging.getLogger(__name__)


class HookedLVLM(WrappedBridge):
    """A vision-language model whose insides can be read and edited by site.

    Make one with :meth:`from_pretrained`, :meth:`from_hf` or :meth:`from_bridge`. It is a context manager:
    leaving it takes the hook points off the bridge.

    Attributes:
        bridge: The TransformerBridge.
        processor: The processor.
        tokenizer: The processor's tokenizer.
        family: How models of this kind are laid out.
    """

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | PathLike[str],
        *,
        device_map: Any = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization_config: Any = None,
        **others: Any,
    ) -> "HookedLVLM":
        """Load a model and its processor from a hub name or a directory.

        Args:
            name_or_dir: Hub name or path.
            device_map: As in transformers; None: the CPU.
            dtype: As in transformers; None: the dtype of the weights.
            revision: Branch, tag or commit on the hub.
            trust_remote_code: Whether to run code that comes with the weights.
            quantization_config: As in transformers, for instance a ``BitsAndBytesConfig``; None: what the weights say.
            others: None are taken; the error names the option that is meant.

        Returns:
            The model, in evaluation mode, with eager attention.

        Raises:
            ValueError: If the model's family is not known; said before any weights are read.
            ImportError: If a package is missing that the processor needs (often torchvision).
            OSError: If there is no such model, or it has no processor.
            TypeError: If another option is given.
        """
        for name in others:
            meant = {
                "device": "device_map=",
                "torch_dtype": "dtype=",
                "load_in_4bit": "quantization_config=",
                "load_in_8bit": "quantization_config=",
            }
            raise TypeError(
                f"from_pretrained takes no {name}; "
                + (
                    f"write {meant[name]}"
                    if name in meant
                    else "load the model with transformers and give it to HookedLVLM.from_hf"
                )
            )
        from transformers import AutoConfig, AutoModelForImageTextToText

        require_loadable(name_or_dir, dtype)
        common: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        require_known(AutoConfig.from_pretrained(name_or_dir, **common))
        processor = load_processor(name_or_dir, **common)
        if quantization_config is not None:
            common["quantization_config"] = quantization_config
        model = AutoModelForImageTextToText.from_pretrained(
            name_or_dir, device_map=device_map, dtype=dtype or "auto", attn_implementation="eager", **common
        )
        return cls.from_hf(model, processor)

    @classmethod
    def from_hf(cls, model: nn.Module, processor: Any) -> "HookedLVLM":
        """Wrap a Hugging Face model.

        The model is modified in place: bridge components stand in for its submodules, attention becomes eager
        on both towers, and it is put in evaluation mode. It computes the same as before.

        Args:
            model: The model.
            processor: Its processor, with a chat template.

        Returns:
            The wrapped model.

        Raises:
            ValueError: If the model's family is not known, it is in a bridge already, or the processor belongs to another model.
        """
        return cls(bridged(model, processor), processor)

    @classmethod
    def from_bridge(cls, bridge: Any, processor: Any) -> "HookedLVLM":
        """Use a TransformerBridge that is there already.

        The bridge is modified in place (hook points are added, ``blocks.{l}.hook_resid_mid`` comes to mean
        the residual stream) until :meth:`close`.

        Args:
            bridge: The bridge; its attention must be eager.
            processor: The model's processor.

        Returns:
            The wrapped bridge.

        Raises:
            ValueError: If the family is not known, attention is not eager, or the bridge is wrapped already.
        """
        config = bridge.original_model.config
        for tower in (config.text_config, config.vision_config):
            if tower._attn_implementation not in ("eager", ATTENTION):
                raise ValueError(
                    f"attention must be eager, got {tower._attn_implementation!r}; call "
                    "model.set_attn_implementation('eager') before the bridge is made"
                )
        return cls(bridge, processor)

    def prepare(
        self,
        examples: Sequence[Example] | Example,
        *,
        responses: bool = False,
        padding_side: Literal["left", "right"] = "left",
    ) -> LVLMInputs:
        """Make a batch of examples.

        Prompts are plain text: the processor's chat template is applied, with the image first where there is
        one. Rows with and without images can be mixed.

        Args:
            examples: The examples, or one.
            responses: Whether to append each example's response, teacher-forced, and an end-of-sequence
                token. The response is tokenised as it stands, on its own.
            padding_side: Where shorter rows are padded; generation needs "left".

        Returns:
            The batch, on the model's device; pixels stay as the processor made them, unless the model takes them in its
            own dtype only.

        Raises:
            TypeError: If what is given are no examples.
            ValueError: If image placeholders and images do not match, or a response is missing.
        """
        rows = [examples] if isinstance(examples, Example) else list(examples)
        if wrong := [type(row).__name__ for row in rows if not isinstance(row, Example)]:
            raise TypeError(f"examples must be care_lens.Example, got {wrong[0]}; write Example(prompt, image=picture)")
        batch = prepare_batch(
            rows,
            processor=self.processor,
            config=self.hf_model.config,
            family=self.family,
            responses=responses,
            padding_side=padding_side,
        )
        return batch.to(self.device, self.hf_model.dtype if self.family.pixels_in_dtype else None)

    def __call__(self, inputs: LVLMInputs, *, logits_to_keep: int = 0) -> Float[Tensor, "batch kept vocab"]:
        """Logits of a batch.

        Args:
            inputs: The batch.
            logits_to_keep: Compute those of the last so many positions only; 0: all.

        Returns:
            [batch, pos, vocab], or [batch, logits_to_keep, vocab].

        Raises:
            TypeError: If the inputs are not a prepared batch.
        """
        return self.run_with_hooks(inputs, fwd_hooks=(), logits_to_keep=logits_to_keep)

    def run_with_hooks(
        self, inputs: LVLMInputs, *, fwd_hooks: FwdHooks, logits_to_keep: int = 0
    ) -> Float[Tensor, "batch kept vocab"]:
        """Logits of a batch, with hooks.

        Args:
            inputs: The batch.
            fwd_hooks: Pairs of a place and a function.
            logits_to_keep: Compute the logits of the last so many positions only; 0: all.

        Returns:
            [batch, pos, vocab], or [batch, logits_to_keep, vocab].

        Raises:
            ValueError: If this model has no such site, or an edit is refused.

        Warns:
            UserWarning: If hooks are at the vision tower or the projector and the batch has no image, so that they do not run.
        """
        if require_inputs(inputs).pixel_values is None and (unseen := self._outside(hook_pairs(fwd_hooks))):
            warnings.warn(f"hooks at {unseen} do not run: the batch holds no image", stacklevel=2)
        logits_to_keep = count_of(logits_to_keep, inputs)
        with self.batch_hooks(inputs), self.hooks(fwd_hooks):
            kwargs = inputs.model_kwargs()
            return self.bridge(kwargs.pop("input_ids"), logits_to_keep=logits_to_keep, **kwargs)

    def run_with_cache(
        self,
        inputs: LVLMInputs,
        *,
        sites: Sequence[SiteLike] | SiteLike | None = NOT_GIVEN,
        fwd_hooks: FwdHooks = (),
        logits_to_keep: int = 0,
    ) -> tuple[Float[Tensor, "batch kept vocab"], LVLMCache]:
        """Logits of a batch, and its activations at some sites.

        Args:
            inputs: The batch.
            sites: The sites, or one; None: all of them, which is a lot. Hook points that are no sites (``ln_final.hook_scale``) are
                cached by ``bind(inputs).run_with_cache(inputs.input_ids, names_filter=...)``.
            fwd_hooks: Hooks that run before the activations are read, so that the cache holds what the model
                went on with.
            logits_to_keep: Compute the logits of the last so many positions only; 0: all.

        Returns:
            The logits, and a cache keyed by ``str(site)`` of detached copies, which share memory with
            nothing.

        Raises:
            HookError: If no sites are given; the message says what all of them would take.
            ValueError: If this model has no such site, or the batch has no images and a site is about them.
        """
        if sites is NOT_GIVEN:
            raise HookError(
                "sites must be given: the sites whose activations are kept, such as sites=['blocks.0.hook_mlp_out'], or sites=None for all "
                f"{len(self.sites())} of them, which take {told(self, require_inputs(inputs), self.sites())}; lvlm.sites() lists them"
            )
        wanted = self.sites() if sites is None else [self._require(site) for site in listed(sites)]
        if require_inputs(inputs).pixel_values is None:
            if sites is not None and (about := [str(site) for site in wanted if site.tower != "language"]):
                raise ValueError(f"inputs must hold an image to have activations at {about}, got text alone")
            wanted = [site for site in wanted if site.tower == "language"]
        if sites is None and language_bytes(self, inputs, wanted) >= LARGE:
            log.warning(
                "keeping all %d sites takes %s; name those that you need", len(wanted), told(self, inputs, wanted)
            )
        store: dict[str, Tensor] = {}

        def saver(name: str) -> HookFn:
            def save(activation: Tensor, hook: HookPoint) -> None:
                store[name] = activation.detach().clone()

            return save

        logits = self.run_with_hooks(
            inputs,
            fwd_hooks=[*fwd_hooks, *((site, saver(str(site))) for site in dict.fromkeys(wanted))],
            logits_to_keep=logits_to_keep,
        )
        return logits, LVLMCache(store, self.bridge, image_rows=inputs.image_rows, batch_size=inputs.batch_size)

    def generate(
        self,
        inputs: LVLMInputs,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        fwd_hooks: FwdHooks = (),
        sites: Sequence[SiteLike] | SiteLike = (),
        **kwargs: Any,
    ) -> Generation:
        """Answer a batch, by the Hugging Face model's own ``generate`` with the hooks on.

        What is not given is not passed, so that ``generation_config`` and then the model's own generation configuration say, as
        they do in Hugging Face; :meth:`generation_settings` tells what is in force.

        Language hooks see [batch, pos, d] at the first step and [batch, 1, d] at each of the others; vision
        hooks run once. With ``num_return_sequences`` the batch is expanded first: each row stands as many times in it, one
        after the other, and every hook sees that batch and its spans. With beams transformers expands the batch after the
        vision tower.

        Args:
            inputs: The batch, padded on the left, without responses.
            max_new_tokens: Most tokens of an answer; None: as ``max_length`` or a configuration says, else 32.
            do_sample: Whether to sample; False: the likeliest token is taken; None: as a configuration says, else False.
            fwd_hooks: Pairs of a place and a function.
            sites: Sites whose activations are kept, at the prompt and at every generated token that the model was given
                (all but the last); see ``Generation.activations``.
            **kwargs: Passed to ``generate``.

        Returns:
            The answers.

        Raises:
            ValueError: If the batch is padded on the right or holds responses; for options that contradict one another, two lengths
                for instance, and those in ``REFUSED`` (GenerationOptionError), under which hooks do not see each token once or the answer is no Generation; for beams with sites or with hooks
                that are made for each batch (beams change places, and state kept for a row would be another's); or if a
                pattern is to be kept, whose axes grow with each token.
        """
        spans = require_inputs(inputs).spans
        if bool((spans.response & ~spans.prefill).any()) or not bool(spans.context_end[:, -1].all()):
            raise ValueError(
                "inputs must end with the prompt (and a prefill) in every row; prepare them with responses=False and "
                "padding_side='left'"
            )
        passed, in_force = resolve(
            self.hf_model.generation_config, {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **kwargs}
        )
        refuse(in_force)
        wanted = [self._require(site) for site in listed(sites)]
        n = copies(in_force, stateful=bool(wanted) or bool(self._makers))
        if n > 1:
            inputs = inputs.rows([row for row in range(inputs.batch_size) for _ in range(n)])
            passed[COPIES] = 1
        recorder = Recorder(wanted)
        seeing = [str(site) for site in recorder.sites if site.tower != "language"]
        if seeing and inputs.pixel_values is None:
            raise ValueError(f"inputs must hold an image to have activations at {seeing}, got text alone")
        if in_force.get("pad_token_id") is None:
            pad = self.tokenizer.pad_token_id
            passed["pad_token_id"] = self.tokenizer.eos_token_id if pad is None else pad
        with self.batch_hooks(inputs), self.hooks([*fwd_hooks, *recorder.hooks()]), torch.no_grad():
            sequences = self.hf_model.generate(**inputs.generate_kwargs(), **passed)
        new_tokens = sequences[:, inputs.input_ids.shape[1] :]
        texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        # Decoded in one piece, so that a word that the prefill begins is not cut in two.
        given = inputs.spans.prefill
        whole = [torch.cat([inputs.input_ids[i][row], new_tokens[i]]) for i, row in enumerate(given)]
        answers = self.tokenizer.batch_decode(whole, skip_special_tokens=True) if bool(given.any()) else list(texts)
        return Generation(sequences, new_tokens, texts, recorder.activations(), answers)

    def generation_settings(self, **options: Any) -> dict[str, Any]:
        """What :meth:`generate` with these options goes by.

        Args:
            **options: Options of :meth:`generate`, ``generation_config`` included.

        Returns:
            The settings in force that are not transformers' defaults, ``do_sample`` and the length always: the call's before those of
            its ``generation_config`` before the model's own.

        Raises:
            GenerationOptionError: If they contradict one another or are refused.
        """
        _, in_force = resolve(self.hf_model.generation_config, options)
        refuse(in_force)
        return in_force

    def _outside(self, fwd_hooks: FwdHooks) -> list[str]:
        """Names of the sites outside the language tower among the places of hooks."""
        listed = {str(site) for site in self.sites() if site.tower != "language"}
        return sorted({str(place) for place, _ in fwd_hooks if isinstance(place, (str, Site)) and str(place) in listed})

    def bind(self, inputs: LVLMInputs) -> BoundLVLM:
        """The model with this batch's images fixed, which TransformerLens's own tools take as their model.

        Args:
            inputs: The batch.

        Returns:
            An object that satisfies TransformerLens's ``TransformerLensModel`` protocol. Its language tower
            is the model.
        """
        self._require_open()
        return BoundLVLM(self, require_inputs(inputs))
