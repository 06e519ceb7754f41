"""Answers in an SQLite file: opened without reading it, looked up by key, safe against kills and other processes.

A transaction is one batch, on the disk before it returns; SQLite rolls one that was cut off back at the next opening, and lets one process
write at a time. Each row has a sum, so that a row that was changed by anything else is an error and not an answer.
"""

import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from care_lens.core.errors import ArtifactError
from care_lens.core.files import sha256

MAGIC = b"SQLite format 3\x00"
SUFFIXES = (".sqlite", ".sqlite3", ".db")
_APPLICATION, _SCHEMA = 0x43415245, 1
_WAIT = 60.0
_CREATE = """
CREATE TABLE settings (digest TEXT PRIMARY KEY, value TEXT NOT NULL, sum TEXT NOT NULL);
CREATE TABLE answers (
    place INTEGER PRIMARY KEY, defence TEXT NOT NULL, channel TEXT NOT NULL, id TEXT NOT NULL, seed INTEGER NOT NULL,
    settings TEXT NOT NULL, example TEXT NOT NULL, row TEXT NOT NULL, sum TEXT NOT NULL,
    UNIQUE (settings, example, seed, defence, channel, id)
);
"""
_KEY = "defence, channel, id, seed, settings, example"

Key = tuple[str, str, str, int, str, str]


class AnswerTable:
    """Rows by key, in a file.

    Args:
        path: The file; it and its folder are made at the first write.

    Raises:
        ArtifactError: If the file is no such table, or of a later version; it is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: tuple[int, sqlite3.Connection] | None = None
        if path.exists() and path.stat().st_size:
            self._connection()

    def __len__(self) -> int:
        return self._rows("SELECT COUNT(*) FROM answers")[0][0] if self._there() else 0

    def get(self, key: Key) -> dict[str, Any] | None:
        """The row of a key, or None."""
        where = " AND ".join(f"{name} = ?" for name in _KEY.split(", "))
        found = self._rows(f"SELECT {_KEY}, row, sum FROM answers WHERE {where}", key) if self._there() else []
        return self._checked(found[0]) if found else None

    def of_request(self, settings: str, example: str, seed: int) -> list[dict[str, Any]]:
        """The rows of what an example gives the model, under settings, in the order of their first writing."""
        query = f"SELECT {_KEY}, row, sum FROM answers WHERE settings = ? AND example = ? AND seed = ? ORDER BY place"
        found = self._rows(query, (settings, example, seed)) if self._there() else []
        return [self._checked(row) for row in found]

    def rows(self, settings: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """All rows, or those under some settings, in the order of their first writing."""
        if not self._there():
            return
        for row in self._rows(f"SELECT {_KEY}, row, sum FROM answers ORDER BY place"):
            if settings is None or row[4] in settings:
                yield self._checked(row)

    def settings(self) -> dict[str, Any]:
        """The settings by their digests."""
        found = self._rows("SELECT digest, value, sum FROM settings ORDER BY rowid") if self._there() else []
        for name, value, total in found:
            if _sum((name,), value) != total:
                raise self._damaged(f"settings {name}")
        return {name: json.loads(value) for name, value, _ in found}

    def write(self, answers: Sequence[tuple[Key, dict[str, Any]]], settings: dict[str, Any] | None = None) -> None:
        """Add rows, in one transaction; one whose key is there takes its place.

        Args:
            answers: Keys and JSON-able rows.
            settings: Settings by their digests.

        Raises:
            ArtifactError: If the file is damaged.
            OSError: If it cannot be written to: the disk is full, or another process has been writing for a minute.
        """
        texts = [(key, json.dumps(row)) for key, row in answers]
        kept = [(name, json.dumps(value)) for name, value in (settings or {}).items()]
        connection = self._connection()
        try:
            with connection:  # one transaction
                connection.execute("BEGIN IMMEDIATE")
                connection.executemany(
                    "INSERT OR IGNORE INTO settings VALUES (?, ?, ?)",
                    [(name, value, _sum((name,), value)) for name, value in kept],
                )
                connection.executemany(
                    f"INSERT INTO answers ({_KEY}, row, sum) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
                    f"ON CONFLICT ({_KEY}) DO UPDATE SET row = excluded.row, sum = excluded.sum",
                    [(*key, text, _sum(key, text)) for key, text in texts],
                )
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path} must be writable, got: {error}; what stood in it still stands") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def close(self) -> None:
        """Let go of the file; it is opened again when it is needed."""
        if self._open is not None and self._open[0] == os.getpid():
            self._open[1].close()
        self._open = None

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()

    def _there(self) -> bool:
        return self._open is not None or self.path.exists()

    def _connection(self) -> sqlite3.Connection:
        """The connection of this process: one that came over a fork must not be used."""
        if self._open is not None and self._open[0] == os.getpid():
            return self._open[1]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=_WAIT, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            self._require(connection)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise self._damaged(str(error)) from error
        except BaseException:
            connection.close()
            raise
        self._open = (os.getpid(), connection)
        return connection

    def _require(self, connection: sqlite3.Connection) -> None:
        """Make the tables in an empty file; refuse one that is not ours."""
        with connection:
            connection.execute("BEGIN")
            found = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if found == [_APPLICATION, _SCHEMA]:
            return
        if found[0] == _APPLICATION:
            raise ArtifactError(
                f"{self.path} must be of schema {_SCHEMA}, got {found[1]}; it comes from a newer care_lens: update it"
            )
        if tables or found != [0, 0]:
            raise ArtifactError(
                f"{self.path} must be a store of answers, got another SQLite file, which is left as it is; use another path"
            )
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                for statement in filter(str.strip, _CREATE.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {_SCHEMA}")

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            return self._connection().execute(query, values).fetchall()
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path} must be readable, got: {error}") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _checked(self, row: Sequence[Any]) -> dict[str, Any]:
        *key, text, total = row
        if _sum(key, text) != total:
            raise self._damaged(f"the answer to {key[2]!r} in channel {key[1]!r} under {key[0]!r}")
        return json.loads(text)

    def _damaged(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} must be as it was written, but it is damaged ({what}); take a copy of an earlier state, or remove the file, "
            "and what it held is made again"
        )


def _sum(key: Sequence[Any], text: str) -> str:
    return sha256(json.dumps([*key, text]).encode())[:16]
