"""Loading, with messages that say what is missing."""

from typing import Any

from care_lens.lvlm.families import families


def require_known(config: Any) -> None:
    """Refuse a model of an unknown family before its weights are read.

    Args:
        config: The model's config.

    Raises:
        ValueError: If no family is registered for any of its architectures.
    """
    known = sorted(name for family in families() for name in family.architectures)
    if (found := config.architectures or []) and not set(found) & set(known):
        raise ValueError(
            f"model must be one of {known}, got {found}; describe its family in a Family object and pass it to "
            "care_lens.lvlm.families.register_family"
        )


def load_processor(name_or_dir: Any, **kwargs: Any) -> Any:
    """The processor of a model.

    Args:
        name_or_dir: Hub name or path.
        **kwargs: Of ``AutoProcessor.from_pretrained``.

    Raises:
        ImportError: If a package is missing that it needs.
        OSError: If the model comes with no processor.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name_or_dir, **kwargs)
    except ImportError as error:
        raise ImportError(
            f"the processor of {name_or_dir} needs a package that is not installed, often torchvision (install the build that "
            f"belongs to your torch); nothing was installed for you. {error}"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise OSError(
            f"{name_or_dir} must come with a processor of text and images, got {type(processor).__name__}; load the model yourself "
            "and give it with its processor to HookedLVLM.from_hf"
        )
    return processor
