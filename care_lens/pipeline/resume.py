"""Results on disk: a stopped run goes on where it stopped, and never mixes results of different settings."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from care_lens.core import FrameResult
from care_lens.core.errors import ArtifactError
from care_lens.core.files import in_use, load_artifact, save_artifact
from care_lens.core.identity import digest
from care_lens.core.journal import differing

log = logging.getLogger(__name__)

AnyResult = TypeVar("AnyResult", bound=FrameResult)

_KIND = "settings of a run"


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
        except BaseException:
            self._held.close()
            raise

    def _check(self, ours: dict[str, Any]) -> None:
        path = self.directory / "settings.json"
        if not path.exists():
            if found := sorted(part.name for part in self.directory.glob("*") if not part.name.startswith(".")):
                raise ArtifactError(
                    f"{self.directory.name} must be empty or hold {path.name} of the same settings, got {found[0]} and none; choose "
                    "another --out or remove that folder"
                )
            save_artifact(self.directory, "settings", kind=_KIND, schema=1, data={}, content={"of": ours})
            return
        theirs = load_artifact(self.directory, "settings", kind=_KIND, schema=1)[1]["of"]
        if differ := differing(ours, theirs):
            raise ArtifactError(
                f"{self.directory.name} must be empty or of the same settings, got others in {differ}; choose another --out or "
                "remove that folder"
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
        """The saved result, or a new one, saved at once.

        Raises:
            ArtifactError: if its files are damaged, or of another run or result.
        """
        if (self.directory / f"{name}.json").exists():
            found = kind.load(self.directory, name, context=self.context(name))
            log.info("%s: resumed", name)
            return found
        start = time.monotonic()
        result = make()
        result.save(self.directory, name, context=self.context(name))
        self.seconds[name] = time.monotonic() - start
        log.info("%s: %.1f s", name, self.seconds[name])
        return result
