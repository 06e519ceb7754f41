"""ScienceQA (Lu et al. 2022, arXiv:2209.09513): school questions with choices, some of them with a picture."""

from pathlib import Path
from typing import ClassVar, Literal

from care_lens.data.benchmarks.reader import Benchmark, Item, Root, behaviour_key, one_of, split_of
from care_lens.data.benchmarks.rows import Row, RowError

_SPLITS = ("train", "validation", "test")


class ScienceQA(Benchmark):
    """ScienceQA: parquet files of its splits, or a dataset.

    ``response`` is the letter of the right choice, ``meta["answer"]`` its text. A group is a question with its choices and its hint.

    Args:
        root: As of :class:`Benchmark`.
        split: "train", "validation" or "test" by the names of the files; None: all.
        only_pictures: Leave out the questions without a picture.
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "scienceqa"
    answered = True
    files = ("train*.parquet|validation*.parquet|test*.parquet|scienceqa*.parquet",)
    columns = ("question", "choices", "answer")
    optional = ("hint", "image", "subject", "topic")
    several = True
    variants: ClassVar = {"*.parquet": {"split": None}}

    def __init__(
        self,
        root: Root,
        *,
        split: Literal["train", "validation", "test"] | None = "test",
        only_pictures: bool = False,
        pictures: str | Path | None = None,
    ) -> None:
        self.split = split if split is None else one_of(split, _SPLITS, "split")
        self.only_pictures = only_pictures
        super().__init__(root, pictures=pictures)

    def item(self, row: Row) -> Item | None:
        """A question with its choices."""
        here = split_of(row.file)
        shown = "image" in row.cells or row.optional("image") is not None
        if (here and self.split and here != self.split) or (self.only_pictures and not shown):
            return None
        choices, answer = row.values.get("choices"), row.number_in("answer")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise RowError(f"'choices' must be a list of texts, got {choices!r:.40}", "download the file again")
        if not 0 <= answer < len(choices):
            raise RowError(
                f"'answer' must be the number of a choice below {len(choices)}, got {answer}", "see the published file"
            )
        question, hint = row.text("question"), row.optional("hint")
        lines = [f"Context: {hint}"] if hint else []
        lines += [f"Question: {question}", "Options:", *(f"{chr(65 + i)}. {text}" for i, text in enumerate(choices))]
        return Item(
            id=f"{here or 'rows'}/{row.file}/{row.number}",
            prompt="\n".join([*lines, "Answer with the letter of the right option."]),
            pictures=(self.picture(row),) if shown else (),
            harmful=False,
            response=chr(65 + answer),
            group=behaviour_key("\n".join([question, *choices, hint or ""])),
            meta={"answer": choices[answer], "subject": row.optional("subject"), "source_split": here},
        )
