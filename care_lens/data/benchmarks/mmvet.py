"""MM-Vet (Yu et al. 2023, arXiv:2308.02490): open questions about pictures."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item
from care_lens.data.benchmarks.rows import Row


class MMVet(Benchmark):
    """MM-Vet: ``mm-vet.json`` and its pictures. ``response`` is the published answer, with its <AND> and <OR>. Questions about one picture are one group."""

    name: ClassVar[str] = "mmvet"
    answered = True
    files = ("mm-vet.json",)
    columns = ("imagename", "question", "answer")
    optional = ("capability", "imagesource")

    def item(self, row: Row) -> Item:
        """A question about a picture."""
        listed = isinstance(row.values.get("capability"), list)
        return Item(
            id=str(row.number),
            prompt=row.text("question"),
            pictures=(self.picture(row, "imagename"),),
            harmful=False,
            response=row.text("answer"),
            group=f"mmvet {row.optional('imagename') or row.number}",
            meta={
                "capability": "+".join(row.texts("capability")) if listed else row.optional("capability"),
                "source": row.optional("imagesource"),
            },
        )
