"""Files of a benchmark, in a folder or in a zip, and pictures found by the names that tables give them.

Public files are named on one system and unpacked on another. :meth:`Place.find` therefore finds a file by the name that a table gives it
though the case differs, the separators are those of Windows, the path is absolute, or a folder stands around it, and says which of
these it was. What fits two files is refused, and nothing is found by its last name alone where the table names a folder.

    place = Place.of("JailBreakV_28K.zip")
    place.find("figstep\\\\Query_1.PNG").name  # 'JailBreakV_28K/figstep/query_1.png'
"""

import copy
import functools
import logging
import os
import posixpath
import re
import threading
import unicodedata
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from care_lens.core.errors import CareLensError
from care_lens.core.pictures import PictureError
from care_lens.core.require import require_path

log = logging.getLogger(__name__)

_JUNK = ("__macosx", ".git", ".cache", "__pycache__", ".ds_store", "thumbs.db", "desktop.ini")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif")


class BenchmarkError(CareLensError, ValueError):
    """A folder or file is not of the benchmark, or not as the benchmark is published; the message names the file and what to do."""


class BenchmarkNotFoundError(BenchmarkError, FileNotFoundError):
    """There is no such folder or file, or the benchmark's own files are not in it."""


@dataclass(frozen=True)
class StoredFile:
    """A file of a benchmark: on the disk, or a member of a zip. It is a :class:`~care_lens.core.pictures.PictureSource`.

    Attributes:
        path: Of the file, or of the zip.
        member: Its name in the zip, or None.
    """

    path: Path
    member: str | None = None

    def read(self) -> bytes:
        """All its bytes.

        Raises:
            PictureError: If they cannot be read out of the zip.
        """
        if self.member is None:
            return self.path.read_bytes()
        try:
            archive, lock = _archive(self.path, self.stamp(), os.getpid())
            with lock:
                return archive.read(self.member)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, KeyError, EOFError, zlib.error) as error:
            raise PictureError(
                f"{self} must be a member that can be unpacked, got {error}; make the zip again"
            ) from None

    def stamp(self) -> tuple[int, int]:
        """Size and time of the file or zip."""
        about = self.path.stat()
        return about.st_size, about.st_mtime_ns

    def size(self) -> int:
        """Its size in bytes, unpacked."""
        if self.member is None:
            return self.path.stat().st_size
        return _archive(self.path, self.stamp(), os.getpid())[0].getinfo(self.member).file_size

    def __str__(self) -> str:
        return self.path.name if self.member is None else f"{self.path.name}!{self.member}"


@functools.lru_cache(maxsize=4)
def _archive(path: Path, stamp: tuple[int, int], process: int) -> tuple[zipfile.ZipFile, threading.Lock]:
    """An open zip. A forked process opens its own, since two processes share the place in one open file."""
    del stamp, process
    return zipfile.ZipFile(path), threading.Lock()


@dataclass(frozen=True)
class Found:
    """A file that a name means.

    Attributes:
        name: Its name in the place.
        file: The file.
        how: "" where the name is right as it stands; else what differs: "case", "separators", "absolute path".
        asked: The name that was asked for.
    """

    name: str
    file: StoredFile
    how: str = ""
    asked: str = ""


class NotThereError(CareLensError, LookupError):
    """No file has the name, or several have it.

    Attributes:
        kind: "missing picture" or "ambiguous picture".
        what: What is wrong.
        do: What to do.
    """

    def __init__(self, kind: str, what: str, do: str) -> None:
        super().__init__(f"{what}; {do}")
        self.kind, self.what, self.do = kind, what, do


class Place:
    """The files under a folder or in a zip; zips that lie in the folder are looked into as well.

    Args:
        root: The folder or zip.

    Attributes:
        root: As given.
        files: Files by name, relative to the root, with "/" between folders. A zip in a folder counts as the folder in which it lies.
        broken: Names of zips in the folder that cannot be opened.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, StoredFile] = {}
        self.broken: list[str] = []
        if root.is_dir():
            for name, file in _walked(root):
                self.files[name] = file
            for name in [n for n in self.files if n.lower().endswith(".zip")]:
                folder = posixpath.dirname(name)
                try:
                    members = [*_members(self.files[name].path)]
                except BenchmarkError as error:  # what is in it may not be needed
                    log.warning("%s", error)
                    self.broken.append(name)
                    continue
                for inner, file in members:
                    self.files.setdefault(posixpath.join(folder, inner), file)
        elif zipfile.is_zipfile(root):
            self.files = dict(_members(root))
        else:
            raise BenchmarkError(f"{root} must be a folder or a zip, got another file; give the folder that it lies in")
        self._index()

    def _index(self) -> None:
        self._tails: dict[str, list[str]] = defaultdict(list)
        self._stems: dict[str, str] = {}
        for name in self.files:
            self._tails[_key(posixpath.basename(name))].append(name)
            if name.lower().endswith(_PICTURES):
                self._stems.setdefault(_key(PurePosixPath(name).stem), name)

    @classmethod
    def of(cls, root: str | Path) -> "Place":
        """The place at a path.

        Raises:
            BenchmarkNotFoundError: If there is nothing.
            BenchmarkError: If it is neither a folder nor a zip.
        """
        path = require_path(root, "root").absolute()
        if not path.exists():
            raise BenchmarkNotFoundError(
                f"root must be a folder or file of the benchmark, got {path}, which is not there"
            )
        return cls(path)

    def pictures(self) -> list[str]:
        """Names of the files that are pictures by their ending."""
        return [name for name in self.files if name.lower().endswith(_PICTURES)]

    def matching(self, *patterns: str) -> list[str]:
        """Names whose end fits a pattern as of a shell ("question/safebench.csv", "*.parquet"), "a.csv|b.csv"), case aside; those of the first
        pattern that fits any, shallow ones first."""
        for pattern in patterns:
            wanted = _key(pattern).split("|")
            hits = [n for n in self.files if any(_fits(_key(n), one) for one in wanted)]
            if hits:
                return sorted(hits, key=lambda n: (n.count("/"), self.files[n].member is not None, natural(n)))
        return []

    def joined(self, other: "Place") -> "Place":
        """This place with the files of another one."""
        both = copy.copy(self)
        both.files = {**other.files, **self.files}
        both._index()
        return both

    def find_any(self, names: Sequence[str], *, stem: bool = False) -> Found:
        """The first of the names that there is.

        Raises:
            NotThereError: As :meth:`find` of the first one, if there is none.
        """
        errors: list[NotThereError] = []
        for name in names:
            try:
                return self.find_stem(name) if stem else self.find(name)
            except NotThereError as error:
                if error.kind == "ambiguous picture":
                    raise
                errors.append(error)
        raise errors[0]

    def find(self, name: str) -> Found:
        """The file that a table means by a name.

        Raises:
            NotThereError: If there is none, or several fit equally well.
        """
        if name in self.files:
            return Found(name, self.files[name], "", name)
        tidy = name.strip().replace("\\", "/")
        drive = re.match(r"[A-Za-z]:", tidy)
        absolute = tidy.startswith("/") or drive is not None
        tidy = posixpath.normpath(tidy[2:] if drive else tidy).lstrip("/")
        parts = [part for part in tidy.split("/") if part not in ("", ".", "..")]
        if not parts:
            raise NotThereError("missing picture", f"{name!r} is no name of a file", "name the picture")
        wanted = [_key(part) for part in parts]
        candidates = self._tails.get(wanted[-1], [])
        for depth in range(len(parts), 0, -1) if absolute else (len(parts),):
            hits = [n for n in candidates if [_key(p) for p in n.split("/")[-depth:]] == wanted[-depth:]]
            if hits:
                return self._best(name, "/".join(parts[-depth:]), hits, absolute)
        raise NotThereError("missing picture", f"no file {name!r}", self._advice(parts))

    def find_stem(self, name: str) -> Found:
        """As :meth:`find`, where the table may leave the ending of the picture's name out."""
        try:
            return self.find(name)
        except NotThereError as error:
            for ending in _PICTURES if error.kind == "missing picture" else ():
                if f"{_key(posixpath.basename(name))}{ending}" in self._tails:
                    return self.find(f"{name}{ending}")
            raise

    def _best(self, name: str, tail: str, hits: Sequence[str], absolute: bool) -> Found:
        """The hit that fits best: right case before another, the whole path before a part of it, files before members of zips."""

        def rank(hit: str) -> tuple[bool, bool]:
            return not (hit == tail or hit.endswith(f"/{tail}")), len(hit) != len(tail)

        best = min(map(rank, hits))
        left = [hit for hit in hits if rank(hit) == best]
        unpacked = [hit for hit in left if self.files[hit].member is None]
        left = unpacked or left
        if len(left) > 1:
            raise NotThereError(
                "ambiguous picture",
                f"{name!r} fits {len(left)} files, {sorted(left)[:3]}",
                "leave one of them in the folder",
            )
        how = "absolute path" if absolute else "separators" if "\\" in name else ""
        return Found(left[0], self.files[left[0]], "case" if best[0] else how, name)

    def _advice(self, parts: Sequence[str]) -> str:
        if near := self._stems.get(_key(PurePosixPath(parts[-1]).stem)):
            return f"there is {near!r}: see whether it is the one, and rename or move it"
        return f"put it under {self.root.name}, or the zip with the pictures"


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A key that sorts numbers in names by their value: image_2 before image_10."""
    parts = re.split(r"([0-9]+)", name)  # every second one is a number
    return tuple((i % 2 == 1, int(part) if i % 2 else 0, part) for i, part in enumerate(parts))


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _fits(name: str, pattern: str) -> bool:
    depth = pattern.count("/") + 1
    return fnmatchcase("/".join(name.split("/")[-depth:]), pattern)


def _junk(parts: Sequence[str]) -> bool:
    return any(part.lower() in _JUNK or part.startswith("._") for part in parts)


def _walked(root: Path) -> Iterator[tuple[str, StoredFile]]:
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not _junk([f]))
        for name in sorted(names):
            if not _junk([name]):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), StoredFile(path)


def _members(path: Path) -> Iterator[tuple[str, StoredFile]]:
    try:
        archive = _archive(path, StoredFile(path).stamp(), os.getpid())[0]
    except (zipfile.BadZipFile, OSError) as error:
        raise BenchmarkError(f"{path} must be a zip, got {error}; download it again") from None
    for info in archive.infolist():
        name = info.filename.replace("\\", "/").lstrip("/")
        if not info.is_dir() and name and not _junk(name.split("/")):
            yield name, StoredFile(path, info.filename)
