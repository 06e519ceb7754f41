"""Files that are whole or not there, that say what they are, and that one process writes at a time.

An artifact is a set of data files and a manifest. The manifest is JSON and is written last: it holds the kind, the
schema, the sha256 of every data file and the sha256 of its own content. Loading checks all of them, so that a flipped bit, a
missing file, a file of another artifact or a save that was cut off between two files is an :class:`ArtifactError` and never
another number. The sums find damage, not malice: whoever can write the files can write the sums.

    save_artifact(folder, "effects", kind="EffectResult", schema=2, data={"csv": text.encode()}, content={"settings": {}})
    data, content = load_artifact(folder, "effects", kind="EffectResult", schema=2)
"""

import hashlib
import json
import math
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from care_lens.core.errors import ArtifactError, InUseError

if TYPE_CHECKING:
    from torch import Tensor

_SUM, _FILES = "manifest_sha256", "files"
_PART = re.compile(r"\..+\.[a-z0-9_]{8}\.part")
"""What :func:`write_whole` calls a file that it has not finished."""


def write_whole(path: str | Path, content: bytes | str) -> Path:
    """Write a file so that it holds the old content or the new one, whatever happens on the way.

    Args:
        path: The file; its folder is made if it does not exist. A link is followed, so that its target is replaced.
        content: Bytes, or text written as UTF-8 with the line ends it has.

    Returns:
        The path.

    Raises:
        OSError: If it cannot be written (a full disk, no permission); what stood there stands unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    target = path.resolve()
    handle, part = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    return path


def swept(directory: str | Path, *, inside: bool = True) -> list[Path]:
    """Remove what killed processes have left of files that :func:`write_whole` was writing: the unfinished copies, nothing else.

    Args:
        directory: A folder that this process holds (:func:`in_use`), so that nobody else is writing there; it need not exist.
        inside: Whether its folders are looked at too.

    Returns:
        What was removed.
    """
    left = [p for p in sorted(Path(directory).glob("**/.*.part" if inside else ".*.part")) if _PART.fullmatch(p.name)]
    for path in left:
        path.unlink(missing_ok=True)
    return left


def save_artifact(
    directory: str | Path,
    name: str,
    *,
    kind: str,
    schema: int,
    data: Mapping[str, bytes],
    content: Mapping[str, Any],
) -> Path:
    """Write data files ``name.SUFFIX``, then the manifest ``name.json`` that describes them.

    Args:
        directory: Made if it does not exist.
        name: Stem of the files.
        kind: What the artifact is; :func:`load_artifact` asks for it.
        schema: Version of its layout, 1 or more.
        data: The data files' bytes by suffix (without the dot; not "json").
        content: What else the manifest holds, JSON-able; not the keys "kind", "schema", "files" and "manifest_sha256".

    Returns:
        The path of the manifest.

    Raises:
        TypeError: If the content is not JSON-able.
        ValueError: If the content has one of the manifest's own keys, or holds NaN or infinity.
        OSError: If a file cannot be written.
        ArtifactError: If a file of that name is there that no save has written, or a file stands where the directory should; it is left
            as it is.
    """
    own = {"kind": kind, "schema": schema, _FILES: {suffix: sha256(found) for suffix, found in data.items()}}
    if taken := {*own, _SUM} & {*content}:
        raise ValueError(f"content must leave {sorted(taken)} to the manifest; name those keys otherwise")
    # Through JSON once, so that the sum is of what will be read: tuples as lists, keys as strings.
    manifest = json.loads(json.dumps({**own, **content}, allow_nan=False))
    text = json.dumps({**manifest, _SUM: _sum(manifest)}, indent=2, allow_nan=False) + "\n"
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ArtifactError(f"{directory} must be a folder, got a file, which is left as it is; use another path")
    note = directory / f".{name}.saving"
    _require_own(directory, name, kind, [*data], note)
    # The note says whose the data files are if the save is cut off before the manifest is there.
    write_whole(note, json.dumps(sorted(data)) + "\n")
    for suffix, found in data.items():
        write_whole(directory / f"{name}.{suffix}", found)
    path = write_whole(directory / f"{name}.json", text)
    note.unlink(missing_ok=True)
    return path


def _require_own(directory: Path, name: str, kind: str, suffixes: Sequence[str], note: Path) -> None:
    """Refuse to write over files that no save of this name has written.

    Raises:
        ArtifactError: Naming the first of them.
    """
    manifest = directory / f"{name}.json"
    ours = set(suffixes) if note.exists() else set[str]()
    if manifest.exists():
        try:
            held = json.loads(manifest.read_bytes())
            known = isinstance(held, dict) and ({"kind", "schema", _FILES, _SUM} <= {*held} or _older(held, kind))
        except ValueError:
            held, known = {}, note.exists()
        if not known:
            raise ArtifactError(
                f"{manifest} must be free, got a file that care_lens did not write, which is left as it is; use another name"
            )
        ours |= {*held[_FILES]} if _FILES in held else set(suffixes)
    for suffix in suffixes:
        path = directory / f"{name}.{suffix}"
        if suffix not in ours and path.exists():
            raise ArtifactError(
                f"{path} must be free, got a file without the manifest that care_lens writes, which is left as it is; use another "
                "name, or remove it"
            )


def _older(held: Mapping[str, Any], kind: str) -> bool:
    """Whether a manifest is of a layout before the sums, which named no files: ours by its kind and schema, and the first repairs by
    all of their keys. Other programs write a "kind" and a "schema" too."""
    if {*held} == {"schema", "versions", "repair"}:
        return held["schema"] == 1
    return held.get("kind") == kind and type(held.get("schema")) is int


def warn_unsummed(path: str | Path) -> None:
    """Say that a file is of a layout without sums, in which damage does not show.

    Warns:
        UserWarning: Naming it.
    """
    warnings.warn(
        f"{path} is of schema 1, which had no checksum, so that damage of it is not seen; compare it with its source, and save it again",
        stacklevel=3,
    )


def load_artifact(
    directory: str | Path, name: str, *, kind: str, schema: int, oldest: int = 1
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Read an artifact and check it against its manifest.

    Args:
        directory: Where it is.
        name: Stem of the files.
        kind: What it must be.
        schema: The newest version of the layout that the caller knows.
        oldest: The first version that was an artifact.

    Returns:
        The data files' bytes by suffix, and the manifest's content (its "kind", "schema" and sums included).

    Raises:
        FileNotFoundError: If the manifest is not there.
        ArtifactError: If it is damaged, incomplete, of another kind or of a newer schema.
    """
    path = Path(directory) / f"{name}.json"
    manifest = read_manifest(path, kind=kind, schema=schema)
    if manifest["schema"] < oldest:
        raise ArtifactError(f"schema of {path} must be {oldest} or more, got {manifest['schema']}; make it again")
    data = {}
    for suffix, expected in manifest[_FILES].items():
        if "/" in suffix or "\\" in suffix:
            raise ArtifactError(f"{path} must name files beside it, got the suffix {suffix!r}; it is not of care_lens")
        part = path.with_name(f"{name}.{suffix}")
        if not part.exists():
            raise ArtifactError(f"{part} must be there, {path.name} describes it; copy all files of it again")
        data[suffix] = part.read_bytes()
        if sha256(data[suffix]) != expected:
            raise ArtifactError(
                f"{part} must be the file that {path.name} describes, but its checksum differs: it is damaged, of another save, or "
                "its save was cut off; copy all files of it again, or remove them and make it again"
            )
    # Whole, so that a note left by a kill after the last file has nothing more to say.
    with suppress(OSError):
        path.with_name(f".{name}.saving").unlink(missing_ok=True)
    return data, manifest


def read_manifest(path: str | Path, *, kind: str, schema: int) -> dict[str, Any]:
    """Read a manifest alone and check it: its kind, its schema and its own sum.

    Raises:
        FileNotFoundError: If it is not there.
        ArtifactError: If it is damaged, no manifest, of another kind or of a newer schema.
    """
    path = Path(path)
    manifest = read_object(path, kind=kind)
    if not {"kind", "schema", _FILES, _SUM} <= {*manifest} or not isinstance(manifest[_FILES], dict):
        raise ArtifactError(f"{path} must be the manifest of a {kind} as care_lens writes it, got another file")
    # Before the sum, which a newer layout may take otherwise.
    if isinstance(manifest["schema"], int) and manifest["schema"] > schema:
        raise ArtifactError(f"schema of {path} must be {schema} or less, got {manifest['schema']}; update care_lens")
    if manifest[_SUM] != _sum(manifest):
        raise ArtifactError(
            f"{path} must be as it was written, but its checksum differs; copy it again, or make it again"
        )
    if manifest["kind"] != kind:
        raise ArtifactError(f"{path} must hold a {kind}, got a {manifest['kind']}; load it with that class")
    if type(manifest["schema"]) is not int or manifest["schema"] < 1:
        raise ArtifactError(
            f"schema of {path} must be a number of 1 or more, got {manifest['schema']!r}; make it again"
        )
    return manifest


def read_object(path: str | Path, *, kind: str) -> dict[str, Any]:
    """Read a JSON object, unchecked: what manifests of layouts older than :func:`save_artifact` are told by.

    Raises:
        FileNotFoundError: If it is not there.
        ArtifactError: If it is no JSON object.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} must be the manifest of a {kind}, got no JSON ({error}); make it again") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} must be the manifest of a {kind}, got a {type(found).__name__}; make it again")
    return found


def tensors_of(data: Mapping[str, bytes], suffix: str = "safetensors", *, where: str | Path) -> dict[str, "Tensor"]:
    """The tensors of a safetensors file that :func:`load_artifact` read, on the CPU.

    Raises:
        ArtifactError: If there is no such file, or it is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    if suffix not in data:
        raise ArtifactError(f"{where} must have a .{suffix} file, got {sorted(data)}; save it again")
    try:
        return load(data[suffix])
    except SafetensorError as error:
        raise ArtifactError(f"{where} must hold a safetensors file, got {error}; save it again") from None


def tensor_bytes(tensors: "Mapping[str, Tensor]") -> bytes:
    """Tensors by name as a safetensors file."""
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def packed(value: Any) -> Any:
    """A JSON-able value in which NaN and the infinities are written as ``{"float": "nan"}``, which strict JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if isinstance(value, Mapping):
        found = {key: packed(item) for key, item in value.items()}
        return {"object": found} if [*found] in (["float"], ["object"]) else found
    return [packed(item) for item in value] if isinstance(value, (list, tuple)) else value


def unpacked(value: Any) -> Any:
    """The inverse of :func:`packed`."""
    if isinstance(value, dict):
        if [*value] == ["float"] and value["float"] in ("nan", "inf", "-inf"):
            return float(value["float"])
        value = value["object"] if [*value] == ["object"] and isinstance(value["object"], dict) else value
        return {key: unpacked(item) for key, item in value.items()}
    return [unpacked(item) for item in value] if isinstance(value, list) else value


@contextmanager
def in_use(path: str | Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder or a file for this process in a ``with`` block; another process that wants it is refused.

    Args:
        path: What is written to. The lock is the file ``.NAME.lock`` beside it, which is freed when the process ends, however it ends.
        wait: So many seconds the holder is waited for.

    Raises:
        InUseError: If another process holds it; the message says which.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=wait)
    holder = path.with_name(f".{path.name}.holder")
    try:
        lock.acquire()
    except Timeout:
        who = _holder(holder)
        raise InUseError(
            f"{path} must be written by one process at a time, {who} holds it; wait for that one, or use another path"
        ) from None
    try:
        holder.write_text(f"{_this_process()}\n", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    """Who holds a lock, as its note says; the note may go at any moment."""
    try:
        who = path.read_text(encoding="utf-8").strip()
    except OSError:
        who = ""
    return f"this process ({who})" if who == _this_process() else who or "another process"


def sha256(content: bytes) -> str:
    """The sha256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _sum(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest's content, whatever its layout; the sum itself does not count."""
    content = {key: value for key, value in manifest.items() if key != _SUM}
    return sha256(json.dumps(content, sort_keys=True).encode())


def _umask() -> int:
    """The process's umask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
