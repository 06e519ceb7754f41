"""Results on disk: a stopped run goes on where it stopped, and never mixes results of different settings."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from care_lens.core import FrameResult

log = logging.getLogger(__name__)

AnyResult = TypeVar("AnyResult", bound=FrameResult)


class Stage:
    """A folder of results of one run.

    Args:
        directory: made if need be.
        settings: whatever the results depend on, JSON-able.

    Raises:
        ValueError: if the folder holds results of other settings.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.seconds: dict[str, float] = {}
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "settings.json"
        ours = json.loads(json.dumps(settings, default=str))
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            if theirs != ours:
                differ = sorted(_differing(ours, theirs))
                raise ValueError(
                    f"{directory.name} must be empty or of the same settings, got others in {differ}; choose another --out or "
                    "remove that folder"
                )
        path.write_text(json.dumps(ours, indent=1) + "\n", encoding="utf-8")

    def result(self, kind: type[AnyResult], name: str, make: Callable[[], AnyResult]) -> AnyResult:
        """The saved result, or a new one, saved at once."""
        if (self.directory / f"{name}.json").exists():
            log.info("%s: resumed", name)
            return kind.load(self.directory, name)
        start = time.monotonic()
        result = make()
        result.save(self.directory, name)
        self.seconds[name] = time.monotonic() - start
        log.info("%s: %.1f s", name, self.seconds[name])
        return result


def _differing(ours: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """Names of what differs, inside of settings too."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {*ours, *theirs}:
            yield from _differing(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield name
