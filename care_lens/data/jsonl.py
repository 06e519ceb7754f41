"""Examples on disk: one JSON object a line, pictures beside it.

Keys: prompt (required), image (path relative to the file, or a list of paths), response, harmful (bool), channel, id, group, meta (object of
strings). Readers bring their own data; care_lens ships none that is harmful.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from care_lens.core.examples import Example

_KEYS = {"prompt", "image", "response", "harmful", "channel", "id", "group", "meta"}


def read_examples(path: str | Path) -> list[Example]:
    """Read a jsonl file of examples.

    Raises:
        ValueError: naming file and line, where a line is no JSON object, has no prompt, or has unknown keys.
        FileNotFoundError: where a picture is missing.
    """
    path = Path(path)
    out = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}:{number} must be a JSON object, got {line[:60]!r} ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f"{path.name}:{number} must have a 'prompt' that is a string")
        if unknown := set(row) - _KEYS:
            raise ValueError(f"{path.name}:{number} has unknown keys {sorted(unknown)}; keys are {sorted(_KEYS)}")
        named = row.get("image") or []
        images = []
        for name in [named] if isinstance(named, str) else named:
            with Image.open(path.parent / name) as opened:
                images.append(opened.convert("RGB"))
        out.append(
            Example(
                prompt=row["prompt"],
                image=images[0] if images else None,
                more_images=tuple(images[1:]),
                response=row.get("response"),
                harmful=bool(row.get("harmful", False)),
                channel=row.get("channel", ""),
                id=row.get("id") or f"{path.stem}/{number}",
                group=row.get("group") or row.get("id") or f"{path.stem}/{number}",
                meta={str(k): str(v) for k, v in row.get("meta", {}).items()},
            )
        )
    return out


def write_examples(examples: Iterable[Example], path: str | Path) -> Path:
    """Write examples to a jsonl file, and their pictures as PNG into a folder beside it."""
    path = Path(path)
    folder = path.parent / f"{path.stem}_images"
    lines = []
    for index, example in enumerate(examples):
        row: dict = {"prompt": example.prompt, "harmful": example.harmful, "channel": example.channel}
        row |= {
            "id": example.id or f"{path.stem}/{index}",
            "group": example.group,
            "meta": dict(example.meta),
        }
        if example.response is not None:
            row["response"] = example.response
        names = [f"{index}.png", *(f"{index}_{n}.png" for n in range(1, len(example.images)))]
        for name, image in zip(names, example.images):
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)
        if example.images:
            paths = [f"{folder.name}/{name}" for name in names]
            row["image"] = paths if example.more_images else paths[0]
        lines.append(json.dumps(row, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
