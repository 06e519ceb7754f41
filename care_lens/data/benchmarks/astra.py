"""The adversarial pictures that ASTRA (Wang et al. 2024, arXiv:2411.16721) publishes: found by PGD, for several models and budgets."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from care_lens.core.examples import Example
from care_lens.core.require import require_examples
from care_lens.data.benchmarks.places import BenchmarkError, BenchmarkNotFoundError, Found, Place, natural
from care_lens.data.benchmarks.reader import Benchmark, Item, Root, one_of, require_whole
from care_lens.data.benchmarks.rows import Problem, Row, Table

_PATH = re.compile(
    r"(?:.*/)?adv_img_(jb|toxic)/([^/]+)/(constrain_[0-9]+|unconstrain)/bad_prompt_([0-9]+)_([^/]*)\.(?:bmp|png)",
    re.IGNORECASE,
)
_INSIDE = re.compile(r"(?:.*/)?(adv_img_[^/]+)/.", re.IGNORECASE)


class ASTRAPictures(Benchmark):
    """ASTRA's pictures: ``adv_img_{jb,toxic}/{model}/{constrain_16,...,unconstrain}/bad_prompt_{i}_{kind}.bmp``, 71 in each folder.

    ``meta["source_split"]`` is as the CARE paper uses them: "validation" for i of 16 to 40, "test" from 41 on. The files hold pictures only.

    Args:
        root: The folder that holds the ``adv_img_`` folders, or a zip of it.
        prompts: Requests to go with them: the j-th picture goes with the j-th of them, and begins again when there are no more. Prompt,
            behaviour, response, harm and group are theirs. Without them prompts are empty, for you to fill in.
        task: "jb" or "toxic"; None: both.
        model: Name of the model's folder; None: all.
        budget: "constrain_16", "constrain_32", "constrain_64" or "unconstrain"; None: all.
        pictures: As of :class:`Benchmark`.
    """

    name: ClassVar[str] = "astra"
    files = ("adv_img_jb", "adv_img_toxic")

    def __init__(
        self,
        root: Root,
        *,
        prompts: Sequence[Example] = (),
        task: Literal["jb", "toxic"] | None = None,
        model: str | None = None,
        budget: Literal["constrain_16", "constrain_32", "constrain_64", "unconstrain"] | None = None,
        pictures: str | Path | None = None,
    ) -> None:
        self.prompts = require_examples(prompts, "prompts")
        task = task if task is None else one_of(task, ("jb", "toxic"), "task")
        self.wanted = {"task": task, "model": model, "budget": budget}
        self._seen = 0
        super().__init__(root, pictures=pictures)

    def _sources(self, root: Root) -> tuple:
        if not isinstance(root, (str, Path)):
            raise BenchmarkError(f"root must be a folder or a zip of pictures, got {type(root).__name__}")
        place = Place.of(root)
        if place.root.name.lower().startswith("adv_img_") and place.root.is_dir():
            place = Place.of(place.root.parent)
        names = sorted((n for n in place.files if _INSIDE.match(n)), key=natural)
        if not names:
            raise BenchmarkNotFoundError(
                f"{place.root} must hold adv_img_jb or adv_img_toxic of ASTRAPictures, got neither; give the folder that holds them"
            )
        rows = [Row("pictures", n, {"name": n}) for n in names]  # type: ignore[index]
        return place, [Table("pictures", ("name",), rows, [])]

    def units(self, row: Row) -> Sequence[Row | Problem]:
        """The picture, if it is called as the others are."""
        match = _PATH.fullmatch(str(row.number))
        if match is None:
            what = "it must be called MODEL/BUDGET/bad_prompt_NUMBER_KIND.bmp"
            return (Problem(row.file, row.number, "bad row", what, "rename it or take it out"),)
        task, model, budget, number, kind = match.groups()
        values = {"task": task.lower(), "model": model, "budget": budget.lower(), "number": number, "kind": kind}
        if any(wanted is not None and values[key] != wanted for key, wanted in self.wanted.items()):
            return ()
        return (Row(row.file, row.number, values | {"name": row.values["name"]}),)

    def item(self, row: Row) -> Item:
        """A picture, with the prompt whose turn it is."""
        assert self.place is not None
        task, model, budget, kind = (str(row.values[key]) for key in ("task", "model", "budget", "kind"))
        number, name = row.number_in("number"), str(row.values["name"])
        require_whole(found := Found(name, self.place.files[name], "", name))
        asked = self.prompts[self._seen % len(self.prompts)] if self.prompts else None
        self._seen += 1
        split = "test" if number >= 41 else "validation" if number >= 16 else None
        return Item(
            id=f"{task}/{model}/{budget}/{number}_{kind}",
            prompt=asked.prompt if asked else "",
            pictures=(found,),
            harmful=asked.harmful if asked else True,
            channel=f"astra {task} {budget}",
            behaviour=(asked.behaviour or asked.prompt) if asked else None,
            response=asked.response if asked else None,
            group=(asked.group or asked.id) if asked else f"astra {task} {number}",
            meta={"model": model, "budget": budget, "number": str(number), "kind": kind, "source_split": split},
        )
