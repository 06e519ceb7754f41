"""Results on disk: a stopped run goes on where it stopped, and never mixes results of different settings."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from care_lens.core import FrameResult
from care_lens.core.errors import ArtifactError
from care_lens.core.files import in_use, load_artifact, packed, save_artifact, swept, unpacked
from care_lens.core.identity import digest, repair_fingerprint
from care_lens.core.journal import differing
from care_lens.core.outcome import Repair

log = logging.getLogger(__name__)

AnyResult = TypeVar("AnyResult", bound=FrameResult)

_KIND, _RECORD = "settings of a run", "record of a run"


@runtime_checkable
class Kept(Repair, Protocol):
    """A defence that can be saved, and that its class can load."""

    def save(self, directory: Path) -> object:
        """Write its files into a folder."""
        ...


AnyKept = TypeVar("AnyKept", bound=Kept)


class Stage:
    """A folder of results of one run, which one process holds at a time.

    Use it in a ``with`` block, or call :meth:`close`: until then another process that opens the folder is told who holds it.

    Args:
        directory: made if need be.
        settings: whatever the results depend on, JSON-able.

    Attributes:
        run: digest of the settings; every result says which run it is of.

    Raises:
        ArtifactError: if the folder holds results of other settings, or files without settings, or its settings are damaged.
        InUseError: if another process holds it.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.seconds: dict[str, float] = {}
        ours = json.loads(json.dumps(settings, default=str))
        self.run = digest(ours)
        self._held = ExitStack()
        self._held.enter_context(in_use(directory))
        try:
            self._check(ours)
            swept(directory)
        except BaseException:
            self._held.close()
            raise

    def _check(self, ours: dict[str, Any]) -> None:
        path = self.directory / "settings.json"
        if not path.exists():
            if found := sorted(part.name for part in self.directory.glob("*") if not part.name.startswith(".")):
                raise ArtifactError(
                    f"{self.directory} must be empty or hold {path.name} of the same settings, got {found[0]} and none; give another folder "
                    f"(--out; OUT= of make) or remove {self.directory.parent}"
                )
            save_artifact(self.directory, "settings", kind=_KIND, schema=1, data={}, content={"of": ours})
            return
        theirs = load_artifact(self.directory, "settings", kind=_KIND, schema=1)[1]["of"]
        if differ := differing(ours, theirs):
            raise ArtifactError(
                f"{self.directory.parent} must be empty or hold a run of the same settings, got others in {differ}; give another folder (--out; "
                f"OUT= of make) or remove {self.directory.parent}"
            )

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._held.close()

    def context(self, name: str) -> dict[str, str]:
        """What a file of this run says of itself, so that one that was renamed or copied from elsewhere is known."""
        return {"run": self.run, "name": name}

    def checkpoint(self, name: str) -> Path:
        """Where a long step keeps what it has finished of a result."""
        return self.directory / f"{name}.cells.jsonl"

    def result(self, kind: type[AnyResult], name: str, make: Callable[[], AnyResult]) -> AnyResult:
        """The saved result, or a new one, saved at once; always as it is read from its files, so that a run that goes on and one
        that was never stopped work on with the same.

        Raises:
            ArtifactError: if its files are damaged, or of another run or result.
        """
        if self.has(name):
            if name not in self.seconds:  # this run has not made it
                log.info("%s: resumed", name)
        else:
            with self._timed(name):
                make().save(self.directory, name, context=self.context(name))
        return kind.load(self.directory, name, context=self.context(name))

    def record(self, name: str, make: Callable[[], Any]) -> Any:
        """A saved JSON-able value, or a new one, saved at once; as it is read from its file.

        Raises:
            ArtifactError: if its file is damaged, or of another run or value.
        """
        if not self.has(name):
            with self._timed(name):
                self._write(name, make())
        return self._read(name)

    def defence(self, name: str, make: Callable[[], AnyKept], *, load: Callable[[Path], AnyKept]) -> AnyKept:
        """A saved defence, or a new one, saved at once in the folder of its name; as it is read from there.

        Args:
            name: of the folder and of the record beside it, which says whose it is.
            make: fits it.
            load: reads it from a folder.

        Raises:
            ArtifactError: if its files are damaged, missing, or of another run or defence.
        """
        folder = self.directory / name
        if not self.has(name):
            with self._timed(name):
                make().save(folder)
                self._write(name, repair_fingerprint(load(folder)))
        again = f"remove {folder}.json, and it is made again"
        known = self._read(name)
        try:
            found = load(folder)
        except FileNotFoundError as error:
            raise ArtifactError(f"the files of {folder} must be there, {error.filename} is not; {again}") from error
        if repair_fingerprint(found) != known:
            raise ArtifactError(f"{folder} must hold the defence that was kept there, got another; {again}")
        return found

    def has(self, name: str) -> bool:
        """Whether a result, record or defence of this name is kept.

        Args:
            name: as it is given to `result`, `record` or `defence`.
        """
        return (self.directory / f"{name}.json").exists()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        log.info("%s: %.1f s", name, self.seconds[name])

    def _write(self, name: str, value: Any) -> None:
        content = {"context": self.context(name), "value": packed(value)}
        save_artifact(self.directory, name, kind=_RECORD, schema=1, data={}, content=content)

    def _read(self, name: str) -> Any:
        held = load_artifact(self.directory, name, kind=_RECORD, schema=1)[1]
        if held["context"] != self.context(name):
            raise ArtifactError(
                f"{self.directory / f'{name}.json'} must be of this run, got that of another; remove it, and it is made again"
            )
        return unpacked(held["value"])
