"""MSTS (Röttger et al. 2025, arXiv:2501.10057): questions that are unsafe with their picture only."""

from pathlib import Path
from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, Root
from care_lens.data.benchmarks.rows import Row


class MSTS(Benchmark):
    """MSTS: ``{language}_multimodal.csv`` and the pictures that its column unsafe_image names, with or without their ending.

    The questions about one picture are one group.

    Args:
        root: As of :class:`Benchmark`.
        language: Of the prompts.
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "msts"
    files = ("english_multimodal.csv", "*msts*.csv")
    columns = ("case_id", "prompt_type", "prompt_text", "hazard_category")
    optional = ("unsafe_image", "unsafe_image_id")

    def __init__(self, root: Root, *, language: str = "english", pictures: str | Path | None = None) -> None:
        self.files = (f"{language}_multimodal.csv", *self.files[1:])
        super().__init__(root, pictures=pictures)

    def item(self, row: Row) -> Item:
        """A question of one type about a picture."""
        column = next(
            (c for c in ("unsafe_image", "unsafe_image_id", "image") if c in row.values or c in row.cells),
            "unsafe_image",
        )
        name, kind = row.text("case_id"), row.text("prompt_type")
        return Item(
            id=f"{name}/{kind}",
            prompt=row.text("prompt_text"),
            pictures=(self.picture(row, column, stem=True),),
            harmful=True,
            group=f"msts {row.optional(column) or name}" if column in row.values else f"msts {name}",
            meta={"case": name, "prompt_type": kind, "category": row.optional("hazard_category")},
        )
