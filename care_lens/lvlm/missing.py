"""Names that a user of TransformerLens types on a HookedLVLM, and what to write for them."""

import difflib
from typing import Any

from care_lens.core.errors import CareLensError

_INSTEAD = {
    "to_tokens": "lvlm.prepare(Example(prompt, image=picture)) makes a batch with its pixels; its tokens are inputs.input_ids",
    "to_str_tokens": "[lvlm.tokenizer.decode(token) for token in inputs.input_ids[0]] gives the tokens of a prepared row as text",
    "to_string": "lvlm.tokenizer.decode(tokens) gives the text of tokens",
    "to_single_token": "lvlm.tokenizer.encode(text, add_special_tokens=False) gives the tokens of a text",
    "to_single_str_token": "lvlm.tokenizer.decode([token]) gives the text of a token",
    "cfg": "lvlm.n_layers('language') and lvlm.width(site) give sizes, lvlm.hf_model.config is the model's configuration and "
    "lvlm.bridge.cfg TransformerLens's, of the language tower alone",
    "config": "lvlm.hf_model.config is the model's configuration",
    "forward": "lvlm(inputs) gives the logits of a prepared batch",
    "loss_fn": "care_lens.core.ResponseLogProb is the log-probability of a response; lvlm(inputs) gives the logits",
    "add_hook": "`with lvlm.hooks([(site, function)]):` has hooks on the model in its block and takes them off again",
    "add_perma_hook": "`with lvlm.hooks([(site, function)]):` has hooks on the model in its block and takes them off again",
    "reset_hooks": "hooks end with their `with lvlm.hooks(...):` block, so nothing is left to take off; lvlm.acting() lists what acts",
    "remove_all_hook_fns": "hooks end with their `with lvlm.hooks(...):` block; lvlm.acting() lists what acts",
    "hook_dict": "lvlm.sites() lists the sites, and lvlm.bridge.hook_dict all of TransformerLens's hook points",
    "hook_points": "lvlm.sites() lists the sites, and lvlm.bridge.hook_points() all of TransformerLens's hook points",
    "mod_dict": "lvlm.plain_modules() gives the Hugging Face model's modules by name",
    "blocks": "lvlm.bridge.blocks are the blocks of the language tower, lvlm.sites() the places that can be hooked",
    "embed": "lvlm.bridge.embed is the embedding of tokens, lvlm.bridge.W_E its matrix; pictures enter after it, at blocks.0.hook_resid_pre",
    "unembed": "lvlm.bridge.unembed is the unembedding, lvlm.bridge.W_U its matrix",
    "ln_final": "lvlm.bridge.ln_final is the norm before the unembedding",
    "get_caching_hooks": "lvlm.run_with_cache(inputs, sites=[...]) keeps activations",
    "boot_transformers": "HookedLVLM.from_pretrained(name_or_directory) loads a model with its processor",
    "from_pretrained_no_processing": "HookedLVLM.from_pretrained(name_or_directory) never changes weights",
    "eval": "the model is in evaluation mode already",
    "train": "lvlm.hf_model.train() is Hugging Face's; hooks and figures here suppose evaluation mode",
    "to": "HookedLVLM.from_pretrained(..., device_map=..., dtype=...) loads it there, and lvlm.hf_model.to(...) moves it",
    "cuda": "HookedLVLM.from_pretrained(..., device_map='cuda') loads it there, and lvlm.hf_model.to('cuda') moves it",
    "cpu": "lvlm.hf_model.to('cpu') moves it",
    "parameters": "lvlm.hf_model.parameters() gives them",
    "state_dict": "lvlm.hf_model.state_dict() gives the weights under Hugging Face's names",
    "save_pretrained": "lvlm.hf_model.save_pretrained(folder) saves it under Hugging Face's names",
    "tokenize": "lvlm.prepare(Example(prompt, image=picture)) makes a batch with its pixels",
    "trace": "`lvlm.run_with_hooks(inputs, fwd_hooks=[...])` edits activations, run_with_cache(inputs, sites=[...]) keeps them",
}


class MissingNameError(CareLensError, AttributeError):
    """A HookedLVLM has no such attribute. The message says what does what the name does elsewhere."""


def missing(owner: Any, name: str, bridge: Any) -> MissingNameError:
    """The error for an attribute that is not there.

    Args:
        owner: What was asked for it.
        name: Its name.
        bridge: The bridge inside; None: not known.
    """
    kind = type(owner).__name__
    if name in _INSTEAD:
        told = _INSTEAD[name]
    elif close := difflib.get_close_matches(name, [n for n in dir(type(owner)) if not n.startswith("_")], n=1):
        told = f"did you mean {close[0]}?"
    elif bridge is not None and hasattr(type(bridge), name):
        told = f"lvlm.bridge.{name} is TransformerLens's, which knows nothing of pixels; lvlm.bind(inputs) fixes them"
    else:
        told = (
            "dir(lvlm) lists what there is, lvlm.hf_model is the Hugging Face model and lvlm.bridge TransformerLens's"
        )
    return MissingNameError(f"{kind} has no attribute {name!r}; {told}", name=name, obj=owner)
