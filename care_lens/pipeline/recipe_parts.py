"""The examples of a recipe: what is learned from and what is tested, which never share a behaviour."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from care_lens.core.examples import Example
from care_lens.data.behaviours import behaviour_components, deal_behaviours
from care_lens.data.benchmarks import READERS
from care_lens.data.joining import limited
from care_lens.evaluation.answering import spread
from care_lens.pipeline.recipe import Recipe, RecipeError, Source


@dataclass(frozen=True)
class Parts:
    """The examples of a recipe.

    Attributes:
        tested: By column.
        malicious: Attacks of the fit split.
        benign: Harmless examples of it.
    """

    tested: dict[str, list[Example]]
    malicious: list[Example]
    benign: list[Example]


def read_parts(recipe: Recipe, files: str | Path, *, limit: int | None = None) -> Parts:
    """Read the files of a recipe and deal what is learned from and what is tested, so that no behaviour is in both.

    Pictures without requests get those of ``prompts``: of the fit split in the fit, of the test split in the test, in turns. Where
    their files name splits (ASTRA: i from 41 on are the test), those hold.

    Args:
        recipe: Which table.
        files: The folder that the roots of its sources are in.
        limit: At most so many tested examples a column; None: all, or as the recipe says.

    Raises:
        BenchmarkError: If files cannot be read.
        RecipeError: If there is nothing to test in a column, or nothing to learn from.
    """
    read = {title: _read(source, files, title) for title, source in recipe.sources.items()}
    benign = {f"{name} (benign)" for name in recipe.benign}
    split = [
        title for title, source in recipe.sources.items() if source.fit or title in benign or " (prompts)" in title
    ]
    pool = [(title, e) for title in split for e in read[title]]
    shares = {"fit": 1 - recipe.test_share, "test": recipe.test_share}
    homes = deal_behaviours([e for _, e in pool], shares, seed=recipe.seed)
    dealt: dict[str, dict[str, list[Example]]] = {title: {"fit": [], "test": []} for title in read}
    for (title, example), home in zip(pool, homes, strict=True):
        dealt[title][home].append(example)
    for title in read:
        if title not in split:
            dealt[title]["test"] = read[title]
    for title, source in recipe.columns.items():
        if source.prompts is not None:
            prompts = dealt[f"{title} (prompts)"]
            dealt[title] = _with_prompts(read[title], prompts, fit=source.fit)
    tested = [e for title in (*recipe.columns, *recipe.utility) for e in dealt[title]["test"]]
    attacks = [e for title, source in recipe.columns.items() if source.fit for e in dealt[title]["fit"]]
    harmless = [e for title in sorted(benign) for part in ("fit", "test") for e in dealt[title][part]]
    found = Parts(
        # limited last: the first pictures of a source may all be of the fit
        tested={
            title: limited(dealt[title]["test"], _least(recipe.sources[title].limit, limit))
            for title in (*recipe.columns, *recipe.utility)
        },
        # columns that nothing is learned from are tested whole: what they have in common with the others is not learned from
        malicious=spread(_untested(attacks, tested), recipe.fit_examples),
        benign=spread(_untested(harmless, tested), recipe.fit_examples),
    )
    if empty := [title for title, some in found.tested.items() if not some]:
        raise RecipeError(
            f"each column must have examples to test on, got none for {empty}; see `care-lens reproduce --check`"
        )
    fitted = any(defence.kind == "published_care" for defence in recipe.defences.values())
    if fitted and not (found.malicious and found.benign):
        raise RecipeError(
            f"there must be attacks and harmless examples to learn from, got {len(found.malicious)} and {len(found.benign)} whose behaviours "
            f"are not tested, of {len(attacks)} and {len(harmless)}; give more files"
        )
    return found


def _read(source: Source, files: str | Path, title: str) -> list[Example]:
    rows = READERS[source.benchmark](Path(files) / source.root, **source.options)
    return [replace(e, channel=title) for e in rows]


def _untested(candidates: Sequence[Example], tested: Sequence[Example]) -> list[Example]:
    """Those of the candidates that are about no behaviour of a tested example."""
    components = behaviour_components([*tested, *candidates])
    apart = sorted(i for component in components if min(component) >= len(tested) for i in component)
    return [candidates[i - len(tested)] for i in apart]


def _least(*limits: int | None) -> int | None:
    return min((n for n in limits if n is not None), default=None)


def _with_prompts(
    pictures: Sequence[Example], prompts: Mapping[str, Sequence[Example]], *, fit: bool
) -> dict[str, list[Example]]:
    """Pictures with requests of their own split, in turns; pictures that their files keep for validation are left out."""
    named = any(e.meta.get("source_split") for e in pictures)
    parts: dict[str, list[Example]] = {"fit": [], "test": []}
    for number, picture in enumerate(pictures):
        kept = picture.meta.get("source_split")
        home = ("test" if kept == "test" else None if kept else "fit") if named else ("fit", "test")[number % 2]
        if not fit and home == "fit":
            home = None if named else "test"
        if home is None:
            continue
        asked = prompts[home] or (prompts["fit"] if not fit else ())
        if not asked:
            continue
        one = asked[len(parts[home]) % len(asked)]
        behaviour, group = one.behaviour or one.prompt, one.group or one.id
        parts[home].append(
            replace(picture, prompt=one.prompt, behaviour=behaviour, group=group, response=None, harmful=one.harmful)
        )
    return parts
