"""Saved repairs and defences as a command line names them: folders, with names before them."""

from collections.abc import Sequence
from pathlib import Path

from care_lens.core.errors import CareLensError
from care_lens.core.outcome import Repair
from care_lens.defences import load_defence

UNDEFENDED = "none"


class SavedDefenceError(CareLensError, ValueError):
    """A folder holds no defence, or two defences have one name."""


def read_defence(text: str) -> tuple[str, Repair]:
    """A saved repair or defence, as PATH or NAME=PATH; on the CPU.

    Args:
        text: The folder, which names the defence unless a name stands before it.

    Returns:
        Its name and the defence.

    Raises:
        SavedDefenceError: If the folder holds none.
    """
    name, equals, path = text.partition("=")
    if not equals or Path(text).is_dir():  # the path itself may hold a "="
        name, path = Path(text).resolve().name, text
    try:
        return name.strip(), load_defence(path)
    except FileNotFoundError:
        raise SavedDefenceError(
            f"a defence must be a folder with repair.json or defence.json, as `care-lens fit` and .save() write them, got {path}"
        ) from None


def read_defences(texts: Sequence[str]) -> dict[str, Repair]:
    """Saved repairs and defences by name.

    Args:
        texts: Each as :func:`read_defence` takes it.

    Raises:
        SavedDefenceError: If a folder holds none, or names are not different ("none" is the undefended model's).
    """
    read = [read_defence(text) for text in texts]
    names = [name for name, _ in read]
    if len({*names, UNDEFENDED}) <= len(names) or "" in names:
        raise SavedDefenceError(
            f"defences must have different names, {UNDEFENDED!r} not among them, got {names}; give NAME=PATH"
        )
    return dict(read)
