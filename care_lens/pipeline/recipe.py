"""Recipes: a published table as a yaml file, checked key by key before anything is read or loaded.

    recipe = read_recipe("qwen2.5-vl-7b")  # one that comes with the package, or a path
    recipe.columns["JailBreakV"].benchmark

The keys: ``name``; ``model`` (name, revision, dtype, device); ``columns`` (attacks, by the column's title) and ``utility`` (harmless ones), each
with ``benchmark``, ``root`` (relative to the folder of files) and, as they apply, ``options`` of the reader, ``fit`` (whether it is
learned from, too), ``prompts`` (a source of requests for pictures that bring none) and ``grader``; ``benign`` (what harmless activations are
learned from); ``defences`` (by the row's title, :class:`RecipeDefence`); ``generation``; ``judge``; ``fit_examples``; ``test_share``; ``seed``; ``quoted`` (published
figures by method and column, in per cent), ``quoted_from`` and ``notes``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from care_lens.core.arguments import checked
from care_lens.core.errors import CareLensError
from care_lens.data.benchmarks import READERS
from care_lens.defences import CAREFaults
from care_lens.evaluation import GenerationSettings

HOME = Path(__file__).parent / "recipes"
GRADERS = ("choice", "circular", "open-answer", "vqa", "caption", "judge")
"""What grades a column of utility: letters, MMBench's circular letters, parts of an open answer, VQA accuracy, captions, or the recipe's judge."""

Part = TypeVar("Part")


class RecipeError(CareLensError, ValueError):
    """A recipe is not as it must be; the message names the key."""


@dataclass(frozen=True)
class Source:
    """Files of a benchmark.

    Attributes:
        benchmark: Name of its reader.
        root: Folder, zip or table, relative to the folder of files.
        options: Of the reader.
        fit: Whether a part of its behaviours is learned from and the other tested; False: all of it is tested.
        prompts: Requests for pictures that bring none; those of the fit split go with pictures of it.
        grader: Of a column of utility.
        limit: At most so many examples are tested.
    """

    benchmark: str
    root: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fit: bool = False
    prompts: "Source | None" = None
    grader: str = "judge"
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.benchmark not in READERS:
            raise RecipeError(f"benchmark must be one of {sorted(READERS)}, got {self.benchmark!r}")
        if self.grader not in GRADERS:
            raise RecipeError(f"grader must be one of {GRADERS}, got {self.grader!r}")


@dataclass(frozen=True)
class RecipeModel:
    """Which model.

    Attributes:
        name: Hub name or directory.
        revision: Branch, tag or commit.
        dtype: "bfloat16", "float16", "float32"; None: that of the weights.
        device: As ``device_map`` of transformers; None: the CPU, or the GPU of each process.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class RecipeDefence:
    """A row of the table.

    Attributes:
        kind: "published_care", or "saved": a defence or repair that was saved before.
        faults: "published": all faults of the published code; "none": the sound form; or a list of the faults that are kept.
        layers: Blocks of the language tower.
        rank: k; two numbers for the visual and the textual subspace.
        alpha: Strength of both edits.
        alpha_visual, alpha_textual: Of one of them, instead.
        beta: How much of the benign mean takes the place of what is removed.
        folder: Of a saved one, relative to the folder of files.
    """

    kind: str = "published_care"
    faults: str | tuple[str, ...] = "published"
    layers: tuple[int, ...] = ()
    rank: int | tuple[int, int] = 64
    alpha: float = 4.5
    alpha_visual: float | None = None
    alpha_textual: float | None = None
    beta: float = 1.0
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("published_care", "saved"):
            raise RecipeError(f"kind must be 'published_care' or 'saved', got {self.kind!r}")
        if self.kind == "saved" and not self.folder:
            raise RecipeError("folder must be given for a saved defence, got none")
        if self.kind == "published_care" and not self.layers:
            raise RecipeError("layers must name a block or more, got none; write layers: [12, 13, 14]")
        _ = self.kept

    @property
    def kept(self) -> CAREFaults:
        """The faults that it has."""
        if self.faults == "published":
            return CAREFaults()
        if self.faults == "none":
            return CAREFaults.none()
        if isinstance(self.faults, str) or set(self.faults) - {*CAREFaults.names()}:
            raise RecipeError(
                f"faults must be 'published', 'none' or a list out of {CAREFaults.names()}, got {self.faults!r}"
            )
        return CAREFaults().without(*(name for name in CAREFaults.names() if name not in self.faults))

    def strengths(self) -> dict[str, float]:
        """Strengths of the two edits."""
        both = {"alpha_visual": self.alpha_visual, "alpha_textual": self.alpha_textual}
        return {name: self.alpha if value is None else value for name, value in both.items()}


@dataclass(frozen=True)
class RecipeJudge:
    """What says which answers comply.

    Attributes:
        kind: "substrings", "published-substrings", or "classifier".
        model: Of the classifier.
        template: Of the classifier: the name of a published one, or the text.
        revision, dtype, device: Of the classifier.
    """

    kind: str = "substrings"
    model: str | None = None
    template: str = "harmbench"
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("substrings", "published-substrings", "classifier"):
            raise RecipeError(
                f"kind of the judge must be 'substrings', 'published-substrings' or 'classifier', got {self.kind!r}"
            )
        if self.kind == "classifier" and not self.model:
            raise RecipeError("model must be given for a classifier as judge, got none")


@dataclass(frozen=True)
class Recipe:
    """A table to make; see the module's text.

    Attributes:
        name, model, columns, utility, benign, defences, generation, judge, seed: As in the file.
        fit_examples: Most harmful and most harmless examples that are learned from.
        test_share: Share of the behaviours of sources with ``fit`` that is tested.
        n_boot: Bootstrap resamples of the intervals.
        quoted: Published figures in per cent, by method and column.
        quoted_from: Where they stand.
        notes: What a reader of the table must know.
    """

    name: str
    model: RecipeModel
    columns: Mapping[str, Source]
    defences: Mapping[str, RecipeDefence]
    benign: Mapping[str, Source]
    utility: Mapping[str, Source] = field(default_factory=dict)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    judge: RecipeJudge = field(default_factory=RecipeJudge)
    fit_examples: int = 512
    test_share: float = 0.6
    n_boot: int = 2000
    seed: int = 0
    quoted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    quoted_from: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns or not self.defences:
            raise RecipeError("columns and defences must each hold one or more, got none")
        if both := sorted({*self.columns} & {*self.utility}):
            raise RecipeError(f"columns and utility must have titles of their own, got {both} in both")
        if "none" in self.defences:
            raise RecipeError("defences must leave the title 'none' to the undefended model; rename it")
        fitted = any(defence.kind == "published_care" for defence in self.defences.values())
        if fitted and not (any(source.fit for source in self.columns.values()) and self.benign):
            raise RecipeError("a column with fit: true and a benign source must be there to learn from, got none")
        unknown = sorted({c for held in self.quoted.values() for c in held} - {*self.columns, *self.utility})
        if unknown:
            raise RecipeError(f"quoted must be of columns of the recipe, got {unknown}")
        if self.quoted and not self.quoted_from:
            raise RecipeError("quoted_from must say where the quoted figures stand, got nothing")
        if not 0 < self.test_share < 1 or self.fit_examples < 2:
            raise RecipeError(
                f"test_share must be between 0 and 1 and fit_examples 2 or more, got {self.test_share} and {self.fit_examples}"
            )

    @property
    def sources(self) -> dict[str, Source]:
        """All sources by title; those of prompts are named after their column."""
        found = {**self.columns, **self.utility, **{f"{name} (benign)": s for name, s in self.benign.items()}}
        return found | {f"{name} (prompts)": s.prompts for name, s in found.items() if s.prompts is not None}


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(HOME.glob("*.yaml"))}


def read_recipe(recipe: str | Path) -> Recipe:
    """A recipe of its file.

    Args:
        recipe: Name of one that comes with the package (:func:`recipes`), or a path.

    Raises:
        RecipeError: If there is no such recipe, or it is not as it must be. It is a ValueError.

    Example:
        >>> read_recipe("qwen2.5-vl-7b").quoted["CARE"]["JailBreakV"]
        6.55
    """
    import yaml

    known = recipes()
    path = known.get(str(recipe), Path(recipe))
    if not path.is_file():
        raise RecipeError(f"recipe must be one of {[*known]} or a yaml file, got {str(recipe)!r}, which is neither")
    try:
        held = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path.name} must be yaml in UTF-8, got {error}") from None
    try:
        return _recipe(held)
    except (RecipeError, ValueError, TypeError) as error:
        raise RecipeError(f"{path.name}: {error}") from None


def _recipe(held: Any) -> Recipe:
    values = dict(_mapping(held, "the recipe"))
    given: dict[str, Any] = {}
    makers = {
        "model": lambda value: _part(RecipeModel, value, "model"),
        "generation": lambda value: _part(GenerationSettings, value, "generation"),
        "judge": lambda value: _part(RecipeJudge, value, "judge"),
        "columns": lambda value: _sources(value, "columns"),
        "utility": lambda value: _sources(value, "utility"),
        "benign": lambda value: _sources(value, "benign"),
        "defences": lambda value: {
            str(name): _part(RecipeDefence, part, f"defences.{name}")
            for name, part in _mapping(value, "defences").items()
        },
        "notes": lambda value: (value,) if isinstance(value, str) else tuple(value or ()),
    }
    for key, value in values.items():
        given[key] = makers[key](value) if key in makers else value
    return _part(Recipe, given, "the recipe")


def _sources(value: Any, where: str) -> dict[str, Source]:
    found = {}
    for name, held in _mapping(value or {}, where).items():
        part = dict(_mapping(held, f"{where}.{name}"))
        if part.get("prompts") is not None:
            part["prompts"] = _part(Source, part["prompts"], f"{where}.{name}.prompts")
        found[str(name)] = _part(Source, part, f"{where}.{name}")
    return found


def _part(kind: type[Part], value: Any, where: str) -> Part:
    """A dataclass of its mapping; lists become tuples."""
    held = _mapping(value, where)
    known = [part.name for part in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted({*held} - {*known}):
        raise RecipeError(f"{where} must have keys out of {known}, got {unknown}")
    try:
        return kind(**{key: tuple(item) if isinstance(item, list) else item for key, item in held.items()})
    except (RecipeError, ValueError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from None


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be names with values, got {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


checked(globals(), ("Recipe", "RecipeDefence", "RecipeJudge", "RecipeModel", "Source"))
