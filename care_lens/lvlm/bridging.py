"""Putting a plain Hugging Face model in a TransformerBridge."""

from typing import Any

from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import (
    build_bridge_from_module,
    detect_tokenizer_bos_eos,
)

from care_lens.lvlm.families import family_of
from care_lens.lvlm.plain import remember_attention

ATTACHED = "_care_lens_attached"
"""Where a plain model holds what is attached to it."""


def bridged(model: nn.Module, processor: Any) -> Any:
    """The bridge of a model that is modified in place; see ``HookedLVLM.from_hf``.

    Raises:
        ValueError: If the model's family is not known, it is in a bridge already, or a repair is attached to it.
    """
    family = family_of(model)
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ValueError(
            "model must be plain Hugging Face, got one that is in a bridge already; go on with the HookedLVLM that has it, or take "
            "HookedLVLM.from_bridge(lvlm.bridge, processor) after lvlm.close()"
        )
    architecture = type(model).__name__
    for cls_name in [c.__name__ for c in type(model).__mro__ if c.__name__ in family.adapters]:
        architecture = f"CareLens{cls_name}"
        ArchitectureAdapterFactory.register_adapter(architecture, family.adapters[cls_name])
        break
    if ATTACHED in model.__dict__:
        raise ValueError(
            "model must not have a repair attached, got one that has; remove it first (handle.remove()), and put it on the HookedLVLM"
        )
    remember_attention(model)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    bridge = build_bridge_from_module(model.eval(), architecture, hf_config=model.config)
    bridge.tokenizer = processor.tokenizer
    bridge.cfg.tokenizer_prepends_bos, bridge.cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(processor.tokenizer)
    bridge.processor = processor
    return bridge
