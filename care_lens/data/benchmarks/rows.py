"""Rows of tables, and what is wrong with one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from care_lens.core.pictures import PictureSource


@dataclass(frozen=True)
class Problem:
    """A row that gives no example.

    Attributes:
        file: Name of the file that the row is in.
        row: Which one: the number of the record from 1 on (the header is none), or its key in a JSON object.
        kind: "missing picture", "ambiguous picture", "empty picture", "duplicate id", "bad field" or "bad row".
        what: What is wrong.
        do: What to do.
    """

    file: str
    row: int | str
    kind: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row}: {self.what}; {self.do}"


class RowError(ValueError):
    """A row that gives no example; readers raise it, and it becomes a :class:`Problem`."""

    def __init__(self, what: str, do: str, kind: str = "bad field") -> None:
        super().__init__(f"{what}; {do}")
        self.what, self.do, self.kind = what, do, kind


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        file: Name of the file.
        number: As :attr:`Problem.row`.
        values: By column.
        cells: Sources of the pictures that are inside of the row, by column.
    """

    file: str
    number: int | str
    values: Mapping[str, Any]
    cells: Mapping[str, PictureSource] = field(default_factory=dict)

    def text(self, *columns: str) -> str:
        """The text in the first of the columns that there is; numbers are written out.

        Raises:
            RowError: If it is empty, no text, or not UTF-8.
        """
        text = self.optional(*columns)
        if text is None:
            raise RowError(f"{columns[0]!r} must be a text, got none", "fill it in")
        return text

    def optional(self, *columns: str) -> str | None:
        """As :meth:`text`, None where it is empty or there is no such column."""
        value = next((self.values[c] for c in columns if c in self.values), None)
        if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
            raise RowError(f"{columns[0]!r} must be a text, got {type(value).__name__} {value!r:.40}", "write a text")
        if value is None or value != value:  # NaN stands for nothing
            return None
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(f"{columns[0]!r} must be UTF-8 text, got other bytes", "save the file as UTF-8") from None
        return text if text.strip() else None

    def texts(self, column: str, key: str = "") -> list[str]:
        """The texts of a list, or of the objects in it under a key; numbers are written out. Empty where there is no such column.

        Raises:
            RowError: If it is no list, or one of them is missing or no text.
        """
        given = self.values.get(column)
        if given is None:
            return []
        if not isinstance(given, list):
            raise RowError(f"{column!r} must be a list, got {type(given).__name__}", "download the file again")
        found = []
        for place, one in enumerate(given, 1):
            value = one.get(key) if key and isinstance(one, dict) else one
            text = value if value == "" else Row(self.file, self.number, {column: value}).optional(column)
            if text is None:
                raise RowError(
                    f"{column!r} must hold texts, got {value!r:.20} as number {place}", "fill it in, or take it out"
                )
            found.append(text)
        return found

    def number_in(self, column: str) -> int:
        """A whole number.

        Raises:
            RowError: If it is none.
        """
        text = self.text(column)
        try:
            return int(text)
        except ValueError:
            raise RowError(f"{column!r} must be a whole number, got {text!r:.40}", "write one") from None


@dataclass
class Table:
    """A table as it is read.

    Attributes:
        name: Of the file.
        columns: Their names, in order; those of all rows of a JSON file.
        rows: What could be read.
        problems: What could not.
    """

    name: str
    columns: tuple[str, ...]
    rows: list[Row]
    problems: list[Problem]

    @property
    def parts(self) -> list[Row | Problem]:
        """Problems, then rows."""
        return [*self.problems, *self.rows]
