"""OR-Bench (Cui et al. 2024, arXiv:2405.20947): prompts that are refused too often, and toxic ones."""

from pathlib import Path
from typing import ClassVar, Literal

from care_lens.data.benchmarks.reader import Benchmark, Item, Root, behaviour_key, one_of
from care_lens.data.benchmarks.rows import Row

_SUBSETS = ("80k", "hard-1k", "toxic")


class ORBench(Benchmark):
    """OR-Bench: ``or-bench-{subset}.csv``; of a dataset, its configuration.

    Args:
        root: As of :class:`Benchmark`.
        subset: "80k", "hard-1k" (harmless prompts that the best models refuse) or "toxic" (harmful ones).
        pictures: As of :class:`Benchmark`; there are none.
    """

    name: ClassVar[str] = "orbench"
    files = ("or-bench-hard-1k.csv", "or-bench-80k.csv", "or-bench-toxic.csv")
    columns = ("prompt", "category")
    variants: ClassVar = {f"or-bench-{subset}.csv": {"subset": subset} for subset in _SUBSETS}
    other = ("type", "image", "question", "goal")

    def __init__(
        self,
        root: Root,
        *,
        subset: Literal["80k", "hard-1k", "toxic"] = "hard-1k",
        pictures: str | Path | None = None,
    ) -> None:
        self.subset = one_of(subset, _SUBSETS, "subset")
        self.files = (f"or-bench-{subset}.csv",)
        super().__init__(root, pictures=pictures)

    def item(self, row: Row) -> Item:
        """A prompt; its subset says whether it is harmful."""
        prompt = row.text("prompt")
        return Item(
            id=f"{self.subset}/{row.number}",
            prompt=prompt,
            harmful=self.subset == "toxic",
            channel=f"orbench {self.subset}",
            group=behaviour_key(prompt),
            meta={"category": row.optional("category")},
        )
