"""A journal: JSON lines that only grow, so that what was finished outlives a kill.

The first line says what the file is. Every later line is one row and ends in a sum over the row and all lines before it, so that a
flipped bit, a line taken out, moved or copied is an :class:`~care_lens.core.errors.ArtifactError` that names the line. A last line
without its line end was cut off by a kill: it is dropped, and the next row is written in its place. Nothing else in the file is ever
written again, and a file that is no journal of the same kind is never written to. Several processes may append to one journal: each
takes over the others' rows before it adds its own.

    journal = Journal(path, kind="cells", about={"settings": settings})
    held = journal.read()  # rows of earlier runs
    journal.append([{"cell": "a", "value": 1.0}])
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from care_lens.core.errors import ArtifactError
from care_lens.core.files import in_use, sha256, write_whole

Row = dict[str, Any]

_SUM = re.compile(rb', "sum": "([0-9a-f]{16})"\}$')
_WAIT = 60.0


class Journal:
    """Rows in a file that only grows.

    Args:
        path: The file. It and its folder are made by the first append.
        kind: What the journal is of; a file of another kind is refused.
        about: JSON-able; stands in the first line.
        check: Called with what stands in the first line of a file that is there; raises if it is not acceptable. None: it must be
            equal to ``about``.
        older: Called with the content of a file that is no journal; returns its rows if it is an older layout of the same kind, else
            None. Such a file becomes a journal, in one step, at the first append.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        kind: str,
        about: Mapping[str, Any] | None = None,
        check: Callable[[Row], None] | None = None,
        older: Callable[[bytes], list[Row] | None] | None = None,
    ) -> None:
        self.path, self._kind, self._check, self._older = Path(path), kind, check, older
        self._about: Row = json.loads(json.dumps(dict(about or {})))
        self._end, self._last = 0, ""
        self._count, self._converted = 1, list[Row]()

    def read(self) -> list[Row]:
        """The rows that this object has not read or written yet.

        Raises:
            ArtifactError: If the file is no such journal, or a line is damaged; whatever ``check`` raises.
        """
        if not self.path.exists():
            if self._end:
                raise ArtifactError(f"{self.path} must stay where it is while it is in use, but it is gone")
            return []
        with self.path.open("rb") as file:
            file.seek(self._end)
            content = file.read()
            if file.tell() < self._end:
                raise ArtifactError(
                    f"{self.path} must only grow while it is in use, but it is shorter now; open it again"
                )
        if not self._end and content:
            if self._converted or not content.startswith(b'{"journal": '):
                return self._convert(content)
            content = self._open(content)
        rows = []
        for line in content.split(b"\n")[:-1]:
            rows.append(self._row(line))
            self._end += len(line) + 1
        return rows

    def append(self, rows: Iterable[Row]) -> list[Row]:
        """Add rows, in one write that reaches the disk before this returns.

        Args:
            rows: JSON-able dictionaries that are not empty.

        Returns:
            Rows that another process appended since this object read last; they stand before the new ones.

        Raises:
            ArtifactError: As :meth:`read`.
            InUseError: If another process has been writing for a minute.
            OSError: If the disk is full; what stood in the file still stands.
        """
        rows = list(rows)
        with in_use(self.path, wait=_WAIT):
            others = self.read()
            before = (self._end, self._last, self._count)
            if self._end:
                content = b"".join(map(self._line, rows))
                try:
                    if content:
                        self._write(before[0], content)
                except BaseException:
                    self._end, self._last, self._count = before
                    raise
            else:
                head = self._head()
                self._last, self._count = sha256(head)[:16], 1
                content = head + b"".join(map(self._line, [*self._converted, *rows]))
                try:
                    write_whole(self.path, content)
                except BaseException:
                    self._end, self._last, self._count = before
                    raise
                self._converted = []
            self._end += len(content)
        return others

    def _write(self, end: int, content: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(end)
            file.truncate()
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):
                    file.truncate(end)
                raise

    def _head(self) -> bytes:
        return json.dumps({"journal": self._kind, "schema": 1, "about": self._about}).encode() + b"\n"

    def _line(self, row: Row) -> bytes:
        text = json.dumps(row).encode()
        self._last = sha256(self._last.encode() + text)[:16]
        self._count += 1
        return text[:-1] + f', "sum": "{self._last}"}}\n'.encode()

    def _open(self, content: bytes) -> bytes:
        """Check the first line; the rest of the content."""
        head, end, rest = content.partition(b"\n")
        try:
            found = json.loads(head)
            kind, about = found["journal"], found["about"]
        except (ValueError, TypeError, KeyError):
            raise ArtifactError(
                f"the first line of {self.path} must say what the file is, got {head[:60]!r}; it is damaged: remove the file, or use another path"
            ) from None
        if kind != self._kind or not end:
            raise ArtifactError(f"{self.path} must be a journal of {self._kind}, got one of {kind}; use another path")
        if about != self._about:
            if self._check is None:
                differ = differing(self._about, about)
                raise ArtifactError(
                    f"{self.path} must be of the same settings, got others in {differ}; use another path"
                )
            self._check(about)
        self._last, self._end = sha256(head + end)[:16], len(head) + 1
        return rest

    def _convert(self, content: bytes) -> list[Row]:
        rows = None if self._older is None else self._older(content)
        if rows is None:
            raise ArtifactError(
                f"{self.path} must be a journal of {self._kind} as care_lens writes it, got another file, which is left as it is; use another path"
            )
        new = rows[len(self._converted) :]
        self._converted = rows
        return new

    def _row(self, line: bytes) -> Row:
        self._count += 1
        found = _SUM.search(line)
        text = b"" if found is None else line[: found.start()] + b"}"
        if found is None or sha256(self._last.encode() + text)[:16].encode() != found[1]:
            raise ArtifactError(
                f"line {self._count} of {self.path} must be as it was written, but its sum differs: the file is damaged there; "
                "take out that line and all after it, and what they held is made again"
            )
        self._last = found[1].decode()
        return json.loads(text)


def differing(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Names of what differs between two JSON-able values, "settings.seed" for what stands inside another."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        inside = [
            differing(ours.get(key), theirs.get(key), f"{name}.{key}" if name else str(key))
            for key in sorted({*ours, *theirs}, key=str)
        ]
        return [one for part in inside for one in part]
    return [] if _same(ours, theirs) else [name or "all of it"]


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Sequence) and not isinstance(ours, str) and isinstance(theirs, Sequence):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return ours == theirs or (ours != ours and theirs != theirs)
