"""VQAv2 (Goyal et al. 2017, arXiv:1612.00837): short questions about pictures, each with ten answers."""

import json
import re
from pathlib import Path
from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, Root, split_of
from care_lens.data.benchmarks.rows import Problem, Row, RowError, Table
from care_lens.data.benchmarks.tables import read_table

#: All answers, the commonest one, and what kind they are.
Answered = tuple[list[str], str | None, dict[str, str | None]]


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
    answered = True
    files = ("v2_openended_mscoco_val2014_questions.json", "v2_openended_mscoco_*_questions.json")
    columns = ("question_id", "question", "image_id")
    optional = ("multiple_choice_answer", "answers", "image")
    key = "questions"
    variants: ClassVar = {
        f"v2_openended_mscoco_{split}_questions.json": {"split": split}
        for split in ("val2014", "train2014", "test2015", "test-dev2015")
    }

    def __init__(self, root: Root, *, split: str = "val2014", pictures: str | Path | None = None) -> None:
        self.split, self._answers = split, dict[str, Answered]()
        self._annotated = ""
        self.files = (f"v2_openended_mscoco_{split}_questions.json",)
        super().__init__(root, pictures=pictures)

    def prepared(self, table: Table) -> Table:
        """Take up the answers."""
        if self.place is not None and (names := self.place.matching(f"v2_mscoco_{self.split}_annotations.json")):
            annotations = read_table(self.place, names[0], key="annotations")
            self._annotated = names[0]
            table.problems += annotations.problems
            for row in annotations.rows:
                try:
                    self._answers[row.text("question_id")] = _answered(row)
                except RowError as error:
                    table.problems.append(Problem(row.file, row.number, error.kind, error.what, error.do))
        return table

    def item(self, row: Row) -> Item:
        """A question about a picture."""
        name, picture = row.text("question_id"), row.number_in("image_id")
        if self._annotated and name not in self._answers:
            raise RowError(f"question {name} must have answers, got none in {self._annotated}", "download both again")
        answers, most, about = self._answers.get(name) or _answered(row)
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
            response=most,
            group=f"coco {picture}",
            meta={
                "answers": json.dumps(answers) if answers else None,
                **about,
                "source_split": split_of(self.split),
            },
        )


def _answered(row: Row) -> Answered:
    """The answers of a row of annotations, or of a dataset."""
    answers = row.texts("answers", "answer")
    most = row.optional("multiple_choice_answer") or (max(answers, key=answers.count) if answers else None)
    return answers, most, {key: row.optional(key) for key in ("answer_type", "question_type")}
