"""Which tables of a folder are those of a benchmark, and their columns by the names that the benchmark gives them.

``kind`` is a reader (:class:`~care_lens.data.benchmarks.reader.Benchmark`), the class or an object of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from care_lens.data.benchmarks.places import BenchmarkError, BenchmarkNotFoundError, Place
from care_lens.data.benchmarks.rows import Table
from care_lens.data.benchmarks.tables import columns_of


def datasets_of(root: Any, name: str) -> dict[str, Any]:
    """Datasets by name; those of a mapping of mappings are named "outer/inner"."""
    if isinstance(root, Mapping):
        return {
            full: part
            for key, value in root.items()
            for full, part in datasets_of(value, f"{name}/{key}" if name else str(key)).items()
        }
    return {name or str(getattr(root, "split", None) or "dataset"): root}


def tables_of(kind: Any, place: Place) -> list[str]:
    """Names of the tables of a benchmark in a place; tables of other names are told by their columns.

    Raises:
        BenchmarkNotFoundError: If there is none.
        BenchmarkError: If there are several and the benchmark has one.
    """
    names = place.matching(*kind.files)
    if not names:
        names = [n for n in place.matching("*.csv|*.tsv|*.parquet") if not lacking(kind, n, columns_of(place, n))]
    if not names:
        raise BenchmarkNotFoundError(
            f"{place.root} must hold {' or '.join(kind.files)} of {title_of(kind)}, got none of them among its {len(place.files)} files; "
            "give the folder that holds them"
        )
    if len(names) > 1 and not kind.several:
        shallow = [n for n in names if n.count("/") == names[0].count("/")]
        if len(shallow) > 1:
            raise BenchmarkError(
                f"{place.root} must hold one table of {title_of(kind)}, got {len(names)}, {names[:4]}; give one of them as root, and the "
                "folder of the pictures as pictures="
            )
        names = shallow
    return names


def lacking(kind: Any, name: str, columns: Iterable[str]) -> list[str]:
    """Columns that a table of the benchmark has and this one lacks, and those of another benchmark that it has."""
    have = {_tight(column) for column in columns}
    return [c for c in kind.columns_in(name) if _tight(c) not in have] + [c for c in kind.other if _tight(c) in have]


def renamed(kind: Any, table: Table) -> Table:
    """The table with its columns named as the benchmark names them; those of another case are taken for them."""
    wanted = kind.columns_in(table.name)
    missing = [c for c in wanted if _tight(c) not in {_tight(d) for d in table.columns}]
    if missing and (table.columns or not table.problems):
        raise BenchmarkError(
            f"{table.name} must have the columns {[*wanted]} of {title_of(kind)}, got {[*table.columns][:12]} without {missing}; "
            "is it a table of another benchmark?"
        )
    known = {_tight(c): c for c in (*wanted, *kind.optional)}
    names = {c: known[_tight(c)] for c in table.columns if c not in known.values() and _tight(c) in known}
    if not names:
        return table
    rows = [
        replace(
            row,
            values={names.get(c, c): v for c, v in row.values.items()},
            cells={names.get(c, c): v for c, v in row.cells.items()},
        )
        for row in table.rows
    ]
    return Table(table.name, tuple(names.get(c, c) for c in table.columns), rows, table.problems)


def title_of(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else type(kind).__name__


def _tight(column: str) -> str:
    return column.strip().casefold()
