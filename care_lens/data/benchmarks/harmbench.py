"""The multimodal behaviours of HarmBench (Mazeika et al. 2024, arXiv:2402.04249)."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, behaviour_key, split_of
from care_lens.data.benchmarks.rows import Row


class HarmBenchMM(Benchmark):
    """HarmBench's multimodal behaviours: ``harmbench_behaviors_multimodal_all.csv`` and its pictures."""

    name: ClassVar[str] = "harmbenchmm"
    files = ("harmbench_behaviors_multimodal_all.csv", "*behaviors_multimodal*.csv")
    columns = ("Behavior", "BehaviorID", "ImageFileName")
    optional = ("FunctionalCategory", "SemanticCategory", "ImageDescription", "RedactedImageDescription")

    def item(self, row: Row) -> Item:
        """A behaviour with its picture."""
        behaviour = row.text("Behavior")
        return Item(
            id=row.text("BehaviorID"),
            prompt=behaviour,
            pictures=(self.picture(row, "ImageFileName"),),
            harmful=True,
            behaviour=behaviour,
            group=behaviour_key(behaviour),
            meta={
                "category": row.optional("SemanticCategory"),
                "function": row.optional("FunctionalCategory"),
                "picture_description": row.optional("ImageDescription"),
                "redacted_description": row.optional("RedactedImageDescription"),
                "source_split": split_of(row.file),
            },
        )
