"""What every reader of a published benchmark is: a sequence of examples, and a list of the rows that give none.

A reader says which files it needs, which columns they have and what a row means (:meth:`Benchmark.item`); finding files, reading tables,
finding pictures, counting and logging is done here. All texts are read at once and all pictures are looked up, so that what is missing is
known before anything is run. A picture is opened when its example is asked for, and its pixels are decoded when they are used.

    rows = benchmarks.FigStep("FigStep/data")
    len(rows), rows[0].behaviour, rows.problems
"""

import logging
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, overload

import pandas as pd
from PIL import Image

from care_lens.core.conversation import PICTURE
from care_lens.core.examples import Example
from care_lens.core.pictures import PictureError, PictureSource, open_picture
from care_lens.data.behaviours import behaviour_key as behaviour_key
from care_lens.data.benchmarks.finding import datasets_of, renamed, tables_of, title_of
from care_lens.data.benchmarks.places import (
    BenchmarkError,
    Found,
    NotThereError,
    Place,
    StoredFile,
)
from care_lens.data.benchmarks.rows import Problem, Row, RowError, Table
from care_lens.data.benchmarks.tables import ENDINGS, read_table

log = logging.getLogger(__name__)

Root = str | Path | Any
if TYPE_CHECKING:
    _Examples = Sequence[Example]
else:
    _Examples = Sequence  # a check of types would look into a subscripted one, and open a picture
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Item:
    """What a row says, before its pictures are opened; the fields are those of :class:`~care_lens.core.examples.Example`."""

    id: str
    prompt: str
    harmful: bool
    group: str = ""
    channel: str = ""
    behaviour: str | None = None
    response: str | None = None
    pictures: tuple[Found | PictureSource | Image.Image, ...] = ()
    meta: Mapping[str, str | None] = field(default_factory=dict)


class Benchmark(_Examples):
    """The examples of a published benchmark.

    Args:
        root: The folder that holds its files (at any depth), a zip of it, one of its tables (csv, tsv, json, jsonl, parquet; pictures are then
            looked for in the folder of the table), or a `datasets.Dataset`, a `datasets.DatasetDict` or a mapping of them.
        pictures: A folder or zip with the pictures, where they are not under the root.

    Attributes:
        problems: Rows that give no example, each with its file, its number, what is wrong and what to do. The examples and the problems
            together are as many as the rows read.
        n_rows: The rows read: as many as examples and problems together.
        notes: Pictures that were found by another name than the table gives: (file, row, name in the table, name of the file, what
            differs: "case", "separators" or "absolute path").

    Raises:
        BenchmarkNotFoundError: If there is no such place, or no table of this benchmark in it. It is a FileNotFoundError.
        BenchmarkError: If a table cannot be read, or has other columns. It is a ValueError.

    Each example has a ``group`` (its behaviour, so that intervals and splits go by behaviour), ``behaviour`` where the prompt does not say what
    is asked for, ``response`` (the reference answer of the file) where there is one, and in ``meta`` where it comes from: benchmark, file, row,
    picture, and source_split where the files name one.
    """

    name: ClassVar[str] = ""
    files: tuple[str, ...] = ()
    columns: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    other: ClassVar[tuple[str, ...]] = ()
    """Columns that tell another benchmark from this one."""
    base64_columns: ClassVar[tuple[str, ...]] = ()
    key: ClassVar[str | None] = None
    answered: ClassVar[bool] = False
    """Whether its rows have a reference answer."""
    several: ClassVar[bool] = False
    """Whether its rows stand in several tables."""
    own_pictures: ClassVar[bool] = False
    """Whether each picture was made for one behaviour."""
    picture_size: ClassVar[tuple[int, int] | None] = None
    """Width and height of all pictures, where they have one size."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the table that they read, where there are several."""
    published: int | None = None
    """Examples of the published files."""

    def __init__(self, root: Root, *, pictures: str | Path | None = None) -> None:
        self._items: list[Item] = []
        self.problems: tuple[Problem, ...] = ()
        try:
            self._place, tables = self._sources(root)
            if pictures is not None:
                more = Place.of(pictures)
                self._place = more if self._place is None else self._place.joined(more)
            tables = [self.prepared(table) for table in tables]
        except RowError as error:  # of a row that other rows need
            raise BenchmarkError(f"{title_of(self)}: {error}") from None
        self._ids: dict[str, str] = {}
        problems: list[Problem] = []
        notes: list[tuple[str, str, str, str, str]] = []
        self._found: dict[str, list[str]] = {}
        for table in tables:
            self._found[table.name] = [*table.columns]
            problems += table.problems
            for row in table.rows:
                self._read_row(row, problems, notes)
        self.problems, self.notes = tuple(problems), tuple(notes)
        self.n_rows = len(self._items) + len(problems)
        if problems:
            counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in problems).most_common())
            log.warning(
                "%s: %d of %d rows left out (%s); `care-lens preflight` lists them",
                self.name,
                len(problems),
                self.n_rows,
                counts,
            )
        if notes:
            log.info("%s: %d pictures found by another name than the table's", self.name, len(notes))

    def _read_row(self, row: Row, problems: list[Problem], notes: list[tuple[str, str, str, str, str]]) -> None:
        try:
            units = [*self.units(row)]
        except RowError as error:
            problems.append(Problem(row.file, row.number, error.kind, error.what, error.do))
            return
        for unit in units:
            if isinstance(unit, Problem):
                problems.append(unit)
                continue
            try:
                if (item := self.item(unit)) is not None:
                    self._keep(item, unit)
                    notes += _noted(item, unit)
            except (RowError, NotThereError) as error:
                problems.append(Problem(unit.file, unit.number, error.kind, error.what, error.do))

    # What a reader says for itself.

    def item(self, row: Row) -> Item | None:
        """What a row says, or None for a row that the reader's options leave out.

        Raises:
            RowError: If it says nothing that can be used.
            NotThereError: If its picture is missing.
        """
        raise TypeError(f"{type(self).__name__} must say what a row means; define item(row)")

    def units(self, row: Row) -> Iterable[Row | Problem]:
        """The rows that a row of the file stands for: itself, or one for each of its questions or kinds of picture."""
        return (row,)

    def prepared(self, table: Table) -> Table:
        """A table before its rows are read; here, what else the reader needs to know of it is taken up."""
        return table

    @classmethod
    def columns_in(cls, name: str) -> tuple[str, ...]:
        """The columns that a table of that name must have."""
        del name
        return cls.columns

    # What readers use.

    def picture(self, row: Row, column: str = "image", *, names: Sequence[str] = (), stem: bool = False) -> Any:
        """The picture of a row: in the row itself, or a file by its name.

        Args:
            row: The row.
            column: That holds the picture or its name.
            names: Of the file, instead of the column's text: the first that there is.
            stem: Whether names lack their ending.

        Raises:
            RowError: If it is empty.
            NotThereError: If there is none.
        """
        if column in row.cells:
            return row.cells[column]
        wanted = names or [text for text in [row.optional(column)] if text is not None]
        if not wanted:
            raise RowError(f"{column!r} must be a picture, got none", "download the file again", "missing picture")
        if self._place is None:
            raise NotThereError(
                "missing picture", f"no file {wanted[0]!r}", "give the folder with the pictures as pictures="
            )
        found = self._place.find_any(wanted, stem=stem)
        require_whole(found)
        return found

    def mispaired(self) -> Iterable[tuple[Item, str]]:
        """Items whose picture seems to be another's, and why: what the files' own names tell."""
        return ()

    @property
    def place(self) -> Place | None:
        """The files of the root, or None for a dataset."""
        return self._place

    @property
    def items(self) -> tuple[Item, ...]:
        """What the rows say, without their pictures."""
        return tuple(self._items)

    @property
    def tables(self) -> Mapping[str, list[str]]:
        """Columns of the tables that were read, by file."""
        return dict(self._found)

    def _keep(self, item: Item, row: Row) -> None:
        if PICTURE in item.prompt:
            raise RowError("the prompt holds U+FFFC, which stands for a picture", "take the character out")
        name = f"{self.name}/{item.id}"
        here = f"{row.file} row {row.number}"
        if name in self._ids:
            what = f"the id {item.id!r} is that of {self._ids[name]}"
            raise RowError(what, "give each row an id of its own", "duplicate id")
        self._ids[name] = here
        about = {"benchmark": self.name, "file": row.file, "row": str(row.number)}
        if item.pictures and not isinstance(item.pictures[0], Image.Image):
            about["picture"] = " ".join(p.name if isinstance(p, Found) else str(p) for p in item.pictures)  # type: ignore[union-attr]
        about |= {key: str(value) for key, value in item.meta.items() if value not in (None, "")}
        channel = item.channel or self.name
        self._items.append(replace(item, id=name, channel=channel, group=item.group or name, meta=about))

    def _sources(self, root: Root) -> tuple[Place | None, list[Table]]:
        """The place and the tables of a root."""
        if type(root).__module__.split(".")[0] == "datasets" or isinstance(root, Mapping):
            from care_lens.data.benchmarks.arrow import dataset_table

            self._root_name = str(getattr(root, "config_name", None) or "dataset")
            return None, [renamed(self, dataset_table(part, name)) for name, part in datasets_of(root, "").items()]
        path = Path(root) if isinstance(root, (str, Path)) else None
        if path is not None and path.is_file() and path.suffix.lower() in ENDINGS:
            place, names = Place.of(path.absolute().parent), [path.name]
        else:
            place = Place.of(root)
            names = tables_of(self, place)
        self._root_name = place.root.name
        return place, [renamed(self, self.read(place, name)) for name in names]

    def read(self, place: Place, name: str) -> Table:
        """A table of the place."""
        return read_table(place, name, key=self.key, base64_columns=self.base64_columns)

    # The sequence.

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> "Example | list[Example]":
        if isinstance(index, slice):
            return [self._example(item) for item in self._items[index]]
        return self._example(self._items[index])

    def _example(self, item: Item) -> Example:
        try:
            images = [opened(picture) for picture in item.pictures]
        except (PictureError, OSError) as error:
            where = f"{item.meta['file']} row {item.meta['row']}"
            raise PictureError(f"{where}: {error} (`care-lens preflight` lists all such)") from None
        return Example(
            prompt=item.prompt,
            image=images[0] if images else None,
            more_images=tuple(images[1:]),
            response=item.response,
            harmful=item.harmful,
            channel=item.channel,
            id=item.id,
            group=item.group,
            behaviour=item.behaviour,
            meta={key: str(value) for key, value in item.meta.items()},
        )

    def to_dataframe(self) -> pd.DataFrame:
        """The rows without their pictures: id, channel, harmful, group, prompt, behaviour, response, and what meta holds."""
        names = ("id", "channel", "harmful", "group", "prompt", "behaviour", "response")
        return pd.DataFrame([{n: getattr(item, n) for n in names} | dict(item.meta) for item in self._items])

    def problems_dataframe(self) -> pd.DataFrame:
        """The problems: file, row, kind, what, do."""
        names = ("file", "row", "kind", "what", "do")
        return pd.DataFrame([[getattr(p, n) for n in names] for p in self.problems], columns=pd.Index(names))

    def __repr__(self) -> str:
        more = f", {len(self.problems)} problems" if self.problems else ""
        return f"{type(self).__name__}({len(self)} examples{more})"


def opened(picture: Found | PictureSource | Image.Image) -> Image.Image:
    """The picture of an item, opened: its header is read."""
    if isinstance(picture, Image.Image):
        return picture
    file = picture.file if isinstance(picture, Found) else picture
    return open_picture(file.path if isinstance(file, StoredFile) and file.member is None else file)


def require_whole(found: Found) -> None:
    """Refuse a file that is empty, or that holds a pointer in place of the picture.

    Raises:
        RowError: If it is one of these.
    """
    size = found.file.size()
    if size == 0 or (size < 300 and found.file.read().startswith(_POINTER)):
        what = "is empty" if size == 0 else "is a pointer of Git LFS"
        raise RowError(f"{found.name!r} {what}", "download it again, or run `git lfs pull`", "empty picture")


def _noted(item: Item, row: Row) -> list[tuple[str, str, str, str, str]]:
    found = [picture for picture in item.pictures if isinstance(picture, Found) and picture.how]
    return [(row.file, str(row.number), picture.asked, picture.name, picture.how) for picture in found]


def one_of(value: Any, known: Sequence[str], what: str) -> Any:
    """An option.

    Raises:
        BenchmarkError: If it is none of those known.
    """
    if value not in known:
        raise BenchmarkError(f"{what} must be one of {list(known)}, got {value!r}; write one of them")
    return value


def split_of(name: str) -> str | None:
    """The split that a file or folder is named by: "train", "validation" or "test"."""
    parts = posixpath.splitext(name.lower())[0].replace("-", "_").replace("/", "_").replace(".", "_").split("_")
    for part in reversed(parts):
        for split, words in (("train", ("train", "train2014", "train2017")), ("test", ("test", "test2015")),
                             ("validation", ("validation", "val", "valid", "dev", "val2014", "val2017"))):  # fmt: skip
            if part in words:
                return split
    return None
