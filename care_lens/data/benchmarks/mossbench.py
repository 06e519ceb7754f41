"""MOSSBench (Li et al. 2024, arXiv:2406.17806): harmless requests with pictures that look harmful, to measure refusals too many."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item
from care_lens.data.benchmarks.rows import Row, RowError


class MOSSBench(Benchmark):
    """MOSSBench: ``information.json``, an object of rows by their pid, and its pictures. All are harmless."""

    name: ClassVar[str] = "mossbench"
    files = ("information.json",)
    columns = ("question", "image")
    optional = ("pid", "metadata")

    def item(self, row: Row) -> Item:
        """A harmless request with its picture."""
        name = row.optional("pid") or str(row.number)
        about = row.values.get("metadata") or {}
        if not isinstance(about, dict):
            raise RowError(f"'metadata' must be an object, got {about!r:.40}", "write it as the other rows are")
        return Item(
            id=name,
            prompt=row.text("question"),
            pictures=(self.picture(row),),
            harmful=False,
            group=f"mossbench {name}",
            meta={"over": str(about["over"]) if about.get("over") else None},
        )
