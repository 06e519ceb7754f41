"""A study in a folder: `examples.jsonl` and `study.json`, so that any model and any data can be diagnosed and repaired.

study.json: name, about, refusal (a refusal in the model's words), comply and refuse (openings of compliant answers and of
refusals), seen ({"visual": [channels], "textual": [channels]}), plain (the channel that the model refuses), and, as it
applies, pairs ({name: [[id of the safe twin, id of the unsafe twin], ...]}; examples of the fit split, for mediation) and
gradient (ids of test requests with pictures and compliant responses, which the model refuses). Each example may name its
split in meta.split; otherwise items are dealt to splits by group.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_lens.core.examples import Example, PairedExamples
from care_lens.core.outcome import Judge, UnsafeMargin
from care_lens.data.jsonl import read_examples
from care_lens.data.study import SPLITS, Split, Study, split_by_group

_REQUIRED = ("name", "refusal", "comply", "refuse", "seen")


def read_study(directory: str | Path, *, tokenizer: Any, judge: Judge, seed: int = 0) -> Study:
    """Read a study from a folder.

    Args:
        directory: holds `examples.jsonl` and `study.json`.
        tokenizer: of the model; the first tokens of the openings are the outcome's.
        judge: of the answers.
        seed: of the deal, where examples name no split.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if study.json lacks a key, only some examples name a split, a name is no split, or a pair or gradient id
            is of no example of its split.
    """
    directory = Path(directory)
    settings = json.loads((directory / "study.json").read_text(encoding="utf-8"))
    if missing := [key for key in _REQUIRED if key not in settings]:
        raise ValueError(f"study.json must have the keys {_REQUIRED}, got none of {missing}")
    examples = read_examples(directory / "examples.jsonl")
    suites = _suites(examples, seed)
    return Study(
        name=settings["name"],
        about=settings.get("about", ""),
        suites=suites,
        seen={modality: tuple(channels) for modality, channels in settings["seen"].items()},
        judge=judge,
        outcome=UnsafeMargin(
            comply=_first_tokens(tokenizer, settings["comply"]),
            refuse=_first_tokens(tokenizer, settings["refuse"]),
        ),
        refusal=settings["refusal"],
        plain=settings.get("plain", "plain"),
        pairs={
            name: PairedExamples(
                safe=_by_id(suites, "fit", [safe for safe, _ in twins]),
                unsafe=_by_id(suites, "fit", [unsafe for _, unsafe in twins]),
            )
            for name, twins in settings.get("pairs", {}).items()
        },
        gradient=_by_id(suites, "test", settings.get("gradient", [])),
    )


def _by_id(
    suites: Mapping[Split, Mapping[str, Sequence[Example]]], split: Split, ids: Sequence[str]
) -> tuple[Example, ...]:
    found = {e.id: e for examples in suites.get(split, {}).values() for e in examples}
    if unknown := [name for name in ids if name not in found]:
        raise ValueError(
            f"pairs and gradient must name examples of the {split} split, got {unknown[:5]}; give them meta.split"
        )
    return tuple(found[name] for name in ids)


def _suites(examples: Sequence[Example], seed: int) -> dict[Split, dict[str, tuple[Example, ...]]]:
    named = [e for e in examples if e.meta.get("split")]
    if not named:
        return split_by_group(examples, seed=seed)
    if len(named) != len(examples):
        raise ValueError(f"all examples or none must name their split in meta, got {len(named)} of {len(examples)}")
    out: dict[Split, dict[str, tuple[Example, ...]]] = {split: {} for split in SPLITS}
    for example in examples:
        split = example.meta["split"]
        if split not in SPLITS:
            raise ValueError(f"meta.split must be one of {SPLITS}, got {split!r} in {example.id!r}")
        out[split][example.channel] = (*out[split].get(example.channel, ()), example)
    return out


def _first_tokens(tokenizer: Any, openings: Sequence[str]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in openings))
