"""How objects introduce themselves in a terminal and in a notebook: a title and a few lines, never the numbers of a tensor.

class Held(ShortRepr):
    def shown(self):
        return "Held", {"rows": "3"}
"""

import dataclasses
import textwrap
from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd
from torch import Tensor

WIDEST = 120
"""Characters of a line, at most."""

_LEFT = 'style="text-align:left"'


def as_text(title: str, rows: Mapping[str, str], *, widest: int = WIDEST) -> str:
    """The title, then an aligned line for each heading; longer lines and titles are cut.

    Args:
        title: The first line.
        rows: Heading to value; those without a value are left out.
        widest: Characters of a line.
    """
    kept = {one_line(heading): one_line(value) for heading, value in rows.items() if value}
    wide = max(map(len, kept), default=0)
    lines = [one_line(title), *(f"  {heading:<{wide}}  {value}" for heading, value in kept.items())]
    return "\n".join(cut(line, widest) for line in lines)


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """A two-column table, everything in it escaped."""
    cells = "".join(
        f"<tr><th {_LEFT}>{escape(heading)}</th><td {_LEFT}>{escape(value)}</td></tr>"
        for heading, value in rows.items()
        if value
    )
    return f"<table><caption {_LEFT}><b>{escape(title)}</b></caption><tbody>{cells}</tbody></table>"


def cut(text: str, widest: int = WIDEST) -> str:
    """The text, or its beginning where it is longer."""
    return text if len(text) <= widest else text[: widest - 3] + "..."


def broken(line: str, widest: int = 140) -> list[str]:
    """A line as lines of at most that width, broken between words; those after the first are set in."""
    if len(line) <= widest:
        return [line]
    inset = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, widest, subsequent_indent=inset, break_on_hyphens=False)


def one_line(text: str) -> str:
    """The text without line breaks and other control characters, so that a name cannot make a line of its own."""
    return "".join(char if char.isprintable() else " " for char in text)


def listed(names: Any, *, most: int = 4) -> str:
    """The first names, and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def told_column(column: pd.Series, *, most: int = 6) -> str:
    """The values that stand in a column of a table: the smallest and the largest of numbers, the first few of names."""
    values = [value for value in column.dropna().unique().tolist() if value != ""]
    if values and all(isinstance(value, (int, float)) for value in values):
        low, high = min(values), max(values)
        return f"{low:g}" if low == high else f"{low:g} to {high:g}"
    return listed(values, most=most)


def memory(n_bytes: int) -> str:
    """A number of bytes in the unit that fits."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{n_bytes} B" if size == n_bytes else f"{size:.1f} {unit}"


def brief(value: Any) -> str:
    """A value in a few characters: tensors, frames and what holds many things by their size alone."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, pd.DataFrame):
        return f"table of {len(value)} rows"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return cut(repr(value), 40)
    if value is None or isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{len(value)} entries}}"
    if isinstance(value, (tuple, list, set, frozenset)):
        simple = len(value) <= 4 and all(isinstance(item, (bool, int, float, str)) for item in value)
        return f"({', '.join(map(brief, value))})" if simple else f"({len(value)} items)"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        text = str(value) if type(value).__str__ is not object.__str__ else ""
        return text if text and "\n" not in text and len(text) <= 40 else type(value).__name__
    return type(value).__name__


class ShortRepr:
    """Mix-in: a short ``repr`` and its form for notebooks, for classes that hold tensors.

    Subclasses have it too, also those that are made dataclasses, whose decorator would write a ``repr`` of all numbers.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):
            type.__setattr__(cls, "__repr__", cls.__repr__)

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its title, and what is said of it by heading: here the class and its fields."""
        fields: Any = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        return type(self).__name__, {field.name: brief(getattr(self, field.name, None)) for field in fields}

    def __repr__(self) -> str:
        title, rows = self.shown()
        inside = ", ".join(f"{name}={value}" for name, value in rows.items())
        return cut(one_line(f"{title}({inside})"), 3 * WIDEST)

    def _repr_html_(self) -> str:
        return as_html(*self.shown())


class LinesRepr(ShortRepr):
    """The same, as a title and a line for each heading."""

    def __repr__(self) -> str:
        return as_text(*self.shown())
