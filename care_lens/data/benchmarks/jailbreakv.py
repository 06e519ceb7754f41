"""JailBreakV-28K (Luo et al. 2024, arXiv:2404.03027) and the requests it is made of, RedTeam-2K."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Literal

from care_lens.data.benchmarks.places import Found
from care_lens.data.benchmarks.reader import Benchmark, Item, Root, behaviour_key, one_of
from care_lens.data.benchmarks.rows import Row

#: Formats taken over from jailbreaks of language models (``llm_transfer_attack/``).
_IN_WORDS = ("template", "persuade", "logic")


class JailBreakV(Benchmark):
    """JailBreakV-28K: ``JailBreakV_28K.csv`` or ``mini_JailBreakV_28K.csv``; pictures at ``root / image_path``, most of them in a zip of their own.

    Channels are "jailbreakv " and the row's format. Formats taken over from language models, whose pictures have nothing to do with the
    request, have ``meta["modality"]`` "textual".

    Args:
        root: As of :class:`Benchmark`.
        subset: "full" (28,000 rows) or "mini" (280).
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "jailbreakv"
    columns = ("id", "jailbreak_query", "redteam_query", "format", "policy", "image_path")
    optional = ("from", "selected_mini", "transfer_from_llm")
    files = ("jailbreakv_28k.csv", "mini_jailbreakv_28k.csv")
    variants: ClassVar = {files[0]: {"subset": "full"}, files[1]: {"subset": "mini"}}

    def __init__(
        self, root: Root, *, subset: Literal["full", "mini"] = "full", pictures: str | Path | None = None
    ) -> None:
        self.subset = one_of(subset, ("full", "mini"), "subset")
        self.files, self.published = (self.files[subset == "mini"],), 280 if subset == "mini" else 28_000
        super().__init__(root, pictures=pictures)

    def item(self, row: Row) -> Item:
        """A jailbreak with its picture; the behaviour is the request it is made of."""
        request = row.text("redteam_query")
        return Item(
            id=row.text("id"),
            prompt=row.text("jailbreak_query"),
            pictures=(self.picture(row, "image_path"),),
            harmful=True,
            channel=f"jailbreakv {row.text('format')}",
            behaviour=request,
            group=behaviour_key(request),
            meta={
                **{
                    key: row.optional(key) for key in ("format", "policy", "from", "selected_mini", "transfer_from_llm")
                },
                # a jailbreak for language models, beside a picture that has nothing to do with it
                "modality": "textual" if row.text("format").casefold() in _IN_WORDS else None,
            },
        )

    def mispaired(self) -> Iterable[tuple[Item, str]]:
        """Rows whose picture lies in another folder than the pictures of nearly all rows of their format."""
        folders: dict[str, Counter[str]] = defaultdict(Counter)
        for item in self.items:
            folders[item.meta["format"] or ""][_folder(item)] += 1
        for item in self.items:
            counts = folders[item.meta["format"] or ""]
            usual, n = counts.most_common(1)[0]
            if _folder(item) != usual and n >= 0.9 * sum(counts.values()):
                yield item, f"its picture lies in {_folder(item)!r}, those of {item.meta['format']!r} in {usual!r}"


def _folder(item: Item) -> str:
    picture = item.pictures[0]
    return picture.asked.replace("\\", "/").split("/")[0].lower() if isinstance(picture, Found) else ""


class RedTeam2K(Benchmark):
    """RedTeam-2K: ``RedTeam_2K.csv``, requests in plain words."""

    name: ClassVar[str] = "redteam2k"
    files = ("redteam_2k.csv",)
    columns = ("id", "question", "policy", "from")
    other = ("image", "jailbreak_query")

    def item(self, row: Row) -> Item:
        """A request."""
        question = row.text("question")
        return Item(
            id=row.text("id"),
            prompt=question,
            harmful=True,
            behaviour=question,
            group=behaviour_key(question),
            meta={"policy": row.optional("policy"), "from": row.optional("from")},
        )
