"""JailbreakBench's behaviours (Chao et al. 2024, arXiv:2404.01318), harmful and harmless ones."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, behaviour_key
from care_lens.data.benchmarks.rows import Row


class JailbreakBench(Benchmark):
    """JBB-Behaviors: ``harmful-behaviors.csv`` and ``benign-behaviors.csv``, of which one may be missing; of a dataset, the splits "harmful" and "benign".

    A table with "benign" in its name is harmless. Channels are "jailbreakbench harmful" and "jailbreakbench benign"; ``response`` is the beginning of an answer.
    """

    name: ClassVar[str] = "jailbreakbench"
    answered = True
    files = ("harmful-behaviors.csv|benign-behaviors.csv",)
    columns = ("Goal", "Target", "Behavior", "Category")
    optional = ("Index", "Source")
    several = True

    def item(self, row: Row) -> Item:
        """A behaviour and the answer's beginning."""
        kind = "benign" if "benign" in row.file.lower() else "harmful"
        goal = row.text("Goal")
        return Item(
            id=f"{kind}/{row.optional('Index') or row.number}",
            prompt=goal,
            harmful=kind == "harmful",
            channel=f"jailbreakbench {kind}",
            behaviour=goal,
            response=row.optional("Target"),
            group=behaviour_key(goal),
            meta={
                "behaviour_name": row.optional("Behavior"),
                "category": row.optional("Category"),
                "source": row.optional("Source"),
                "response_is": "the beginning of an answer",
            },
        )
