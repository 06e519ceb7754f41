"""Captions of COCO (Chen et al. 2015, arXiv:1504.00325)."""

import json
from collections import defaultdict
from pathlib import Path
from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, Root, split_of
from care_lens.data.benchmarks.rows import Problem, Row, RowError, Table
from care_lens.data.benchmarks.tables import read_table


class COCOCaptions(Benchmark):
    """COCO captions: ``captions_{split}.json`` and the pictures that it names. Each picture is an example.

    ``response`` is the first caption, ``meta["captions"]`` all of them, as JSON.

    Args:
        root: As of :class:`Benchmark`.
        split: "val2017", "train2017", "val2014" or "train2014".
        prompt: What is asked about each picture.
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "cococaptions"
    answered = True
    files = ("captions_val2017.json", "captions_val2014.json", "captions_*.json")
    columns = ("id", "file_name")
    key = "images"
    variants: ClassVar = {
        f"captions_{split}.json": {"split": split} for split in ("val2017", "train2017", "val2014", "train2014")
    }

    def __init__(
        self,
        root: Root,
        *,
        split: str = "val2017",
        prompt: str = "Describe the picture in one sentence.",
        pictures: str | Path | None = None,
    ) -> None:
        self.split, self.prompt = split, prompt
        self._captions: dict[str, list[str]] = defaultdict(list)
        self.files = (f"captions_{split}.json",)
        super().__init__(root, pictures=pictures)

    def prepared(self, table: Table) -> Table:
        """Take up the captions."""
        # A dataset has its captions beside its pictures' names, and may have the pictures in a place.
        if self.place is not None and table.name in self.place.files:
            annotations = read_table(self.place, table.name, key="annotations")
            table.problems += annotations.problems
            for row in annotations.rows:
                try:
                    self._captions[row.text("image_id")].append(row.text("caption").strip())
                except RowError as error:
                    what = f"annotation {row.number}: {error.what}"
                    table.problems.append(Problem(row.file, row.number, error.kind, what, error.do))
        return table

    def item(self, row: Row) -> Item:
        """A picture and its captions."""
        name, file = row.text("id"), row.text("file_name")
        captions = self._captions.get(name) or row.texts("captions")
        if not captions:
            raise RowError(f"picture {name} must have captions, got none in annotations", "download the file again")
        return Item(
            id=name,
            prompt=self.prompt,
            pictures=(self.picture(row, names=[f"{self.split}/{file}", file]),),
            harmful=False,
            response=captions[0],
            group=f"coco {name}",
            meta={"captions": json.dumps(captions), "source_split": split_of(self.split)},
        )
