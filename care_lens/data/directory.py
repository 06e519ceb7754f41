"""A study in a folder: `examples.jsonl` and `study.json`, so that any model and any data can be diagnosed and repaired.

study.json: name, about, refusal (a refusal in the model's words), comply and refuse (lists of openings of compliant answers
and of refusals), seen ({"visual": [channels], "textual": [channels]}), plain (the channel that the model refuses), and, as it
applies, pairs ({name: [[id of the safe twin, id of the unsafe twin], ...]}; examples of the fit split, for mediation) and
gradient (ids of test requests with pictures and compliant responses, which the model refuses). Each example may name its
split in meta.split; otherwise items are dealt to splits by group. twins.jsonl, if it is there, has further examples that stand in pairs
only, such as attacks over a grey picture.

    study = read_study("my_folder", tokenizer=lvlm.tokenizer, judge=SubstringRefusalJudge())
    write_study(study, "my_folder", comply=["Sure", "Here"], refuse=["I'm sorry", "I cannot"])
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example, PairedExamples
from care_lens.core.files import write_whole
from care_lens.core.identity import example_fingerprint
from care_lens.core.outcome import Judge, UnsafeMargin
from care_lens.core.require import require_path
from care_lens.data.jsonl import DataFileError, parse_json, read_examples, read_text, write_examples
from care_lens.data.study import SPLITS, Modality, Split, Study, StudyError, split_by_group

_REQUIRED = ("name", "refusal", "comply", "refuse", "seen")
_OPTIONAL = ("about", "plain", "counterpart", "pairs", "gradient", "made")
_FILES = ("examples.jsonl", "study.json")
TWINS = "twins.jsonl"
"""Examples that stand in pairs only."""


class StudyNotFoundError(CareLensError, FileNotFoundError):
    """The folder of a study, or one of its files, is missing."""


def read_study(directory: str | Path, *, tokenizer: Any, judge: Judge, seed: int = 0) -> Study:
    """Read a study from a folder.

    Args:
        directory: holds `examples.jsonl` and `study.json`.
        tokenizer: of the model; the first tokens of the openings are the outcome's.
        judge: of the answers.
        seed: of the deal, where examples name no split.

    Raises:
        StudyNotFoundError: if the folder or a file is missing. It is a FileNotFoundError.
        DataFileError: if a file is not as the module's text says: a key is missing, unknown, given twice or of another type, comply
            and refuse begin with one token, only some examples name a split, a name is no split, or a pair or gradient id is of no example
            of its split. It is a ValueError.
        ValueError: as `Study` does.
    """
    directory = require_path(directory, "directory")
    if not directory.is_dir():
        raise StudyNotFoundError(
            f"{directory} must be a folder with {' and '.join(_FILES)}, but there is no such folder"
        )
    if missing := [name for name in _FILES if not (directory / name).is_file()]:
        raise StudyNotFoundError(f"{directory} must hold {' and '.join(_FILES)}, got no {' and no '.join(missing)}")
    settings = _settings(directory / "study.json")
    suites = _suites(read_examples(directory / "examples.jsonl"), seed)
    extra = {e.id: e for e in read_examples(directory / TWINS)} if (directory / TWINS).exists() else {}
    return Study(
        name=settings["name"],
        about=settings.get("about", ""),
        suites=suites,
        seen={modality: tuple(channels) for modality, channels in settings["seen"].items()},
        judge=judge,
        outcome=outcome_of(tokenizer, settings["comply"], settings["refuse"]),
        refusal=settings["refusal"],
        plain=settings.get("plain", "plain"),
        counterpart=settings.get("counterpart"),
        pairs={
            name: PairedExamples(
                safe=_by_id(suites, "fit", [safe for safe, _ in twins], f"pairs.{name}", extra),
                unsafe=_by_id(suites, "fit", [unsafe for _, unsafe in twins], f"pairs.{name}", extra),
            )
            for name, twins in settings.get("pairs", {}).items()
        },
        gradient=_by_id(suites, "test", settings.get("gradient", []), "gradient"),
    )


def write_study(
    study: Study,
    directory: str | Path,
    *,
    comply: Sequence[str],
    refuse: Sequence[str],
    made: Mapping[str, Any] | None = None,
) -> Path:
    """Write a study into a folder that :func:`read_study` and ``care-lens run --study`` take.

    Pictures are written as PNG. The judge is not written: it is given when the study is read. The outcome is written as the openings
    whose first tokens it is made of.

    Args:
        study: Ids of its examples must differ over all channels.
        directory: Made if it does not exist; files of a study that stand there are written over.
        comply: Openings of compliant answers, whose first tokens make the unsafe margin.
        refuse: Openings of refusals.
        made: What made the study, JSON-able.

    Returns:
        The folder.

    Raises:
        DataFileError: If two examples or twins that differ have one id, or comply and refuse hold no texts. It is a ValueError.
        StudyError: If a pair set has an outcome of its own, which a folder does not hold. It is a ValueError.
    """
    directory = require_path(directory, "directory")
    if study.pair_outcomes:
        raise StudyError(
            f"a study in a folder must have one outcome, got others for {[*study.pair_outcomes]}; leave those pair sets out"
        )
    for what, texts in (("comply", comply), ("refuse", refuse)):
        if isinstance(texts, str) or not texts or not _texts(list(texts)):
            raise DataFileError(f"{what} must be a list of openings of answers, got {texts!r}; write ['Sure', 'Here']")
    rows = [
        replace(example, channel=channel, meta={**example.meta, "split": split})
        for split in SPLITS
        for channel, examples in study.suites.get(split, {}).items()
        for example in examples
    ]
    known = {e.id: e for some in study.suites.get("fit", {}).values() for e in some}
    twins = _twins_alone(study, known)
    (directory / "study.json").unlink(missing_ok=True)  # it is written last: a folder that has it is whole
    write_examples(rows, directory / "examples.jsonl")
    (directory / TWINS).unlink(missing_ok=True)
    if twins:
        write_examples(twins.values(), directory / TWINS)
    settings = {
        "name": study.name,
        "about": study.about,
        "refusal": study.refusal,
        "comply": list(comply),
        "refuse": list(refuse),
        "seen": {modality: list(channels) for modality, channels in study.seen.items()},
        "plain": study.plain,
        **({} if study.counterpart is None else {"counterpart": study.counterpart}),
        "pairs": {name: [[safe.id, unsafe.id] for safe, unsafe in pairs] for name, pairs in study.pairs.items()},
        "gradient": [example.id for example in study.gradient],
        **({} if made is None else {"made": dict(made)}),
    }
    write_whole(directory / "study.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    return directory


def _twins_alone(study: Study, known: Mapping[str, Example]) -> dict[str, Example]:
    """The twins that are no examples of the fit; pairs name theirs by ids alone."""
    alone: dict[str, Example] = {}
    for name, pairs in study.pairs.items():
        for twin in (*pairs.safe, *pairs.unsafe):
            same = known.get(twin.id) or alone.setdefault(twin.id, twin)
            if same is not twin and example_fingerprint(same) != example_fingerprint(twin):
                raise DataFileError(
                    f"ids of twins must differ in a folder, got {twin.id!r} in pairs.{name} for another request than elsewhere; give them ids "
                    "of their own"
                )
    return alone


def _settings(path: Path) -> dict[str, Any]:
    """study.json, checked key by key."""
    found = parse_json(read_text(path), path.name)
    if missing := [key for key in _REQUIRED if key not in found]:
        raise DataFileError(f"{path.name} must have the keys {list(_REQUIRED)}, got none of {missing}; add them")
    if unknown := sorted({*found} - {*_REQUIRED, *_OPTIONAL}):
        raise DataFileError(
            f"{path.name} must have keys out of {[*_REQUIRED, *_OPTIONAL]}, got {unknown}; take them out"
        )
    modalities = get_args(Modality)
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "name": (_text, "a text that is not empty"),
        "about": (lambda value: isinstance(value, str), "a text"),
        "refusal": (_text, "a text that is not empty"),
        "plain": (_text, "the name of a channel"),
        "counterpart": (_text, "the name of a channel"),
        "comply": (lambda value: _texts(value) and len(value) > 0, 'a list of texts such as ["Sure", "Okay"]'),
        "refuse": (lambda value: _texts(value) and len(value) > 0, 'a list of texts such as ["Sorry", "I cannot"]'),
        "seen": (
            lambda value: isinstance(value, dict) and {*value} <= {*modalities} and all(map(_texts, value.values())),
            f"an object of lists of channels by modality, out of {list(modalities)}",
        ),
        "pairs": (
            lambda value: isinstance(value, dict) and all(_twins(twins) for twins in value.values()),
            "an object of lists of [id of the safe twin, id of the unsafe twin]",
        ),
        "gradient": (_texts, "a list of ids"),
        "made": (lambda value: isinstance(value, dict), "an object that says what made the study"),
    }
    for key, (right, what) in wanted.items():
        if key in found and not right(found[key]):
            text = json.dumps(found[key], ensure_ascii=False)
            raise DataFileError(f"{path.name}: {key} must be {what}, got {text[:120]}; write it so")
    return found


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _twins(value: Any) -> bool:
    return isinstance(value, list) and all(_texts(pair) and len(pair) == 2 for pair in value)


def _by_id(
    suites: Mapping[Split, Mapping[str, Sequence[Example]]],
    split: Split,
    ids: Sequence[str],
    key: str,
    extra: Mapping[str, Example] | None = None,
) -> tuple[Example, ...]:
    found = {**(extra or {}), **{e.id: e for examples in suites.get(split, {}).values() for e in examples}}
    if unknown := [name for name in ids if name not in found]:
        raise DataFileError(
            f"study.json: {key} must name examples of the {split} split, got {unknown[:5]}; give those examples meta.split "
            f'"{split}", or name others'
        )
    return tuple(found[name] for name in ids)


def _suites(examples: Sequence[Example], seed: int) -> dict[Split, dict[str, tuple[Example, ...]]]:
    if not examples:
        raise DataFileError("examples.jsonl must hold examples, got none; write one JSON object a line")
    named = [e for e in examples if e.meta.get("split")]
    if not named:
        return split_by_group(examples, seed=seed)
    if len(named) != len(examples):
        lacking = [e.id for e in examples if not e.meta.get("split")]
        raise DataFileError(
            f"examples.jsonl: all examples or none must name their split in meta, got {len(named)} of {len(examples)}; give "
            f"one to {lacking[:5]}"
        )
    lists: dict[Split, dict[str, list[Example]]] = {split: {} for split in SPLITS}
    for example in examples:
        split = example.meta["split"]
        if split not in SPLITS:
            raise DataFileError(
                f"examples.jsonl: meta.split of {example.id!r} must be one of {list(SPLITS)}, got {split!r}"
            )
        lists[split].setdefault(example.channel, []).append(example)
    return {split: {c: tuple(rows) for c, rows in channels.items()} for split, channels in lists.items()}


def outcome_of(tokenizer: Any, comply: Sequence[str], refuse: Sequence[str]) -> UnsafeMargin:
    """The outcome of a study: openings of answers by their first tokens, which must tell the two sides apart.

    Args:
        tokenizer: Of the model.
        comply: Openings of compliant answers.
        refuse: Openings of refusals.

    Raises:
        DataFileError: If an opening of either side begins with a token of the other. It is a ValueError.
    """
    sides = [{text: _first_token(tokenizer, text) for text in texts} for texts in (comply, refuse)]
    both = [(a, b) for a, i in sides[0].items() for b, j in sides[1].items() if i == j]
    if both and sides[0][both[0][0]] == getattr(tokenizer, "unk_token_id", None):
        raise DataFileError(
            f"comply and refuse must begin with words that the model's tokenizer knows, got {both[0][0]!r} and {both[0][1]!r}, which it does not; "
            "give openings of the model's own answers (--comply and --refuse of `care-lens study`)"
        )
    if both:
        raise DataFileError(
            f"comply and refuse (of study.json, or --comply and --refuse of `care-lens study`) must begin with different tokens of the model, got "
            f"{both[0][0]!r} and {both[0][1]!r}, which begin with the same one; take openings that differ in their first word"
        )
    comply_ids, refuse_ids = (tuple(dict.fromkeys(side.values())) for side in sides)
    return UnsafeMargin(comply=comply_ids, refuse=refuse_ids)


def _first_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataFileError(
            f"study.json: openings must have a token of the model each, got none for {text!r}; take another"
        )
    return int(ids[0])
