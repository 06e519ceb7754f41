"""MMBench (Liu et al. 2023, arXiv:2307.06281): questions of four choices about pictures."""

from typing import ClassVar

from care_lens.core.pictures import PictureSource
from care_lens.data.benchmarks.reader import Benchmark, Item, split_of
from care_lens.data.benchmarks.rows import Row, RowError, Table

_LETTERS = "ABCD"
#: Of circular evaluation: rows whose index differs by a multiple of it are one question with its choices turned.
CIRCLE = 1_000_000


class MMBench(Benchmark):
    """MMBench: ``mmbench_*.tsv`` with the pictures in base64. A short text in the column "image" is the index of the row that holds the picture.

    ``response`` is the letter of the right choice (test files have none), ``meta["answer"]`` its text. The turns of a question, as many
    as it has choices, are one group; ``meta["turn"]`` says which turn it is.
    """

    name: ClassVar[str] = "mmbench"
    answered = True
    files = ("mmbench_dev_en*.tsv", "mmbench*.tsv")
    columns = ("index", "question", "image", "A", "B")
    optional = ("hint", "C", "D", "answer", "category", "l2-category")
    base64_columns = ("image",)

    def prepared(self, table: Table) -> Table:
        """Take up which row holds which picture."""
        self._held: dict[str, PictureSource] = {
            row.optional("index") or "": row.cells["image"] for row in table.rows if "image" in row.cells
        }
        return table

    def item(self, row: Row) -> Item:
        """A question with its choices."""
        index = row.number_in("index")
        choices = {letter: text for letter in _LETTERS if (text := row.optional(letter)) is not None}
        answer = row.optional("answer")
        if answer is not None and answer not in choices:
            raise RowError(f"'answer' must be one of {[*choices]}, got {answer!r:.20}", "see the published file")
        hint = row.optional("hint")
        lines = [f"Hint: {hint}"] if hint else []
        lines += [f"Question: {row.text('question')}", "Options:", *(f"{k}. {v}" for k, v in choices.items())]
        return Item(
            id=str(index),
            prompt="\n".join([*lines, "Please select the correct answer from the options above."]),
            pictures=(self._shown(row),),
            harmful=False,
            response=answer,
            group=f"mmbench {index % CIRCLE}",
            meta={
                "answer": choices[answer] if answer else None,
                "turn": str(index // CIRCLE),
                "category": row.optional("category"),
                "source_split": split_of(row.file),
            },
        )

    def _shown(self, row: Row) -> PictureSource:
        if "image" in row.cells:
            return row.cells["image"]
        named = row.optional("image")
        if named is None or named not in self._held:
            what = f"'image' must be a picture or the index of a row that holds one, got {named!r:.40}"
            raise RowError(what, "download the file again", "missing picture")
        return self._held[named]
