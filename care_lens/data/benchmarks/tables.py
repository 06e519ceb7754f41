"""Rows of published tables: csv, tsv, json, jsonl, parquet and `datasets` objects, as mappings with their place in the file.

A row that cannot be read is a :class:`Problem`, and the rows behind it are read all the same. Texts are UTF-8, with or without a byte
order mark, and lines end in a line feed, as on Windows or as on old Macs. Pictures inside of a table (bytes, or base64 in a text) are not kept: a row holds
a source that reads them when they are used.
"""

import base64
import binascii
import csv
import functools
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from care_lens.core.pictures import PictureError
from care_lens.data.benchmarks.places import BenchmarkError, Place, StoredFile
from care_lens.data.benchmarks.rows import Problem, Row, Table

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_LONGEST = 2**31 - 1  # of a field in a csv: a picture in base64 is longer than the csv module expects


def read_table(place: Place, name: str, *, key: str | None = None, base64_columns: Sequence[str] = ()) -> Table:
    """Read a table of a place, by the ending of its name.

    Args:
        place: Where it is.
        name: Its name there.
        key: Of the list of rows, in a JSON object that holds it beside other things.
        base64_columns: Of a csv or tsv, those that hold pictures.

    Raises:
        BenchmarkError: If the file as a whole cannot be read.
    """
    file, ending = place.files[name], posixpath.splitext(name)[1].lower()
    if ending == ".parquet":
        from care_lens.data.benchmarks.arrow import parquet_table

        return parquet_table(file, name)
    content = _content(file, name)
    if ending in (".csv", ".tsv"):
        return _csv(file, name, content, "\t" if ending == ".tsv" else ",", base64_columns)
    return _jsonl(name, content) if ending == ".jsonl" else _json(name, content, key)


def columns_of(place: Place, name: str, *, key: str | None = None) -> tuple[str, ...]:
    """Names of the columns of a table; none where it cannot be read. Of a csv only the header is read."""
    try:
        if name.lower().endswith((".csv", ".tsv")):
            line = _content(place.files[name], name).split(b"\n", 1)[0]
            return tuple(
                _csv(place.files[name], name, line, "\t" if name.lower().endswith(".tsv") else ",", ()).columns
            )
        if name.lower().endswith(".parquet"):
            from care_lens.data.benchmarks.arrow import parquet_columns

            return parquet_columns(place.files[name], name)
        return read_table(place, name, key=key).columns
    except BenchmarkError:
        return ()


def read_text_file(file: StoredFile, name: str) -> str:
    """A UTF-8 text, without a byte order mark and with line feeds as line ends.

    Raises:
        BenchmarkError: If it cannot be read.
    """
    try:
        return _content(file, name).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{name} must be UTF-8 text ({error}); save it as UTF-8") from None


def _content(file: StoredFile, name: str) -> bytes:
    """The bytes of a text file, without its byte order mark."""
    try:
        content = file.read()
    except (OSError, PictureError) as error:
        raise BenchmarkError(f"{name} must be a file that can be read ({error}); download it again") from None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BenchmarkError(f"{name} must be UTF-8, got UTF-16; save it as UTF-8")
    if content.startswith(b"version https://git-lfs"):
        raise BenchmarkError(f"{name} must be the file itself, got a pointer of Git LFS; run `git lfs pull`")
    return _line_feeds(content).removeprefix(b"\xef\xbb\xbf")


def _line_feeds(content: bytes) -> bytes:
    """The bytes with line feeds as line ends where all are lone carriage returns, as of old Macs; of the same length, so that places stay right."""
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _csv(file: StoredFile, name: str, content: bytes, delimiter: str, base64_columns: Sequence[str]) -> Table:
    lines = content.split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found = _records(lines, delimiter)
    _, _, header = next(found, (0, 0, []))
    if isinstance(header, str) or not header:
        raise BenchmarkError(
            f"{name} must begin with the names of its columns, got {header or 'nothing'}; download it again"
        )
    columns = tuple(column.strip() for column in header)
    if twice := sorted({c for c in columns if columns.count(c) > 1}):
        raise BenchmarkError(f"{name} must name each column once, got {twice} twice; rename one")
    rows, problems, number = [], [], 0
    marked = file.size() - len(content)  # the byte order mark
    for first, end, fields in found:
        if fields == []:
            continue
        number += 1
        if isinstance(fields, str):
            do = "put texts with commas or quotes in quotes, and double the quotes in them"
            problems.append(
                Problem(name, number, "bad row", f"line {first + 1} is not as csv is written ({fields})", do)
            )
        elif len(fields) != len(columns):
            what = f"line {first + 1} has {len(fields)} fields, the header {len(columns)}"
            problems.append(Problem(name, number, "bad row", what, "put texts with commas in quotes"))
        else:
            # a copy made on Windows has its line ends inside of texts too, and must give the same prompts
            texts = [text.replace("\r\n", "\n") for text in fields] if lines[0].endswith(b"\r") else fields
            values: dict[str, Any] = dict(zip(columns, texts))
            span = (starts[first] + marked, starts[end] + marked)
            cells = {
                c: CsvCell(file, c, *span, delimiter, columns.index(c))
                for c in base64_columns
                if len(values.get(c, "")) > 64  # a shorter one is the index of the row that holds the picture
            }
            rows.append(Row(name, number, {c: v for c, v in values.items() if c not in cells}, cells))
    return Table(name, columns, rows, problems)


def _records(lines: Sequence[bytes], delimiter: str) -> Iterator[tuple[int, int, list[str] | str]]:
    """Records of a csv: their first line, the line behind them, and their fields or what is wrong.

    A quote that is never closed would take all lines behind it into its record. Such a line is given up alone, and reading goes on with the
    next one.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    at = 0
    while at < len(lines):
        first = at
        texts = (lines[i].decode("utf-8", "surrogateescape") + "\n" for i in range(at, len(lines)))
        reader = csv.reader(texts, delimiter=delimiter, strict=True)
        try:
            for fields in reader:
                yield first, at + reader.line_num, fields
                first = at + reader.line_num
            return
        except csv.Error as error:
            yield first, first + 1, str(error)
            at = first + 1


class _Object(dict[str, Any]):
    """A JSON object with keys that are given twice."""

    pairs: list[tuple[str, Any]]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) == len(pairs):
        return made
    twice = _Object(pairs)
    twice.pairs = pairs
    return twice


def _parsed(name: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8", "surrogateescape"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{name} must be JSON ({error}); download it again") from None


def _json(name: str, content: bytes, key: str | None) -> Table:
    found = _parsed(name, content)
    if isinstance(found, dict) and key is not None:
        if not isinstance(found.get(key), list):
            raise BenchmarkError(
                f"{name} must have a list under {key!r}, got the keys {sorted(found)[:8]}; download it again"
            )
        found = found[key]
    if isinstance(found, dict):
        return _table(name, found.pairs if isinstance(found, _Object) else found.items())
    if isinstance(found, list):
        return _table(name, enumerate(found, 1))
    raise BenchmarkError(f"{name} must hold rows, got {type(found).__name__}; download it again")


def _jsonl(name: str, content: bytes) -> Table:
    pairs: list[tuple[int, Any]] = []
    for line in content.split(b"\n"):
        if line.strip():
            try:
                pairs.append((len(pairs) + 1, _parsed(name, line)))
            except BenchmarkError as error:
                pairs.append((len(pairs) + 1, error))
    return _table(name, pairs)


def _table(name: str, pairs: Any) -> Table:
    rows, problems, columns = [], [], {}
    for number, values in pairs:
        if not isinstance(values, dict):
            what = str(values) if isinstance(values, BenchmarkError) else f"it must be an object, got {values!r:.40}"
            problems.append(Problem(name, number, "bad row", what, "write it as the other rows are"))
        elif isinstance(values, _Object):
            problems.append(Problem(name, number, "bad row", "a key is given twice", "take one out"))
        else:
            columns |= dict.fromkeys(values)
            rows.append(Row(name, number, values))
    return Table(name, tuple(columns), rows, problems)


@dataclass(frozen=True)
class CsvCell:
    """A picture in base64 in a field of a csv or tsv: its record is read again when it is used."""

    file: StoredFile
    column: str
    start: int
    end: int
    delimiter: str
    index: int

    def read(self) -> bytes:
        """The bytes of the picture."""
        if self.file.member is None:
            with self.file.path.open("rb") as opened:
                opened.seek(self.start)
                span = opened.read(self.end - self.start)
        else:
            span = _whole(self.file, self.stamp())[self.start : self.end]
        fields = next(_records(_line_feeds(span).split(b"\n"), self.delimiter))[2]
        try:
            return base64.b64decode(fields[self.index], validate=False)
        except (binascii.Error, ValueError, IndexError) as error:
            raise PictureError(f"{self} must be a picture in base64, got {error}; download the file again") from None

    def stamp(self) -> tuple[int, int]:
        """Of the file."""
        return self.file.stamp()

    def __str__(self) -> str:
        return f"{self.file} at byte {self.start}, column {self.column!r}"


@functools.lru_cache(maxsize=1)
def _whole(file: StoredFile, stamp: tuple[int, int]) -> bytes:
    """A member of a zip, which can only be read from its beginning."""
    del stamp
    return file.read()
