"""XSTest (Röttger et al. 2023, arXiv:2308.01263): safe prompts that look unsafe, and unsafe ones beside them."""

from typing import ClassVar

from care_lens.data.benchmarks.reader import Benchmark, Item, behaviour_key
from care_lens.data.benchmarks.rows import Row, RowError


class XSTest(Benchmark):
    """XSTest: ``xstest_prompts.csv``. Channels are "xstest safe" and "xstest unsafe".

    Older files have no column "label"; there the types that begin with "contrast" are the unsafe ones.
    """

    name: ClassVar[str] = "xstest"
    files = ("xstest_prompts.csv|xstest_v2_prompts.csv|xstest.csv",)
    columns = ("id", "prompt", "type")
    optional = ("label", "focus", "note")

    def item(self, row: Row) -> Item:
        """A prompt and whether it is safe."""
        label, kind = row.optional("label"), row.text("type")
        label = label.strip().lower() if label else "unsafe" if kind.startswith("contrast") else "safe"
        if label not in ("safe", "unsafe"):
            raise RowError(f"'label' must be 'safe' or 'unsafe', got {label!r:.20}", "write one of them")
        prompt = row.text("prompt")
        return Item(
            id=row.text("id"),
            prompt=prompt,
            harmful=label == "unsafe",
            channel=f"xstest {label}",
            group=behaviour_key(prompt),
            meta={"type": kind, "focus": row.optional("focus")},
        )
