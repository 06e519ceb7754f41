"""Models, studies, judges and settings as the command line names them."""

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from care_lens.cli.base import require_out
from care_lens.cli.early import (
    require_bundled_alone,
    require_device,
    require_dtype,
    require_judge,
    require_quantization,
    require_study,
)
from care_lens.cli.options import numbers

if TYPE_CHECKING:
    from care_lens.core import Judge
    from care_lens.data import Study
    from care_lens.lvlm import HookedLVLM
    from care_lens.pipeline import RunSettings
    from care_lens.pipeline.settings import Size


def load_judge(name: str | None) -> "Judge":
    """The judge of a 'module:name', or refusal substrings, with a warning of what they do."""
    from care_lens.evaluation import SubstringRefusalJudge

    if name is None:
        logging.getLogger("care_lens").warning(
            "judge: refusal substrings. Any answer without one counts as compliance, on benign prompts as a right answer; "
            "give --judge module:name to judge by more"
        )
        return SubstringRefusalJudge()
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise typer.BadParameter(
            f"--judge must be 'module:name' of an object that can be imported, got {name!r} ({error})"
        ) from error
    if isinstance(found, type) or not callable(found):
        what = "a class: make an instance in that module" if isinstance(found, type) else type(found).__name__
        raise typer.BadParameter(f"--judge must name a function of (examples, texts) or a judge, got {what}")
    return cast("Judge", found)


def refuse_model(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantization: str | None = None,
) -> None:
    """Refuse a model that cannot be loaded as asked, before anything heavy is imported; last, since that needs torch, a device."""
    require_dtype(dtype)
    require_quantization(quantization)
    require_bundled_alone(model, revision=revision, quantization=quantization)
    require_device(device)


def refuse(model: str, *, data: Path | None, judge: str | None, out: Path | None, **options: str | None) -> None:
    """Refuse a model, a study and a folder of results that do not go together or cannot be written; see :func:`refuse_model`."""
    require_judge(judge)
    require_study(model, data, judge)
    refuse_model(model, **options)
    if out is not None:
        require_out(out)


def load(
    model: str,
    data: Path | None,
    seed: int,
    device: str | None = None,
    dtype: str | None = None,
    judge: str | None = None,
    out: Path | None = None,
    revision: str | None = None,
    quantization: str | None = None,
    size: "Size" = "full",
) -> "tuple[HookedLVLM, Study]":
    """The model and the study, after everything that can be refused without loading the model; of the bundled model what runs of a size use."""
    refuse(
        model, data=data, device=device, dtype=dtype, judge=judge, out=out, revision=revision, quantization=quantization
    )
    if data is None:  # the bundled model with its own study
        from care_lens import organism

        if size == "full":
            # Readers that see three wordings an item tell questions about forbidden items from requests for them.
            study = organism.study(seed=seed, per_item=3)
        else:
            study = organism.study(seed=seed, only=organism.DEMONSTRATED)
        return load_model(model, device, dtype, revision, quantization), study
    found = load_judge(judge)
    from care_lens.data import read_study

    lvlm = load_model(model, device, dtype, revision, quantization)
    return lvlm, read_study(data, tokenizer=lvlm.tokenizer, judge=found, seed=seed)


def kind_of(dtype: str | None) -> Any:
    """The dtype of a name, or None."""
    require_dtype(dtype)
    if dtype is None:
        return None
    import torch

    return getattr(torch, dtype)


def quantized(quantization: str | None) -> Any:
    """The configuration of bitsandbytes for a name, or None."""
    require_quantization(quantization)
    if quantization is None:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=quantization == "4bit", load_in_8bit=quantization == "8bit")


def load_model(
    model: str,
    device: str | None,
    dtype: str | None,
    revision: str | None = None,
    quantization: str | None = None,
) -> "HookedLVLM":
    """The bundled model, or one from the hub or a directory."""
    config = quantized(quantization)
    require_bundled_alone(model, revision=revision, quantization=quantization)
    if model == "bundled":
        from care_lens import organism

        return organism.load(device_map=device, dtype=kind_of(dtype))
    from care_lens.lvlm import HookedLVLM

    options = {} if config is None else {"quantization_config": config}
    return HookedLVLM.from_pretrained(
        model,
        device_map=device,
        dtype=kind_of(dtype),
        **({} if revision is None else {"revision": revision}),
        **options,
    )


def generation(**given: Any) -> Any:
    """Settings of generation, refused if they contradict one another."""
    from care_lens.evaluation import GenerationSettings

    return GenerationSettings(**given)


def checked_numbers(
    epsilons: str | None, ranks: str | None, depths: str | None
) -> dict[str, tuple[float, ...] | tuple[int, ...] | None]:
    """Epsilons, reader ranks and depths as they are written on the command line.

    Raises:
        typer.BadParameter: If they are no such numbers.
    """
    found = {
        "epsilons": numbers(epsilons, "--epsilons", float),
        "reader_ranks": numbers(ranks, "--ranks", int),
        "reader_depths": numbers(depths, "--depths", int),
    }
    if wrong := [e for e in found["epsilons"] or () if not 0 < e < 1]:
        raise typer.BadParameter(f"--epsilons must be above 0 and below 1, got {wrong[0]}")
    if wrong := [k for k in found["reader_ranks"] or () if k < 0]:
        raise typer.BadParameter(f"--ranks must be 0 or more, got {wrong[0]}")
    if wrong := [k for k in found["reader_depths"] or () if k < 1]:
        raise typer.BadParameter(f"--depths must be 1 or more, got {wrong[0]}")
    return found


def run_settings(
    study: "Study",
    model: str,
    size: "Size",
    seed: int,
    *,
    epsilons: str | None = None,
    ranks: str | None = None,
    depths: str | None = None,
    **given: Any,
) -> "RunSettings":
    """The settings of a run: the model's defaults, what was given, and those of its size on top."""
    from care_lens.pipeline import RunSettings
    from care_lens.pipeline.needs import shortened

    settings = RunSettings(seed=seed)
    if model != "bundled":
        settings = replace(settings, batch_size=8, max_new_tokens=128)
    given |= checked_numbers(epsilons, ranks, depths)
    given = {name: value for name, value in given.items() if value is not None}
    if size == "full":
        return replace(settings, **given)
    return shortened(study, settings, size, given=given)
