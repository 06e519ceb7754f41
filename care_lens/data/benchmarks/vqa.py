"""VQAv2 (Goyal et al. 2017, arXiv:1612.00837): short questions about pictures, each with ten answers."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

from care_lens.data.benchmarks.places import BenchmarkError
from care_lens.data.benchmarks.reader import Benchmark, Item, Root, split_of
from care_lens.data.benchmarks.rows import Row, Table
from care_lens.data.benchmarks.tables import read_table


class VQAv2(Benchmark):
    """VQAv2: ``v2_OpenEnded_mscoco_{split}_questions.json``, ``v2_mscoco_{split}_annotations.json`` (test has none) and
    ``COCO_{split}_{image_id:012d}.jpg``; or a dataset with the answers beside the questions.

    ``response`` is the answer that most gave, ``meta["answers"]`` all of them, as JSON. Questions about one picture are one group.

    Args:
        root: As of :class:`Benchmark`.
        split: "val2014", "train2014", "test2015" or "test-dev2015".
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "vqav2"
    files = ("v2_openended_mscoco_val2014_questions.json", "v2_openended_mscoco_*_questions.json")
    columns = ("question_id", "question", "image_id")
    optional = ("multiple_choice_answer", "answers", "image")
    key = "questions"
    variants: ClassVar = {
        f"v2_openended_mscoco_{split}_questions.json": {"split": split}
        for split in ("val2014", "train2014", "test2015", "test-dev2015")
    }

    def __init__(self, root: Root, *, split: str = "val2014", pictures: str | Path | None = None) -> None:
        self.split, self._answers = split, dict[str, dict[str, Any]]()
        self.files = (f"v2_openended_mscoco_{split}_questions.json",)
        super().__init__(root, pictures=pictures)

    def prepared(self, table: Table) -> Table:
        """Take up the answers."""
        if self.place is not None and (names := self.place.matching(f"v2_mscoco_{self.split}_annotations.json")):
            rows = read_table(self.place, names[0], key="annotations").rows
            self._answers = {row.optional("question_id") or "": dict(row.values) for row in rows}
        return table

    def item(self, row: Row) -> Item:
        """A question about a picture."""
        name, picture = row.text("question_id"), row.number_in("image_id")
        about = self._answers.get(name, dict(row.values))
        given = about.get("answers") or []
        if not isinstance(given, list):
            raise BenchmarkError(f"{row.file} row {row.number}: answers must be a list, got {type(given).__name__}")
        answers = [str(one.get("answer")) if isinstance(one, dict) else str(one) for one in given]
        most = about.get("multiple_choice_answer") or (max(answers, key=answers.count) if answers else None)
        split = re.sub("test-dev", "test", self.split)
        return Item(
            id=name,
            prompt=row.text("question"),
            pictures=(
                self.picture(
                    row,
                    names=[
                        f"{split}/COCO_{split}_{picture:012d}.jpg",
                        f"COCO_{split}_{picture:012d}.jpg",
                        f"{picture:012d}.jpg",
                    ],
                ),
            ),
            harmful=False,
            response=str(most) if most is not None else None,
            group=f"coco {picture}",
            meta={
                "answers": json.dumps(answers) if answers else None,
                "answer_type": str(about.get("answer_type") or ""),
                "question_type": str(about.get("question_type") or ""),
                "source_split": split_of(self.split),
            },
        )
