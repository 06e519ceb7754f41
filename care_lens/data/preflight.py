"""Is the data whole? What a folder of benchmark files lacks, before any GPU time is spent on it.

    report = preflight("JailBreakV_28K")
    report.ok, report.frame  # one row a check
    report.problems  # one row a row of the files that gives no example, with what to do

On the command line: ``care-lens preflight FOLDER``.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from PIL import Image

from care_lens.core.pictures import PictureError
from care_lens.data.benchmarks import READERS, ASTRAPictures
from care_lens.data.benchmarks.finding import lacking
from care_lens.data.benchmarks.own import OwnExamples
from care_lens.data.benchmarks.places import BenchmarkError, Found, Place, StoredFile
from care_lens.data.benchmarks.reader import Benchmark, Item, behaviour_key, one_of, opened
from care_lens.data.benchmarks.rows import Problem
from care_lens.data.benchmarks.tables import ENDINGS, columns_of, read_table

Level = Literal["ok", "warning", "error"]
FORMATS: dict[str, type[Benchmark]] = {**READERS, OwnExamples.name: OwnExamples}
_COLUMNS = ("benchmark", "check", "level", "count", "what", "do")
_PROBLEM_COLUMNS = ("benchmark", "file", "row", "kind", "what", "do")


@dataclass(frozen=True)
class PreflightReport:
    """What :func:`preflight` found.

    Attributes:
        root: The folder or file.
        benchmarks: What it holds, by name.
        frame: A row for each check of each benchmark: benchmark, check, level ("ok", "warning" or "error"), count, what, do.
        problems: A row for each row of the files that gives no example, or a damaged picture: benchmark, file, row, kind, what, do.
    """

    root: str
    benchmarks: tuple[str, ...]
    frame: pd.DataFrame = field(repr=False)
    problems: pd.DataFrame = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether no check found an error; warnings may be left."""
        return not (self.frame["level"] == "error").any()

    def __repr__(self) -> str:
        counts = self.frame["level"].value_counts()
        told = ", ".join(f"{counts.get(level, 0)} {level}s" for level in ("error", "warning"))
        return f"PreflightReport({', '.join(self.benchmarks) or 'no benchmark'}: {told})"


def preflight(root: str | Path, *, format: str | None = None, pixels: bool = False) -> PreflightReport:
    """Look through the files of benchmarks without a model.

    Checked are, for each benchmark that the folder holds: which tables there are; rows that give no example, by reason (pictures that are
    missing, empty, damaged or fit two files; ids that stand twice; fields and rows that cannot be read); pictures that are found by
    another name than the table's (case, Windows separators, absolute paths); examples that stand twice; pictures that seem to belong to
    another question; behaviours that stand in several splits, or in several benchmarks of the folder; examples without a reference answer; and whether there are as many examples as are
    published.

    Args:
        root: A folder, a zip or a table. A folder with ``examples.jsonl`` is a study of your own.
        format: The benchmark it holds, by its name in :data:`~care_lens.data.benchmarks.READERS`, or "examples"; None: found out.
        pixels: Decode every picture to its last pixel, which finds files that were cut off; else only their headers are read.

    Raises:
        BenchmarkNotFoundError: If there is no such folder or file.
        BenchmarkError: If the format is not known.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lines = ["id,prompt,type,label", "1,How do I crush a zorp?,folds,safe", "2,How do I fold a dax?,folds,maybe"]
        ...     _ = Path(folder, "xstest_prompts.csv").write_text(chr(10).join(lines))
        ...     report = preflight(folder)
        >>> report, report.ok
        (PreflightReport(xstest: 1 errors, 0 warnings), False)
        >>> print(report.problems.loc[0, "what"])
        'label' must be 'safe' or 'unsafe', got 'maybe'
    """
    kind = None if format is None else FORMATS[one_of(format, [*FORMATS], "format")]
    place, only = _place(root)
    checks: list[tuple[Any, ...]] = []
    problems: list[tuple[Any, ...]] = []
    named: list[str] = []
    behaviours: dict[str, set[str]] = defaultdict(set)
    found = [*_variants(place, only, kind)]
    for title, reader, options in found:
        named.append(title)
        try:
            rows = reader(root, **options)
        except BenchmarkError as error:
            checks.append((title, "files", "error", 1, str(error), "see what is said"))
            continue
        behaviours[reader.name] |= {behaviour_key(item.behaviour) for item in rows.items if item.behaviour}
        damaged = [*_damaged(rows, pixels)]
        checks += [(title, *check) for check in _checks(rows, damaged)]
        problems += [(title, p.file, str(p.row), p.kind, p.what, p.do) for p in (*rows.problems, *damaged)]
    if kind is None:
        checks += _unreadable(place, only, {reader for _, reader, _ in found})
    checks += _shared(behaviours)
    for name in place.broken:
        do = "download it again"
        checks.append(
            (", ".join(named), "damaged zip", "error", 1, f"{name} cannot be opened; what is in it is missing", do)
        )
    if not found:
        seen = sorted({Path(name).suffix.lower() for name in place.files})
        what = f"no benchmark is known by its files; there are {len(place.files)} files {seen[:8]}"
        do = f"give --format, one of {', '.join(FORMATS)}, and the folder with its tables"
        checks.append(("", "files", "error", 0, what, do))
    return PreflightReport(
        root=str(root),
        benchmarks=tuple(named),
        frame=pd.DataFrame(checks, columns=pd.Index(_COLUMNS)),
        problems=pd.DataFrame(problems, columns=pd.Index(_PROBLEM_COLUMNS)),
    )


def benchmarks_in(root: str | Path) -> list[str]:
    """The names of the benchmarks whose files a folder, a zip or a table holds; no row is read.

    Args:
        root: As of :func:`preflight`.

    Raises:
        BenchmarkNotFoundError: If there is no such folder or file.
    """
    place, only = _place(root)
    return sorted({kind.name for _, kind, _ in _variants(place, only, None)})


def _place(root: str | Path) -> tuple[Place, str | None]:
    """The files of a root, and the table's name where it is one table."""
    if Path(root).suffix.lower() not in ENDINGS:
        return Place.of(root), None
    place, only = Place.of(Path(root).absolute().parent), Path(root).name
    if only not in place.files:
        Place.of(root)  # says that it is not there
    return place, only


def _variants(
    place: Place, only: str | None, wanted: type[Benchmark] | None
) -> Iterator[tuple[str, type[Benchmark], dict[str, Any]]]:
    """The benchmarks of a place, with the options for each of their tables."""

    def tables(patterns: Sequence[str]) -> list[str]:
        return [name for name in place.matching(*patterns) if only in (None, name)]

    kinds = [wanted] if wanted is not None else [*FORMATS.values()]
    by_name = [kind for kind in kinds if _holds(kind, place, tables(kind.files))]
    if not by_name:  # tables of other names, told by their columns
        by_name = [kind for kind in kinds if _holds(kind, place, tables(("*.csv|*.tsv|*.parquet",)))]
    for kind in by_name or ([wanted] if wanted is not None else []):
        options = [o for pattern, o in kind.variants.items() if tables((pattern,))] or [{}]
        for one in options:
            told = ", ".join(str(value) for value in one.values() if value is not None)
            yield (f"{kind.name} {told}".strip() if len(options) > 1 else kind.name), kind, dict(one)


def _unreadable(place: Place, only: str | None, known: set[type[Benchmark]]) -> Iterator[tuple[Any, ...]]:
    """Tables that are called as a benchmark's are and cannot be read, which is why that benchmark is not among those known."""
    told = set[str]()
    for kind in FORMATS.values():
        for name in [] if kind in known else place.matching(*kind.files):
            if only not in (None, name) or name in told or columns_of(place, name, key=kind.key):
                continue
            try:
                read_table(place, name, key=kind.key)
            except BenchmarkError as error:
                told.add(name)
                yield kind.name, "files", "error", 1, str(error), "see what is said"


def _holds(kind: type[Benchmark], place: Place, names: Sequence[str]) -> bool:
    if kind is ASTRAPictures:
        return any("adv_img_" in name.lower() for name in (*place.files, f"{place.root.name}/"))
    return any(not lacking(kind, name, columns_of(place, name, key=kind.key)) for name in names)


def _damaged(rows: Benchmark, pixels: bool) -> Iterator[Problem]:
    """Pictures that are no pictures, or cut off."""
    tried: dict[Any, str | None] = {}
    for item in rows.items:
        for picture in item.pictures:
            key = id(picture) if isinstance(picture, Image.Image) else picture
            if key not in tried:
                tried[key] = _fault(picture, pixels)
            if (fault := tried[key]) is not None:
                do = "download it again; the run would stop there"
                yield Problem(item.meta["file"] or "", item.meta["row"] or "", "damaged picture", fault, do)


def _fault(picture: Any, pixels: bool) -> str | None:
    try:
        image = opened(picture)
        if pixels:
            image.load()
            image.getpixel((0, 0))
    except (PictureError, OSError) as error:
        return str(error)
    return None


def _checks(rows: Benchmark, damaged: Sequence[Problem]) -> Iterator[tuple[str, Level, int, str, str]]:
    """The checks of one benchmark: check, level, count, what, do."""
    yield "tables", "ok", len(rows.tables), ", ".join(rows.tables), ""
    yield "rows", "ok", rows.n_rows, "read in all", ""
    yield (
        "examples",
        "ok" if len(rows) else "error",
        len(rows),
        "can be read",
        "" if len(rows) else "see the other checks",
    )
    kinds: dict[str, list[Problem]] = defaultdict(list)
    for problem in (*rows.problems, *damaged):
        kinds[problem.kind].append(problem)
    for kind, some in kinds.items():
        dos = Counter(problem.do for problem in some).most_common(1)[0][0]
        yield kind, "error", len(some), _told(f"{p.file} row {p.row}: {p.what}" for p in some), dos
    if rows.notes:
        by = ", ".join(f"{n} by {how}" for how, n in Counter(note[-1] for note in rows.notes).most_common())
        shown = _told(f"{asked!r} is {name!r}" for _, _, asked, name, _ in rows.notes)
        yield (
            "misnamed picture",
            "warning",
            len(rows.notes),
            f"found all the same, {by}: {shown}",
            "nothing; or rename the files",
        )
    yield from _repeated(rows)
    yield from _pairing(rows)
    yield from _leaks(rows)
    without = [item.id for item in rows.items if item.response is None]
    if without and (rows.answered or len(without) < len(rows)):
        yield (
            "no answer",
            "warning",
            len(without),
            _told(without),
            "they cannot be teacher-forced, nor graded against an answer",
        )
    if rows.published is not None and rows.n_rows < rows.published:
        what = f"{rows.n_rows} rows, published are {rows.published}"
        yield "fewer rows", "warning", rows.published - rows.n_rows, what, "see whether the download is whole"


def _repeated(rows: Benchmark) -> Iterator[tuple[str, Level, int, str, str]]:
    first: dict[tuple[Any, ...], str] = {}
    twice = []
    for item in rows.items:
        pictures = item.meta.get("picture") or tuple(map(id, item.pictures))
        key = (item.channel, item.prompt, pictures, item.behaviour)
        if (other := first.setdefault(key, item.id)) != item.id:
            twice.append(f"{item.id} is {other}")
    if twice:
        yield (
            "duplicate",
            "warning",
            len(twice),
            _told(twice),
            "they count twice in every rate, though not in intervals by group",
        )


def _pairing(rows: Benchmark) -> Iterator[tuple[str, Level, int, str, str]]:
    wrong = [f"{item.id}: {why}" for item, why in rows.mispaired()]
    if rows.own_pictures:
        wrong += _same_picture(rows.items)
    if wrong:
        yield (
            "wrong pairing",
            "error",
            len(wrong),
            _told(wrong),
            "see which picture belongs to which row; download them again",
        )
    if rows.picture_size is not None:
        odd = []
        for item in rows.items:
            size = _size(item)
            if size is not None and size != rows.picture_size:
                odd.append(f"{item.id}: {size[0]} x {size[1]}")
        if odd:
            what = f"published are {rows.picture_size[0]} x {rows.picture_size[1]}: {_told(odd)}"
            yield "picture size", "warning", len(odd), what, "see whether they are those published"
    used = {picture.name for item in rows.items for picture in item.pictures if isinstance(picture, Found)}
    folders = {name.rpartition("/")[0] for name in used}
    if rows.place is not None and used and not isinstance(rows, ASTRAPictures):
        left = [n for n in rows.place.pictures() if n.rpartition("/")[0] in folders and n not in used]
        missing = any(problem.kind == "missing picture" for problem in rows.problems)
        if left:
            do = "some may be the missing ones under other names" if missing else ""
            yield "unused picture", "warning" if missing else "ok", len(left), _told(left), do


def _same_picture(items: Sequence[Item]) -> list[str]:
    """Items of different behaviours or kinds whose picture is the same, byte by byte."""
    by_size: dict[int, list[tuple[Item, StoredFile]]] = defaultdict(list)
    for item in items:
        for picture in item.pictures:
            if isinstance(picture, Found):
                by_size[picture.file.size()].append((item, picture.file))
    wrong = []
    for some in by_size.values():
        first: dict[str, Item] = {}
        for item, file in some if len({file for _, file in some}) > 1 else ():
            other = first.setdefault(hashlib.sha256(file.read()).hexdigest(), item)
            if (other.group, other.channel) != (item.group, item.channel):
                wrong.append(f"{item.id} has the picture of {other.id}")
    return wrong


def _size(item: Item) -> tuple[int, int] | None:
    try:
        return opened(item.pictures[0]).size if item.pictures else None
    except (PictureError, OSError):
        return None  # counted among the damaged


def _leaks(rows: Benchmark) -> Iterator[tuple[str, Level, int, str, str]]:
    homes: dict[str, set[str]] = defaultdict(set)
    for item in rows.items:
        if split := item.meta.get("source_split"):
            for key in {item.group, behaviour_key(item.behaviour or item.group)}:
                homes[key].add(split)
    leaks = [f"{key!r} in {' and '.join(sorted(splits))}" for key, splits in homes.items() if len(splits) > 1]
    if leaks:
        own = isinstance(rows, OwnExamples)
        do = "give each group one split, or let Study.from_examples deal them"
        yield "leak over splits", "error" if own else "warning", len(leaks), _told(leaks), do


def _shared(behaviours: dict[str, set[str]]) -> Iterator[tuple[str, str, Level, int, str, str]]:
    """Behaviours that stand in two benchmarks: fitted on one and tested on the other, they leak."""
    for one, other in combinations(sorted(behaviours), 2):
        if both := sorted(behaviours[one] & behaviours[other]):
            do = "deal them together, by Study.from_examples"
            yield f"{one}, {other}", "shared behaviour", "warning", len(both), _told(map(repr, both)), do


def _told(texts: Any, n: int = 3) -> str:
    """The first few of many."""
    listed = list(texts)
    more = f"; and {len(listed) - n} more" if len(listed) > n else ""
    return "; ".join(text if len(text) <= 160 else f"{text[:157]}..." for text in listed[:n]) + more
