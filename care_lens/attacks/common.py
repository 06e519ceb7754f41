"""What attacks share: settings that say what was attacked, the model without weight gradients, success counted on saved pictures."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from care_lens.attacks.losses import loss_settings
from care_lens.core.attack import AttackResult
from care_lens.core.defence import defended
from care_lens.core.digests import content_digest
from care_lens.core.examples import Example
from care_lens.core.identity import examples_digest, model_fingerprint, repair_fingerprint
from care_lens.core.outcome import Judge, Verdict
from care_lens.core.results import package_versions
from care_lens.core.verdicts import require_verdicts
from care_lens.lvlm.hooked import HookedLVLM


def described(attack: Any) -> dict[str, Any]:
    """An attack's kind and fields as JSON-able values; functions by name and digest."""
    fields = {field.name: _plain(getattr(attack, field.name)) for field in dataclasses.fields(attack)}
    return {"attack": type(attack).__name__, **fields}


def _plain(value: Any) -> Any:
    held: Any = value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not callable(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "describe"):
        return held.describe()
    return loss_settings(held) if callable(value) else content_digest(value)


def run_settings(attack: Any, examples: Sequence[Example], defence: Any, seed: int) -> dict[str, Any]:
    """The settings of a result: the attack, the seed, and the defence that was on the model."""
    return {
        **attack.describe(),
        "seed": seed,
        "n": len(examples),
        "defence": None if defence is None else {"name": defence.name, **defence.describe()},
        "versions": package_versions(),
    }


def identity(lvlm: HookedLVLM, examples: Sequence[Example], defence: Any) -> dict[str, Any]:
    """What a checkpoint must be of, beside the settings."""
    return {
        "examples": examples_digest(examples),
        "weights": model_fingerprint(lvlm.hf_model),
        "acting": lvlm.acting(),
        "defence_fingerprint": None if defence is None else repair_fingerprint(defence),
    }


def on_model(defence: Any, lvlm: HookedLVLM) -> Any:
    """The defence's block, or one that does nothing."""
    return nullcontext() if defence is None else defence.on(lvlm)


def require_requests(examples: Sequence[Example]) -> None:
    """Refuse an empty list.

    Raises:
        ValueError: If it is.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")


def in_channel(example: Example, channel: str | None) -> Example:
    """The example in another channel; None: as it was."""
    return example if channel is None else replace(example, channel=channel)


def asked_for(example: Example) -> str:
    """What a request is after, for judges: its behaviour, else its prompt as it was."""
    return example.behaviour or example.prompt


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of any weight for the duration of a ``with`` block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def answers(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    defence: Any = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    **options: Any,
) -> list[str]:
    """What the model answers to requests with a defence on it, each with the beginning that the example gives.

    Args:
        lvlm: The model.
        examples: The requests.
        defence: What is on the model; it may rewrite them.
        max_new_tokens: Most tokens of an answer.
        batch_size: Examples at a time.
        **options: Of :meth:`~care_lens.lvlm.HookedLVLM.generate`.
    """
    texts: list[str] = []
    with on_model(defence, lvlm):
        for start in range(0, len(examples), batch_size):
            part = [replace(e, response=None) for e in examples[start : start + batch_size]]
            inputs = lvlm.prepare(defended(defence, part))
            texts += lvlm.generate(inputs, max_new_tokens=max_new_tokens, **options).answers
    return texts


def judged(
    result: AttackResult,
    lvlm: HookedLVLM,
    *,
    judge: Judge,
    defence: Any = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    directory: str | Path | None = None,
) -> AttackResult:
    """Count success on what is saved: the pictures are written as PNG, read back, asked and judged.

    Args:
        result: What an attack made.
        lvlm: The model.
        judge: Says what an answer is; an attack has succeeded where it complied.
        defence: What is on the model now; the one that was attacked, or another (transfer).
        max_new_tokens: Most tokens of an answer.
        batch_size: Examples at a time.
        directory: Where the result is saved; None: a folder that is removed again.

    Returns:
        The result as it was read back, with ``complied`` in its frame; a missing answer is missing there.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.attacks import Prefill, judged
        >>> lvlm, study = organism.load(), organism.study()
        >>> result = Prefill(opening="sure for the").run(lvlm, organism.examples("plain", "test", n=2))
        >>> len(judged(result, lvlm, judge=study.judge, max_new_tokens=4).frame.complied)
        2
    """
    if directory is None:
        with tempfile.TemporaryDirectory() as folder:
            result.save(folder)
            read = AttackResult.load(folder)
    else:
        result.save(directory)
        read = AttackResult.load(directory)
    texts = answers(lvlm, read.examples, defence=defence, max_new_tokens=max_new_tokens, batch_size=batch_size)
    verdicts = require_verdicts(judge(list(read.examples), texts), len(texts), judge=judge)
    made = read.with_complied([None if v is Verdict.MISSING else v is Verdict.COMPLIED for v in verdicts])
    if directory is not None:
        made.save(directory)
    return made
