"""What an attack is: anything that makes new examples of old ones, against a model and the defence that is on it.

:class:`Attack` is a protocol, so no base class is needed. What it makes is asked and judged like any other channel. An
:class:`AttackResult` holds the examples that were made, one row an example (losses, tries, whether the answer complied) and the history of
the search; it is saved as PNG pictures and json with sums, and success is counted on what is read back:

    result = attack.run(lvlm, examples, defence=repair, seed=0)
    result.save("results/pgd")
    AttackResult.load("results/pgd").examples  # what evaluation asks
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from PIL import Image

from care_lens.core.cells import csv_text
from care_lens.core.conversation import Turn
from care_lens.core.digests import picture_bytes
from care_lens.core.display import ShortRepr, as_text
from care_lens.core.errors import ArtifactError
from care_lens.core.examples import Example
from care_lens.core.files import load_artifact, packed, save_artifact, unpacked
from care_lens.core.results import column_types, read_frame

_SCHEMA = 1
FRAME_COLUMNS = {
    "row": "int64",
    "id": "str",
    "group": "str",
    "channel": "str",
    "clean_loss": "float64",
    "loss": "float64",
    "tries": "int64",
    "complied": "boolean",
}
"""Columns of :attr:`AttackResult.frame` and their types."""
HISTORY_COLUMNS = {"row": "int64", "restart": "int64", "step": "int64", "loss": "float64", "what": "str"}
"""Columns of :attr:`AttackResult.history` and their types."""


@runtime_checkable
class Attack(Protocol):
    """An attack under the one protocol that tables use.

    Attributes:
        name: Its name in tables.
    """

    @property
    def name(self) -> str: ...

    def run(self, lvlm: Any, examples: Sequence[Example], defence: Any = None, seed: int = 0) -> "AttackResult":
        """Attack a model.

        Args:
            lvlm: A HookedLVLM.
            examples: The requests.
            defence: What is on the model while it is attacked: the attack is made against the defended model. None: the model as it is.
            seed: Seed of all draws.

        Returns:
            One new example for each, in order.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON-able values."""
        ...


@dataclass(frozen=True, repr=False)
class AttackResult(ShortRepr):
    """What an attack made.

    Attributes:
        examples: One for each request, in order; ``id``, ``group``, ``behaviour`` and ``harmful`` are those of the request.
        frame: One row an example, with the columns of :data:`FRAME_COLUMNS`: losses in the units of the attack's loss, smaller is nearer to
            success (NaN where an attack has none), how many candidates were tried, and whether the answer complied (missing until
            it is judged).
        history: One row a step, restart and example, with the columns of :data:`HISTORY_COLUMNS`; empty where nothing was searched.
        settings: What made them, JSON-able.

    Raises:
        ValueError: If the frame is of another number of examples, or lacks a column.
    """

    examples: tuple[Example, ...]
    frame: pd.DataFrame
    history: pd.DataFrame
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "examples", tuple(self.examples))
        if len(self.frame) != len(self.examples):
            raise ValueError(
                f"frame must have a row for each of {len(self.examples)} examples, got {len(self.frame)}; "
                "make it with attack_frame"
            )
        for name, frame, columns in (("frame", self.frame, FRAME_COLUMNS), ("history", self.history, HISTORY_COLUMNS)):
            if lacking := [column for column in columns if column not in frame.columns]:
                raise ValueError(f"{name} must have the columns {[*columns]}, it lacks {lacking}; add them")

    @classmethod
    def of(
        cls,
        examples: Sequence[Example],
        *,
        settings: Mapping[str, Any],
        loss: Sequence[float | int] | None = None,
        clean_loss: Sequence[float | int] | None = None,
        tries: Sequence[int] | int = 1,
        history: Sequence[Mapping[str, Any]] = (),
    ) -> "AttackResult":
        """Build from what a search found.

        Args:
            examples: The examples made.
            settings: What made them, JSON-able.
            loss: Of each of them; None: the attack has no loss.
            clean_loss: Of each request as it was.
            tries: How many candidates were tried, for each or for all.
            history: Rows with the columns of :data:`HISTORY_COLUMNS`; those left out are filled.
        """
        n, nan = len(examples), float("nan")
        frame = pd.DataFrame(
            {
                "row": range(n),
                "id": [e.id for e in examples],
                "group": [e.group for e in examples],
                "channel": [e.channel for e in examples],
                "clean_loss": list(clean_loss) if clean_loss is not None else [nan] * n,
                "loss": list(loss) if loss is not None else [nan] * n,
                "tries": [tries] * n if isinstance(tries, int) else list(tries),
                "complied": [pd.NA] * n,
            }
        ).astype(FRAME_COLUMNS)
        rows = [{"row": 0, "restart": 0, "step": 0, "loss": nan, "what": "", **row} for row in history]
        steps = pd.DataFrame(rows, columns=[*HISTORY_COLUMNS]).astype(HISTORY_COLUMNS)
        return cls(tuple(examples), frame, steps, json.loads(json.dumps(dict(settings))))

    @property
    def success(self) -> float:
        """Share of the judged answers that complied; NaN before :func:`~care_lens.attacks.judged`."""
        judged = self.frame["complied"].dropna()
        return float(judged.astype("float64").mean()) if len(judged) else float("nan")

    def to_dataframe(self, *, history: bool = False) -> pd.DataFrame:
        """A copy of the frame, one row an example; or of the history, one row a step, with the examples' ids.

        Args:
            history: Whether to give the history.
        """
        if not history:
            return self.frame.copy()
        return self.history.merge(self.frame[["row", "id", "group", "channel"]], on="row", how="left")

    def with_complied(self, complied: Sequence[bool | None]) -> "AttackResult":
        """The same with what a judge said of each answer; None where there is no answer."""
        frame = self.frame.assign(
            complied=pd.array([pd.NA if one is None else one for one in complied], dtype="boolean")
        )
        return replace(self, frame=frame)

    def __repr__(self) -> str:
        rows = {
            "attack": str(self.settings.get("name", self.settings.get("attack", ""))),
            "defence": str((self.settings.get("defence") or {}).get("name", "none")),
            "success": "not judged" if self.success != self.success else f"{self.success:.2f}",
            "see": ".examples, .to_dataframe(), .to_dataframe(history=True), .save(folder)",
        }
        return as_text(f"AttackResult: {len(self.examples)} examples", rows)

    def save(self, directory: str | Path, name: str = "attack") -> Path:
        """Write ``name.json``, which holds the sums of all, the examples, both frames as csv and the pictures as PNG into a directory.

        Args:
            directory: Made if it does not exist.
            name: Stem of the files.

        Returns:
            The path of the json file.

        Raises:
            ArtifactError: If files of that name are there that care_lens did not write.
        """
        pictures: dict[bytes, tuple[str, bytes]] = {}
        rows = [_row_of(example, pictures) for example in self.examples]
        return save_artifact(
            directory,
            name,
            kind=type(self).__name__,
            schema=_SCHEMA,
            data={
                "csv": csv_text(self.frame).encode(),
                "history.csv": csv_text(self.history).encode(),
                "examples.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
                **dict(pictures.values()),
            },
            content={
                "columns": column_types(self.frame),
                "history": column_types(self.history),
                "settings": packed(self.settings),
            },
        )

    @classmethod
    def load(cls, directory: str | Path, name: str = "attack") -> "AttackResult":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If it is not there.
            ArtifactError: If a file is damaged or of another kind.
        """
        data, content = load_artifact(directory, name, kind=cls.__name__, schema=_SCHEMA)
        where = Path(directory) / f"{name}.json"
        try:
            rows = [json.loads(line) for line in data["examples.jsonl"].decode().splitlines()]
            examples = tuple(_example_of(row, data) for row in rows)
            frame = read_frame(data["csv"], content["columns"])
            history = read_frame(data["history.csv"], content["history"])
        except (KeyError, ValueError, OSError, SyntaxError, TypeError) as error:
            raise ArtifactError(
                f"the files that {where} describes must be an attack's, got others ({error}); copy all files again"
            ) from error
        return cls(examples, frame, history, unpacked(content["settings"]))


def png_bytes(image: Image.Image) -> bytes:
    """A picture as a PNG file, which keeps every pixel."""
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def picture_of(content: bytes) -> Image.Image:
    """The RGB picture of an image file's bytes."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


_TEXTS = ("prompt", "response", "harmful", "channel", "id", "group", "behaviour", "system", "prefill")


def _row_of(example: Example, pictures: dict[bytes, tuple[str, bytes]]) -> dict[str, Any]:
    """An example for the jsonl file; its pictures go into ``pictures``, each once."""

    def kept(image: Image.Image) -> str:
        key = picture_bytes(image)
        if key not in pictures:
            pictures[key] = f"{len(pictures):05d}.png", png_bytes(image)
        return pictures[key][0]

    turns = [{"role": t.role, "text": t.text, "images": [kept(i) for i in t.images]} for t in example.turns]
    texts = {name: getattr(example, name) for name in _TEXTS}
    return {**texts, "meta": dict(example.meta), "turns": turns, "images": [kept(i) for i in example.own_images]}


def _example_of(row: Mapping[str, Any], data: Mapping[str, bytes]) -> Example:
    """The example of a row of the jsonl file."""
    images = [picture_of(data[name]) for name in row["images"]]
    turns = tuple(
        Turn(turn["role"], turn["text"], tuple(picture_of(data[name]) for name in turn["images"]))
        for turn in row["turns"]
    )
    return Example(
        **{name: row[name] for name in _TEXTS},
        meta=row["meta"],
        turns=turns,
        image=images[0] if images else None,
        more_images=tuple(images[1:]),
    )
