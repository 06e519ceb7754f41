"""Options of generation: what was asked for, what contradicts itself, and what the model really uses.

What is not given is not passed: the caller's ``generation_config`` and the model's own then say, as in Hugging Face's ``generate``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from care_lens.lvlm.errors import GenerationOptionError

DEFAULT_NEW_TOKENS = 32
"""Most tokens of an answer where neither the call nor a configuration says."""

REFUSED: dict[str, tuple[Any, ...]] = {
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None, 0),
    "use_mtp": (None, False),
    "prefill_chunk_size": (None, 0),
    "guidance_scale": (None, 1),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "custom_generate": (None,),
    "use_cache": (None, True),
    "return_dict_in_generate": (None, False),
}
"""Options of decoding that are refused unless they have one of these values."""

COPIES = "num_return_sequences"
_LENGTHS = ("max_new_tokens", "max_length")
_ABOUT = ("transformers_version", "_from_model_config")


def _said(config: Any) -> dict[str, Any]:
    """What a generation configuration says itself."""
    if config is None:
        return {}
    if not hasattr(config, "to_diff_dict"):
        raise TypeError(
            f"generation_config must be a transformers GenerationConfig, got {type(config).__name__}; write "
            "GenerationConfig(**options), or give the options themselves"
        )
    said = {**config.to_diff_dict(), **{name: getattr(config, name, None) for name in (*_LENGTHS, "do_sample")}}
    return {name: value for name, value in said.items() if value is not None and name not in _ABOUT}


def _check_length(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise GenerationOptionError(f"{name} must be a whole number of tokens from 1, got {value!r}")


def resolve(own_config: Any, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to pass to Hugging Face's ``generate``, and what generation then goes by.

    Args:
        own_config: The model's own generation configuration.
        given: Options of the call; those that are None were not given.

    Returns:
        The options to pass on; and the settings in force, those of the call before those of its ``generation_config`` before the
        model's own, without what is at transformers' default.

    Raises:
        GenerationOptionError: If two of what the call gives contradict each other: two lengths, or an option that its
            ``generation_config`` has with another value.
        TypeError: If ``generation_config`` is no such thing.
    """
    passed = {name: value for name, value in given.items() if value is not None}
    config, own = _said(passed.get("generation_config")), _said(own_config)
    options = {name: value for name, value in passed.items() if name != "generation_config"}
    for name in _LENGTHS:
        if name in options:
            _check_length(name, options[name])
    if wrong := {
        name: (options[name], config[name]) for name in options if name in config and options[name] != config[name]
    }:
        raise GenerationOptionError(
            f"options must be given once, got {wrong} (in the call, in its generation_config); take them out of one of the two"
        )
    lengths = {name: {**config, **options}[name] for name in _LENGTHS if name in options or name in config}
    if len(lengths) > 1:
        raise GenerationOptionError(f"one length must be given, got {lengths}; leave max_new_tokens or max_length out")
    if not lengths and not any(name in own for name in _LENGTHS):
        passed["max_new_tokens"] = options["max_new_tokens"] = DEFAULT_NEW_TOKENS
    if "max_length" in lengths and "max_new_tokens" in own:
        passed["max_new_tokens"] = None  # transformers would take the model's own number of new tokens
    in_force = {**own, **config, **options}
    if lengths:
        in_force = {name: value for name, value in in_force.items() if name not in _LENGTHS or name in lengths}
    in_force.setdefault("do_sample", False)
    return passed, in_force


def refuse(
    in_force: Mapping[str, Any],
    *,
    allowed: Sequence[str] = (),
    instead: str = "call lvlm.hf_model.generate inside `with lvlm.hooks(...)` for what they do",
) -> None:
    """Refuse ways of decoding in which hooks do not see each token once.

    Args:
        in_force: The settings in force.
        allowed: Names that are not looked at.
        instead: What to do where one of them is wanted.

    Raises:
        GenerationOptionError: As said.
    """
    if refused := [
        name for name, fine in REFUSED.items() if name not in allowed and in_force.get(name) not in (None, *fine)
    ]:
        returned = "" if "return_dict_in_generate" in allowed else ", and what is returned is a Generation"
        output = "" if "return_dict_in_generate" in allowed else ", transformers' own output"
        raise GenerationOptionError(
            f"hooks must see each token once{returned}: got {refused}, which are not "
            "defined here (assisted or contrastive decoding, DoLa, a decoding loop of one's own, prompt lookup, chunked prefill, guidance, "
            f"decoding without a cache{output}); leave them out, or {instead}"
        )


def copies(in_force: Mapping[str, Any], *, stateful: bool) -> int:
    """How many times each row stands in the batch that is generated from.

    Args:
        in_force: The settings in force.
        stateful: Whether something is kept for each row.

    Raises:
        GenerationOptionError: If something is kept for each row and there are beams, which change places.
    """
    beams = in_force.get("num_beams") or 1
    if beams > 1 and stateful:
        raise GenerationOptionError(
            f"num_beams must be 1 where activations are kept or a repair is on, got {beams}: beams change places, and "
            "what is known of a row would be another beam's"
        )
    return 1 if beams > 1 else in_force.get(COPIES) or 1
