"""Tables of parquet files and of `datasets` objects. Columns of pictures stay where they are until a picture is used."""

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from care_lens.core.pictures import PictureError, PictureSource
from care_lens.data.benchmarks.places import BenchmarkError, StoredFile
from care_lens.data.benchmarks.rows import Row, Table


def parquet_table(file: StoredFile, name: str) -> Table:
    """The rows of a parquet file. Columns of bytes, and of objects with bytes, hold pictures.

    Raises:
        BenchmarkError: If it is no parquet file.
    """
    try:
        opened = _opened(file, file.stamp())
        schema = opened.schema_arrow
        pictures = [f.name for f in schema if _holds_pictures(f.type)]
        values = opened.read(columns=[n for n in schema.names if n not in pictures]).to_pylist()
        held = {column: _filled(opened, column) for column in pictures}
    except (pa.ArrowException, OSError, PictureError) as error:
        raise BenchmarkError(f"{name} must be a parquet file, got {error}; download it again") from None
    values = values or [{} for _ in range(opened.metadata.num_rows)]
    return _table(name, tuple(schema.names), values, held, lambda c, i: ParquetCell(file, c, i))


def parquet_columns(file: StoredFile, name: str) -> tuple[str, ...]:
    """Names of the columns of a parquet file.

    Raises:
        BenchmarkError: If it is no parquet file.
    """
    try:
        return tuple(_opened(file, file.stamp()).schema_arrow.names)
    except (pa.ArrowException, OSError, PictureError) as error:
        raise BenchmarkError(f"{name} must be a parquet file, got {error}; download it again") from None


def dataset_table(dataset: Any, name: str) -> Table:
    """The rows of a `datasets.Dataset`.

    Raises:
        BenchmarkError: If it is streamed, or holds rows of another kind.
    """
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "__len__"):
        raise BenchmarkError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; load it without streaming"
        )
    from datasets import Image

    for column, feature in dataset.features.items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
    schema = dataset.features.arrow_schema
    pictures = [f.name for f in schema if _holds_pictures(f.type)]
    plain = dataset.remove_columns(pictures).with_format("arrow")
    values = [row for batch in plain.iter(1000) for row in batch.to_pylist()] if plain.column_names else []
    held = {
        column: [
            kept
            for batch in dataset.select_columns([column]).with_format("arrow").iter(200)
            for kept in _told(batch.column(column))
        ]
        for column in pictures
    }
    values = values or [{} for _ in range(len(dataset))]
    sources = {column: dataset.select_columns([column]).with_format(None) for column in pictures}
    return _table(name, tuple(schema.names), values, held, lambda c, i: DatasetCell(sources[c], c, i))


def _table(name: str, columns: tuple[str, ...], values: list[Any], held: dict[str, list[Any]], cell: Any) -> Table:
    rows = []
    for i, row in enumerate(values):
        cells: dict[str, PictureSource] = {c: cell(c, i) for c, found in held.items() if found[i] is True}
        named = {c: found[i] for c, found in held.items() if isinstance(found[i], str)}
        rows.append(Row(name, i + 1, {**row, **named}, cells))
    return Table(name, columns, rows, [])


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _filled(opened: pq.ParquetFile, column: str) -> list[bool | str | None]:
    """Of each row: whether it holds bytes, or the name of the picture's file where it holds that alone."""
    return [kept for batch in opened.iter_batches(200, columns=[column]) for kept in _told(batch.column(column))]


def _told(values: Any) -> Iterator[bool | str | None]:
    for value in values:
        if pa.types.is_struct(value.type):
            held = value["bytes"] if value.is_valid else None
            if held is not None and held.is_valid and len(held.as_buffer()):
                yield True
            else:
                yield value.as_py().get("path") if value.is_valid else None
        else:
            yield True if value.is_valid and len(value.as_buffer()) else None


def _bytes(value: Any, source: PictureSource) -> bytes:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise PictureError(f"{source} must hold the bytes of a picture, got {type(content).__name__}")
    return content


@dataclass(frozen=True)
class ParquetCell:
    """A picture in a column of a parquet file: its group of rows is read when it is used."""

    file: StoredFile
    column: str
    row: int

    def read(self) -> bytes:
        """The bytes of the picture."""
        opened, row = _opened(self.file, self.stamp()), self.row
        for group in range(opened.num_row_groups):
            if row < (n := opened.metadata.row_group(group).num_rows):
                return _bytes(_group(self.file, self.stamp(), self.column, group)[row].as_py(), self)
            row -= n
        raise PictureError(f"{self} must be there, got {opened.metadata.num_rows} rows; open the benchmark again")

    def stamp(self) -> tuple[int, int]:
        """Of the file."""
        return self.file.stamp()

    def __str__(self) -> str:
        return f"{self.file} row {self.row + 1}, column {self.column!r}"


@functools.lru_cache(maxsize=16)
def _opened(file: StoredFile, stamp: tuple[int, int]) -> pq.ParquetFile:
    """A parquet file; of one in a zip the bytes are held."""
    del stamp
    return pq.ParquetFile(file.path if file.member is None else io.BytesIO(file.read()))


@functools.lru_cache(maxsize=2)
def _group(file: StoredFile, stamp: tuple[int, int], column: str, group: int) -> Any:
    return _opened(file, stamp).read_row_group(group, columns=[column]).column(column)


@dataclass(frozen=True, eq=False)
class DatasetCell:
    """A picture in a column of a `datasets.Dataset`."""

    dataset: Any
    column: str
    row: int

    def read(self) -> bytes:
        """The bytes of the picture."""
        return _bytes(self.dataset[self.row][self.column], self)

    def stamp(self) -> tuple[int, int]:
        """A dataset does not change."""
        return 0, 0

    def __str__(self) -> str:
        return f"dataset row {self.row + 1}, column {self.column!r}"
