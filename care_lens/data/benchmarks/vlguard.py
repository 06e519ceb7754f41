"""VLGuard (Zong et al. 2024, arXiv:2402.02207): harmless and harmful instructions about safe pictures, and instructions about unsafe ones."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from care_lens.data.benchmarks.reader import Benchmark, Item, Root, one_of
from care_lens.data.benchmarks.rows import Problem, Row, RowError

_KEYS = {"safe_instruction": "safe_safe", "unsafe_instruction": "safe_unsafe", "instruction": "unsafe"}


class VLGuard(Benchmark):
    """VLGuard: ``test.json`` or ``train.json``. Each instruction of a row is an example.

    Channels are "vlguard safe_safe" (harmless), "vlguard safe_unsafe" (a harmful instruction about a safe picture) and "vlguard unsafe" (an
    instruction about an unsafe picture). ``response`` is the answer that the file gives, which is a refusal for the last two. All
    instructions about one picture are one group.

    Args:
        root: As of :class:`Benchmark`.
        split: "test" (558 safe and 442 unsafe pictures) or "train".
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "vlguard"
    answered = True
    files = ("test.json", "train.json")
    columns = ("id", "image", "safe", "instr-resp")
    optional = ("harmful_category", "harmful_subcategory")
    variants: ClassVar = {"test.json": {"split": "test"}, "train.json": {"split": "train"}}

    def __init__(
        self, root: Root, *, split: Literal["test", "train"] = "test", pictures: str | Path | None = None
    ) -> None:
        self.split = one_of(split, ("test", "train"), "split")
        self.files, self.published = (f"{split}.json",), 2 * 558 + 442 if split == "test" else None
        super().__init__(root, pictures=pictures)

    def units(self, row: Row) -> Iterable[Row | Problem]:
        """Its instructions, each with the response."""
        asked = row.values.get("instr-resp")
        if not isinstance(asked, list) or not asked or not all(isinstance(one, dict) for one in asked):
            what = f"'instr-resp' must be a list of instructions with responses, got {asked!r:.40}"
            yield Problem(row.file, row.number, "bad field", what, "write it as the other rows are")
            return
        for place, one in enumerate(asked, 1):
            # parquet fills in every key, with null for those that a row does not have
            given = {key: value for key, value in one.items() if value is not None}
            yield replace(row, number=f"{row.number}.{place}", values={**row.values, **given})

    def item(self, row: Row) -> Item:
        """An instruction about a picture."""
        safe = row.values.get("safe")
        if not isinstance(safe, bool):
            raise RowError(f"'safe' must be true or false, got {safe!r:.20}", "write it without quotes")
        key = next((key for key in _KEYS if row.optional(key)), None)
        if key is None:
            raise RowError(f"it must have one of {[*_KEYS]}, got none", "write the instruction")
        if safe == (key == "instruction"):
            what = f"a picture that is {'safe' if safe else 'unsafe'} must not have {key!r}"
            raise RowError(what, "see which of the two is wrong")
        name = row.text("id")
        return Item(
            id=f"{name}/{_KEYS[key]}",
            prompt=row.text(key),
            pictures=(self.picture(row),),
            harmful=key != "safe_instruction",
            channel=f"vlguard {_KEYS[key]}",
            response=row.optional("response"),
            group=f"vlguard {name}",
            meta={
                "category": row.optional("harmful_category"),
                "subcategory": row.optional("harmful_subcategory"),
                "source_split": self.split,
                "modality": "textual" if key == "unsafe_instruction" else None,
            },
        )
