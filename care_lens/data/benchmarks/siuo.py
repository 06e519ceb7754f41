"""SIUO (Wang et al. 2024, arXiv:2406.15279): a harmless question and a harmless picture that are unsafe together."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item
from care_lens.data.benchmarks.rows import Row


class SIUO(Benchmark):
    """SIUO: ``siuo_gen.json`` and its pictures. What is unsafe about each is in ``meta["safety_warning"]``, which a judge needs."""

    name: ClassVar[str] = "siuo"
    files = ("siuo_gen.json",)
    columns = ("question_id", "image", "question")
    optional = ("category", "safety_warning")

    def item(self, row: Row) -> Item:
        """A question about a picture."""
        name = row.text("question_id")
        return Item(
            id=name,
            prompt=row.text("question"),
            pictures=(self.picture(row),),
            harmful=True,
            group=f"siuo {name}",
            meta={"category": row.optional("category"), "safety_warning": row.optional("safety_warning")},
        )
