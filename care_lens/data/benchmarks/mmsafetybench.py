"""MM-SafetyBench (Liu et al. 2023, arXiv:2311.17600), as its authors' json files and as parquet."""

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, get_args

from PIL import Image

from care_lens.data.benchmarks.places import BenchmarkError, BenchmarkNotFoundError
from care_lens.data.benchmarks.reader import Benchmark, Item, Root, one_of
from care_lens.data.benchmarks.rows import Problem, Row, Table
from care_lens.data.benchmarks.tables import read_table

Kind = Literal["SD", "SD_TYPO", "TYPO", "Text_only", "Text_grey"]
KINDS: tuple[Kind, ...] = get_args(Kind)
#: The column with the question of each kind, in the json files: what stands in the picture is not asked again.
QUESTIONS = {
    "SD": "Rephrased Question(SD)",
    "SD_TYPO": "Rephrased Question",
    "TYPO": "Rephrased Question",
    "Text_only": "Changed Question",
    "Text_grey": "Changed Question",
}
GREY = (336, 336)
_TINY = "TinyVersion_ID_List.json"


class MMSafetyBench(Benchmark):
    """MM-SafetyBench: ``processed_questions/NN-Scenario.json`` and ``imgs/NN-Scenario/KIND/id.jpg``, or ``Scenario/KIND.parquet``.

    Each kind of picture has a question column of its own (:data:`QUESTIONS`). Of the json files the behaviour is the column "Question"; of
    parquet, that of the same id in ``Text_only.parquet`` where it is there. Channels are "mmsafetybench " and the kind. Behaviours are grouped
    by scenario and id.

    Args:
        root: As of :class:`Benchmark`. Datasets are given as ``{scenario: load_dataset(name, scenario)}``.
        kinds: Which to read: "SD", "SD_TYPO", "TYPO", "Text_only" (no picture) and "Text_grey" (the text over a grey picture of 336 x 336).
        tiny: Only the ids of ``TinyVersion_ID_List.json``.
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "mmsafetybench"
    files = (
        "processed_questions/*.json|[0-9][0-9]-*.json",
        "SD.parquet|SD_TYPO.parquet|TYPO.parquet|Text_only.parquet",
    )
    columns = ("Question", "Rephrased Question", "Rephrased Question(SD)")
    optional = ("Changed Question", "Key Phrase", "Phrase Type")
    several = True
    own_pictures = True

    def __init__(
        self,
        root: Root,
        *,
        kinds: Sequence[Kind] = ("SD", "SD_TYPO", "TYPO"),
        tiny: bool = False,
        pictures: str | Path | None = None,
    ) -> None:
        if isinstance(kinds, str) or not kinds:
            raise BenchmarkError(f"kinds must be a list out of {[*KINDS]}, got {kinds!r}; write [{kinds!r}]")
        self.kinds = tuple(one_of(kind, KINDS, "kinds") for kind in dict.fromkeys(kinds))
        self.tiny, self._plain = tiny, dict[tuple[str, str], str | None]()
        self._sampled: dict[str, set[str]] | None = None
        super().__init__(root, pictures=pictures)

    @classmethod
    def columns_in(cls, name: str) -> tuple[str, ...]:
        """Those of the json files, or of parquet."""
        return cls.columns if name.lower().endswith(".json") else ("id", "question")

    def _sources(self, root: Root) -> tuple:
        place, tables = super()._sources(root)
        for table in tables:
            if (where := self._where(table.name))[1] == "Text_only":
                plain = [(row.optional("id"), row.optional("question")) for row in table.rows]
                for name, text in plain:
                    if name:  # of an id that stands twice the first counts, as of the pictures
                        self._plain.setdefault((_scenario(where[0]), name), text)
        if self.tiny:
            names = place.matching(_TINY) if place else []
            if place is None or not names:
                raise BenchmarkNotFoundError(f"root must hold {_TINY} for tiny=True, got no such file; put it there")
            rows = read_table(place, names[0]).rows
            self._sampled = {_scenario(row.text("Scenario")): {*row.texts("Sampled_ID_List")} for row in rows}
        return place, tables

    def _where(self, name: str) -> tuple[str, str]:
        """Scenario and kind of a table; the kind is "" for json, which holds all."""
        folder, file = posixpath.split(name)
        stem, ending = posixpath.splitext(file)
        if ending.lower() == ".json":
            return stem, ""
        kind = next((k for k in KINDS if k.lower() == stem.lower()), None)
        if kind is None:
            raise BenchmarkError(f"{name} must be called by its kind, out of {[*KINDS[:4]]}, got {stem!r}; rename it")
        root = self._root_name if not folder else posixpath.basename(folder)
        return root, kind

    def prepared(self, table: Table) -> Table:
        """Leave out the tables of other kinds."""
        kind = self._where(table.name)[1]
        wanted = not kind or kind in self.kinds or (kind == "Text_only" and "Text_grey" in self.kinds)
        return table if wanted else Table(table.name, table.columns, [], [])

    def units(self, row: Row) -> Iterable[Row | Problem]:
        """A row for each kind of picture."""
        scenario, own = self._where(row.file)
        named = str(row.number) if not own else row.optional("id") or ""
        if self._sampled is not None and named not in self._sampled.get(_scenario(scenario), set()):
            return
        for kind in self.kinds:
            if not own or kind == own or (own == "Text_only" and kind == "Text_grey"):
                yield replace(row, number=f"{row.number} {kind}", values={**row.values, "kind": kind, "name": named})

    def item(self, row: Row) -> Item:
        """A question of one kind, with its picture."""
        scenario, own = self._where(row.file)
        kind, name = str(row.values["kind"]), row.text("name")
        if own:
            prompt, behaviour = row.text("question"), self._plain.get((_scenario(scenario), name))
        else:
            prompt, behaviour = row.text(QUESTIONS[kind]), row.text("Question")
        if kind == "Text_grey":
            shown: tuple = (Image.new("RGB", GREY, (128, 128, 128)),)
        elif kind == "Text_only":
            shown = ()
        else:
            shown = (self.picture(row, names=[f"{scenario}/{kind}/{name}.{end}" for end in ("jpg", "png", "jpeg")]),)
        return Item(
            id=f"{scenario}/{kind}/{name}",
            prompt=prompt,
            pictures=shown,
            harmful=True,
            channel=f"mmsafetybench {kind}",
            behaviour=behaviour,
            group=f"mmsafetybench {_scenario(scenario)} {name}",
            meta={"scenario": scenario, "kind": kind, "key_phrase": row.optional("Key Phrase")},
        )


def _scenario(name: str) -> str:
    """A scenario without its number, case aside: the json files and parquet name it in two ways."""
    return re.sub(r"^[0-9]+-", "", name).casefold()
