"""Examples on disk: one JSON object a line, in UTF-8, pictures beside it.

    {"prompt": "what is in the picture?", "image": "images/1.png", "harmful": false, "channel": "benign", "id": "b1"}

Keys: prompt (required), image (path relative to the file, or a list of paths), response, behaviour (what the request is after, for
judges), system (the system prompt), turns (earlier turns of the conversation, a list of objects with the keys role, text and, if there
is one, image), prefill (the beginning of the answer), harmful (true or false), channel, id, group, meta (object of strings). A picture stands before
its text, or where the text has U+FFFC. image, response, behaviour, system and prefill may be null. Every other value must be of its type, and nothing is guessed: "false" in quotes is refused, and so is the number 7 for an id. Readers bring their own data;
care_lens ships none that is harmful.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from care_lens.core.conversation import ExampleError, Role, Turn
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.files import write_whole
from care_lens.core.pictures import PictureError, PictureNotFoundError, open_picture
from care_lens.core.require import require_path

_OPTIONAL = ("response", "behaviour", "system", "prefill")
_KEYS = ("prompt", "image", *_OPTIONAL, "turns", "harmful", "channel", "id", "group", "meta")
_NULLABLE = ("image", *_OPTIONAL)
_TURN_KEYS = ("role", "text", "image")


class DataFileError(CareLensError, ValueError):
    """A file of examples or of a study is not as it must be; the message names the file, the line and what to write."""


def read_examples(path: str | Path) -> list[Example]:
    """Read a jsonl file of examples.

    Args:
        path: The file, in UTF-8. Lines end in a line feed (Windows ends too); blank lines are left out.

    Returns:
        The examples in the file's order. Pictures are read from the disk when they are used
        (:func:`~care_lens.core.pictures.open_picture`). An example without an id is called ``stem/line``; one without a group is
        grouped by its id.

    Raises:
        DataFileError: Naming file and line, where a line is no JSON object, lacks a prompt, has unknown keys or values of another type, has
            the id of an earlier line, or names a file that is no picture. It is a ValueError.
        PictureNotFoundError: Naming file and line, where a picture is missing. It is a FileNotFoundError.
        FileNotFoundError: Where the file itself is missing.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_examples([Example("what is this?", id="a")], Path(folder) / "examples.jsonl")
        ...     read_examples(path)[0].prompt
        'what is this?'
    """
    path = require_path(path)
    examples: list[Example] = []
    lines: dict[str, int] = {}
    # Only line feeds end a line: U+2028, U+2029 and U+0085, at which str.splitlines cuts, may stand inside of JSON texts.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        example = example_of(parse_json(line, where), where, f"{path.stem}/{number}", path.parent)
        if (first := lines.setdefault(example.id, number)) != number:
            raise DataFileError(
                f"{where} must have an id of its own, got {example.id!r}, which line {first} has; change one of them"
            )
        examples.append(example)
    return examples


def write_examples(examples: Iterable[Example], path: str | Path) -> Path:
    """Write examples to a jsonl file, and their pictures as PNG into the folder ``STEM_images`` beside it.

    :func:`read_examples` gives the same examples back; one without an id is given the id ``stem/line``. The file is whole or not
    written. A picture's file is named by its pixels, so that examples can be written over the file that they were read from;
    pictures of an earlier content are left there.

    Args:
        examples: Their ids must differ.
        path: The file; its folder is made if it does not exist.

    Returns:
        The path.

    Raises:
        TypeError: If one is no `Example`.
        DataFileError: If two have one id, or one holds a value that is not of its type (meta must hold texts). It is a ValueError.
    """
    path = require_path(path)
    if isinstance(examples, str) or not isinstance(examples, Iterable):
        raise TypeError(
            f"examples must be a list of care_lens.Example, got {type(examples).__name__}; give [example, ...]"
        )
    folder = path.parent / f"{path.stem}_images"
    lines: list[str] = []
    seen: dict[str, int] = {}
    for number, example in enumerate(examples, 1):
        if not isinstance(example, Example):
            raise TypeError(
                f"examples must be of care_lens.Example, got {type(example).__name__} at index {number - 1}"
            )
        name = example.id or f"{path.stem}/{number}"
        if (first := seen.setdefault(name, number)) != number:
            raise DataFileError(
                f"examples must have ids that differ, got {name!r} for number {first} and number {number}"
            )
        row: dict[str, Any] = {"prompt": example.prompt, "harmful": example.harmful, "channel": example.channel}
        row |= {"id": name, "group": example.group, "meta": dict(example.meta)}
        row |= {key: getattr(example, key) for key in _OPTIONAL if getattr(example, key) is not None}
        _require_types(row, f"example {name!r}")
        row |= _written(example.own_images, folder)
        if example.turns:
            row["turns"] = [
                {"role": turn.role, "text": turn.text, **_written(turn.images, folder)} for turn in example.turns
            ]
        lines.append(_line(row))
    return write_whole(path, "".join(f"{line}\n" for line in lines))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark and with line feeds as line ends.

    Raises:
        DataFileError: If it is not UTF-8.
    """
    if path.is_dir():
        raise DataFileError(f"{path} must be a file, got a folder; name the file in it")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataFileError(f"{path.name}:{line} must be UTF-8 text ({error}); save the file as UTF-8") from None


def parse_json(text: str, where: str) -> dict[str, Any]:
    """A JSON object from its text; a key given twice is refused.

    Raises:
        DataFileError: Naming where it stands.
    """

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := sorted({key for i, (key, _) in enumerate(items) if key in [k for k, _ in items[:i]]}):
            raise DataFileError(f"{where} must give each key once, got {twice} twice; take one out")
        return dict(items)

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except DataFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"{where} must be a JSON object, got {text[:60]!r} ({error})") from None
    if not isinstance(found, dict):
        raise DataFileError(f"{where} must be a JSON object, got {text[:60]!r}")
    return found


def example_of(row: Mapping[str, Any], where: str, name: str, folder: Path) -> Example:
    """The example of one line's object.

    Args:
        row: The object.
        where: Names the line in errors.
        name: The example's id where the object gives none.
        folder: That paths of pictures are relative to.

    Raises:
        DataFileError: As :func:`read_examples`.
        PictureNotFoundError: As :func:`read_examples`.
    """
    if unknown := sorted(set(row) - {*_KEYS}):
        raise DataFileError(
            f"{where} must have keys out of {list(_KEYS)}, got {unknown}; put what else you have in meta"
        )
    if "prompt" not in row:
        raise DataFileError(f"{where} must have a 'prompt', got the keys {sorted(row)}")
    _require_types(row, where)
    if row.get("id") == "":
        raise DataFileError(f"{where}: id must not be empty; leave it out to have the example called {name!r}")
    images = _pictures(row.get("image"), where, folder)
    id_ = row.get("id", name)
    try:
        return Example(
            prompt=row["prompt"],
            image=images[0] if images else None,
            more_images=tuple(images[1:]),
            harmful=row.get("harmful", False),
            channel=row.get("channel", ""),
            id=id_,
            group=row.get("group", id_),
            meta=row.get("meta", {}),
            turns=_turns(row.get("turns", []), where, folder),
            **{key: row.get(key) for key in _OPTIONAL},
        )
    except ExampleError as error:
        raise DataFileError(f"{where}: {error}") from None


def _turns(found: Any, where: str, folder: Path) -> tuple[Turn, ...]:
    """The earlier turns of a conversation."""
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise DataFileError(
            f'{where}: turns must be a list of objects such as {{"role": "user", "text": "hello"}}, got {_shown(found)}; write it so'
        )
    turns = []
    for number, turn in enumerate(found, 1):
        here = f"{where}: turn {number}"
        if unknown := sorted({*turn} - {*_TURN_KEYS}):
            raise DataFileError(f"{here} must have keys out of {list(_TURN_KEYS)}, got {unknown}; take them out")
        for key in ("role", "text"):
            if not isinstance(turn.get(key), str):
                raise DataFileError(f"{here}: {key} must be a text, got {_shown(turn.get(key))}; write it in quotes")
        if turn["role"] not in get_args(Role):
            raise DataFileError(
                f"{here}: role must be one of {list(get_args(Role))}, got {_shown(turn['role'])}; a system prompt is the key system"
            )
        turns.append(Turn(turn["role"], turn["text"], tuple(_pictures(turn.get("image"), here, folder))))
    return tuple(turns)


def _require_types(row: Mapping[str, Any], where: str) -> None:
    """Refuse values that are not of the type of their key."""
    for key in ("prompt", *_OPTIONAL, "channel", "id", "group"):
        if key in row and not (isinstance(row[key], str) or (row[key] is None and key in _NULLABLE)):
            raise DataFileError(f"{where}: {key} must be a text, got {_shown(row[key])}; {_advice(row[key], key)}")
    if not isinstance(harmful := row.get("harmful", False), bool):
        raise DataFileError(
            f"{where}: harmful must be true or false without quotes, got {_shown(harmful)}; write it so"
        )
    if not isinstance(meta := row.get("meta", {}), dict):
        raise DataFileError(f"{where}: meta must be an object of texts, got {_shown(meta)}; leave it out or write {{}}")
    for key, value in meta.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise DataFileError(f"{where}: meta.{key} must be a text, got {_shown(value)}; {_advice(value, key)}")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _advice(value: Any, key: str) -> str:
    if isinstance(value, (bool, int, float)):
        return f'write it in quotes: "{json.dumps(value)}"'
    return "leave the key out" if value is None else f"give {key} as one text in quotes"


def _pictures(named: Any, where: str, folder: Path) -> list[Image.Image]:
    names = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataFileError(
            f"{where}: image must be a path or a list of paths, got {_shown(named)}; write it in quotes"
        )
    images = []
    for name in names:
        try:
            images.append(open_picture(folder / name))
        except PictureNotFoundError:
            raise PictureNotFoundError(
                f"{where}: image must be there, got no file {name!r} in {folder}; paths are relative to the jsonl file"
            ) from None
        except (PictureError, ValueError) as error:
            raise DataFileError(f"{where}: image {name!r} must be a picture: {error}") from None
    return images


def _written(images: Sequence[Image.Image], folder: Path) -> dict[str, Any]:
    """The key of pictures that are written into a folder; none where there are none."""
    paths = [f"{folder.name}/{_write_picture(image, folder)}" for image in images]
    return {"image": paths if len(paths) > 1 else paths[0]} if paths else {}


def _line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON, in which no other program sees a line end, and lone surrogates are escaped."""
    text = json.dumps(row, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return json.dumps(row)
    for letter in "\x85\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _write_picture(image: Image.Image, folder: Path) -> str:
    """Write a picture under a name made of its pixels, unless it is there; returns the name."""
    size = f"{image.width}x{image.height}"
    name = f"{hashlib.sha256(size.encode() + image.tobytes()).hexdigest()[:20]}.png"
    path = folder / name
    if not path.exists() or _differs(path, image):
        content = _png(image)
        write_whole(path, content)
    return name


def _differs(path: Path, image: Image.Image) -> bool:
    try:
        held = open_picture(path)
        return held.size != image.size or held.tobytes() != image.tobytes()
    except PictureError:
        return True


def _png(image: Image.Image) -> bytes:

    buffer = io.BytesIO()
    # A fresh image: the info of an opened file (its EXIF, its gamma) must not be written beside pixels that are final.
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, "PNG")
    return buffer.getvalue()
