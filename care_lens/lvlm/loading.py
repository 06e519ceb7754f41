"""Loading a model and its processor, with messages that say what is missing or does not belong together."""

from pathlib import Path
from typing import Any

import torch

from care_lens.core.errors import CareLensError
from care_lens.lvlm.families import Family, families


class LoadingError(CareLensError, ValueError, OSError):
    """There is no model where one was to be loaded from, or it cannot be loaded as asked."""


def require_loadable(name_or_dir: Any, dtype: Any) -> None:
    """Refuse what is neither a folder with a model nor a hub's name, and types of numbers that torch does not have.

    Raises:
        LoadingError: It is a ValueError and an OSError.
    """
    path = Path(name_or_dir)
    if path.is_dir() and not (path / "config.json").exists():
        raise LoadingError(f"name_or_dir must be a folder with a model, got {path}, which has no config.json")
    if not path.exists() and (path.is_absolute() or str(name_or_dir).startswith((".", "~")) or len(path.parts) > 2):
        raise LoadingError(
            f"name_or_dir must be a folder with a model or a name on the hub, got {name_or_dir}, which is no folder"
        )
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise LoadingError(f"dtype must be one of torch's, such as 'bfloat16', or 'auto', got {dtype!r}")


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


def require_processor(model: Any, processor: Any, family: Family) -> None:
    """Refuse a processor that is not the model's own.

    Args:
        model: The Hugging Face model.
        processor: What is given as its processor.
        family: The model's family.

    Raises:
        ValueError: If it has no tokenizer or chat template, or its image token is another one.
    """
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "apply_chat_template"):
        raise ValueError(f"processor must be the model's processor, with its tokenizer, got {type(processor).__name__}")
    tokens = family.image_ids(processor)
    if model.config.image_token_id not in tokens:
        raise ValueError(
            f"processor must be the model's own: its image token is {tokens[0]}, the model's is {model.config.image_token_id}"
        )
