"""A user's own `examples.jsonl`, read as benchmarks are: so that it can be looked at before a run, row by row."""

from pathlib import Path
from typing import ClassVar

from care_lens.core.pictures import PictureNotFoundError
from care_lens.data.benchmarks.places import NotThereError
from care_lens.data.benchmarks.reader import Benchmark, Item
from care_lens.data.benchmarks.rows import Row, RowError
from care_lens.data.jsonl import DataFileError, example_of


class OwnExamples(Benchmark):
    """``examples.jsonl`` as :func:`~care_lens.data.read_examples` reads it; what that refuses is listed here."""

    name: ClassVar[str] = "examples"
    files = ("examples.jsonl", "*.jsonl")
    columns = ("prompt",)

    def item(self, row: Row) -> Item:
        """The example of a line."""
        if self.place is None:
            raise RowError("it must stand in a file", "write it with write_examples")
        home = self.place.files[row.file].path.parent
        try:
            example = example_of(
                dict(row.values), f"{row.file}:{row.number}", f"{Path(row.file).stem}/{row.number}", home
            )
        except PictureNotFoundError as error:
            raise RowError(str(error), self._hint(row.values.get("image")), "missing picture") from None
        except DataFileError as error:
            raise RowError(str(error), "write it so") from None
        return Item(
            id=example.id,
            prompt=example.prompt,
            harmful=example.harmful,
            group=example.group,
            channel=example.channel,
            behaviour=example.behaviour,
            response=example.response,
            pictures=example.images,
            meta={**example.meta, "source_split": example.meta.get("split")},
        )

    def _hint(self, named: object) -> str:
        for name in [named] if isinstance(named, str) else named if isinstance(named, list) else []:
            try:
                found = self.place.find(str(name)) if self.place else None
            except NotThereError as error:
                return error.do
            if found is not None and found.how:
                return f"there is {found.name!r}: write it so"
        return "put the picture there"
