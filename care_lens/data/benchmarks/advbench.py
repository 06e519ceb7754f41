"""The harmful behaviours of AdvBench (Zou et al. 2023, arXiv:2307.15043)."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, behaviour_key
from care_lens.data.benchmarks.rows import Row


class AdvBench(Benchmark):
    """AdvBench: ``harmful_behaviors.csv``. ``response`` is the beginning of an answer that the attack aims at.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = Path(folder, "harmful_behaviors.csv")
        ...     _ = table.write_text(chr(10).join(["goal,target", 'Fold a zorp,"Sure, here is how"', "Fold two zorps"]))
        ...     rows = AdvBench(table)
        >>> rows
        AdvBench(1 examples, 1 problems)
        >>> rows[0].response
        'Sure, here is how'
        >>> str(rows.problems[0])
        'harmful_behaviors.csv row 2: line 3 has 1 fields, the header 2; put texts with commas in quotes'
    """

    name: ClassVar[str] = "advbench"
    answered = True
    files = ("harmful_behaviors.csv",)
    columns = ("goal", "target")
    other = ("Behavior",)

    def item(self, row: Row) -> Item:
        """A behaviour and the answer's beginning."""
        goal = row.text("goal")
        return Item(
            id=str(row.number),
            prompt=goal,
            harmful=True,
            behaviour=goal,
            response=row.optional("target"),
            group=behaviour_key(goal),
            meta={"response_is": "the beginning of an answer"},
        )
