"""The store of generated answers: generate once, judge as often as one likes.

Answers are kept in a file of JSON lines or, where there are many, in an SQLite file (``answers.sqlite``), which is opened without being read
and whose answers are looked up by key (:mod:`care_lens.evaluation.answer_table`).

Of JSON lines the store is a journal (:mod:`care_lens.core.journal`) that only ever grows. A line is one answer (an example, under a defence, in a channel, with a
seed) or the settings that a digest stands for. Every batch is one write, flushed to the disk; a line cut off by a kill is dropped when
the file is opened again and overwritten by the next write. Of two answers with one key the later counts, so that a failed one can be
tried again. Several stores, in one process or in several, may stand on one file: each takes over what the others wrote before it
writes, and none is lost.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from care_lens.core.conversation import PICTURE, Role, Turn
from care_lens.core.display import LinesRepr
from care_lens.core.errors import ArtifactError
from care_lens.core.examples import Example
from care_lens.core.identity import digest, example_fingerprint, repair_fingerprint
from care_lens.core.journal import Journal, Row
from care_lens.core.outcome import Repair
from care_lens.evaluation.answer_table import MAGIC, SUFFIXES, AnswerTable

Key = tuple[str, str, str, int, str, str]

#: A new store of a command that is to hold more answers than these is an SQLite file: JSON lines of 200,000 take half a minute to open.
MANY = 20_000


@dataclass(frozen=True)
class StoredAnswer:
    """One answer, or the record that there is none.

    Attributes:
        defence: Name of the defence it was generated under.
        channel: Channel of the example.
        id: Identity of the example in its channel.
        group: The item that intervals are clustered by.
        seed: Seed of the run.
        prompt: What was asked.
        response: The answer from its beginning on, a prefill included; None where it is missing.
        missing: Name of the error for which there is no answer; empty where there is one.
        tokens: New tokens of the answer, its end of sequence included.
        settings: Digest of the model, the defence and the options of generation.
        example: Digest of the prompt and the picture.
        harmful: Whether complying would be unsafe.
        reference: The example's own response, where it has one.
        meta: The example's metadata.
        behaviour: What the request is after, where the prompt does not say it.
        system: The system prompt, where there is one.
        turns: Earlier turns of the conversation as (role, text), without their pictures.
        prefill: The beginning of the answer that the model was given, where there is one.
        token_ids: The new tokens of the answer, its end of sequence included; empty in stores of earlier versions.
    """

    defence: str
    channel: str
    id: str
    group: str
    seed: int
    prompt: str
    response: str | None
    missing: str
    tokens: int
    settings: str
    example: str
    harmful: bool = False
    reference: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    behaviour: str | None = None
    system: str | None = None
    turns: tuple[tuple[Role, str], ...] = ()
    prefill: str | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def key(self) -> Key:
        """What makes two answers answers to the same question, under the same conditions."""
        return self.defence, self.channel, self.id, self.seed, self.settings, self.example

    def to_example(self) -> Example:
        """The example it answers, without its pictures and their places in the texts."""
        return Example(
            prompt=self.prompt.replace(PICTURE, ""),
            response=self.reference,
            harmful=self.harmful,
            channel=self.channel,
            id=self.id,
            group=self.group,
            meta=self.meta,
            behaviour=self.behaviour,
            system=self.system,
            turns=tuple(Turn(role, text.replace(PICTURE, "")) for role, text in self.turns),
            prefill=self.prefill,
        )


class GenerationStore(LinesRepr):
    """Answers by key, in memory and, if a path is given, in a file.

    Args:
        path: The file; it and its folder are made at the first write. What is there says of which kind it is; a new one is an SQLite
            file if its name ends in ``.sqlite``, ``.sqlite3`` or ``.db``, and one of JSON lines otherwise. None: in memory only. Stores of
            earlier versions, whose lines have no sums, are read too, and get sums at the first write.

    Raises:
        ArtifactError: If a line of the file other than its last is damaged, or the file is no store; it is left as it is.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._answers: dict[Key, StoredAnswer] = {}
        self._settings: dict[str, Any] = {}
        self._by_request: dict[tuple[str, str, int], Key] = {}
        self._touched: dict[tuple[str, str, str, int], bool] = {}
        self._table = AnswerTable(self.path) if self.path is not None and _is_table(self.path) else None
        lines = self.path if self._table is None else None
        self._journal = None if lines is None else Journal(lines, kind="GenerationStore", older=_older)
        self.refresh()

    @classmethod
    def in_folder(cls, directory: str | Path, name: str = "answers", *, expected: int = 0) -> "GenerationStore":
        """The store of a folder: the one that is there, or a new one of the kind that suits the number of its answers.

        Args:
            directory: The folder.
            name: The file's name without its ending.
            expected: How many answers a new store is to hold, about: an SQLite file for more than 20,000, else JSON lines. What is there
                is kept on with, whatever it is. Of an SQLite file and JSON lines of one name it is the SQLite file; what only the JSON lines
                have is not read (:meth:`copied` puts it into the SQLite file).

        Example:
            >>> GenerationStore.in_folder("results", expected=200_000).path.name
            'answers.sqlite'
        """
        lines, table = Path(directory) / f"{name}.jsonl", Path(directory) / f"{name}.sqlite"
        return cls(table if table.exists() or (expected > MANY and not lines.exists()) else lines)

    def shown(self) -> tuple[str, dict[str, str]]:
        """How many answers, and where they are kept."""
        kept = "in memory only" if self.path is None else str(self.path)
        return f"GenerationStore: {len(self)} answers", {"kept": kept, "see": ".answers()"}

    def __len__(self) -> int:
        return len(self._answers if self._table is None else self._table)

    def get(self, key: Key) -> StoredAnswer | None:
        """The answer of that key, or None.

        Raises:
            ValueError: If no answer can be kept under that key; see :meth:`add`.
        """
        _require_key(key)
        if self._table is None:
            return self._answers.get(key)
        row = self._table.get(key)
        return None if row is None else _answer(row)

    def undefended(self, settings: str, example: Example, seed: int) -> StoredAnswer | None:
        """An answer to what the example gives the model, of whatever defence and channel it is called, that is not missing.

        Args:
            settings: Digest of the settings that it was generated under, which say that there was no defence.
            example: The example.
            seed: Of the run.
        """
        given = example_fingerprint(example)
        if self._table is None:
            key = self._by_request.get((settings, given, seed))
            held = [] if key is None else [self._answers[key]]
        else:
            held = [_answer(row) for row in self._table.of_request(settings, given, seed)]
        return next((answer for answer in reversed(held) if not answer.missing), None)

    def note_touched(self, defence: str, answer: StoredAnswer, touched: bool) -> None:
        """Remember, as long as this object lives, whether a defence would have touched anything while this answer was given.

        Args:
            defence: Digest of the defence.
            answer: An undefended answer.
            touched: Whether.
        """
        self._touched[defence, answer.settings, answer.example, answer.seed] = touched

    def touched(self, defence: str, answer: StoredAnswer) -> bool | None:
        """What :meth:`note_touched` was told; None: nothing."""
        return self._touched.get((defence, answer.settings, answer.example, answer.seed))

    def opened_for(self, defence: Repair, examples: Sequence[Example]) -> list[bool | None]:
        """Whether a gated defence touches each example, as far as its gates were read beside undefended answers in this process.

        Args:
            defence: The defence.
            examples: The examples.

        Returns:
            One for each example; None where it is not known, or not the same of several answers.
        """
        name = repair_fingerprint(defence)
        held: dict[str, set[bool]] = {}
        for (of, _, example, _), touched in self._touched.items():
            if of == name:
                held.setdefault(example, set()).add(touched)
        found = [held.get(example_fingerprint(example), set()) for example in examples]
        return [next(iter(one)) if len(one) == 1 else None for one in found]

    def refresh(self) -> None:
        """Take over what other stores on the same file have written since."""
        if self._journal is not None:
            self._take(self._journal.read())

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by their digests."""
        return dict(self._settings) if self._table is None else self._table.settings()

    def add_settings(self, settings: Any) -> str:
        """Record settings.

        Args:
            settings: A JSON-able value.

        Returns:
            Their digest, which answers carry.
        """
        name = digest(settings)
        if name not in self._settings:
            if self._table is not None and name not in self._table.settings():
                self._table.write([], {name: settings})
            self._write([{"kind": "settings", "digest": name, "value": settings}])
            self._settings[name] = settings
        return name

    def add(self, answers: Sequence[StoredAnswer]) -> None:
        """Append answers, in one write.

        Raises:
            ValueError: If an id, channel or name of a defence is no text that can be written as UTF-8, or a seed is no whole number of 64 bits. All stores refuse the same,
                so that answers can go from one kind of file to the other.
        """
        for answer in answers:
            _require_key(answer.key)
        if self._table is not None:
            if answers:
                self._table.write([(answer.key, asdict(answer)) for answer in answers])
            return
        self._write([{"kind": "answer", **asdict(answer)} for answer in answers])
        for answer in answers:
            self._hold(answer)

    def answers(self, *, settings: Collection[str] | None = None) -> list[StoredAnswer]:
        """The answers, in the order in which they were first written.

        Args:
            settings: Only those generated under these settings (digests); None: all.
        """
        if self._table is not None:
            return [_answer(row) for row in self._table.rows(settings)]
        return [answer for answer in self._answers.values() if settings is None or answer.settings in settings]

    def to_dataframe(self) -> pd.DataFrame:
        """The answers as a frame, one row an answer."""
        return pd.DataFrame([asdict(answer) for answer in self.answers()])

    def copied(self, path: str | Path) -> "GenerationStore":
        """All of it in another file, such as an SQLite one of a store of JSON lines.

        Args:
            path: Where to; a store that is there gets what it lacks, and answers of the same key are replaced.

        Returns:
            The other store.

        Example:
            >>> GenerationStore("answers.jsonl").copied("answers.sqlite")  # doctest: +SKIP
        """
        other = GenerationStore(path)
        for value in self.settings.values():
            other.add_settings(value)
        other.add(self.answers())
        return other

    def _write(self, rows: list[Row]) -> None:
        if self._journal is not None and rows:
            self._take(self._journal.append(rows))

    def _take(self, rows: list[Row]) -> None:
        for row in rows:
            kind, held = row["kind"], {name: value for name, value in row.items() if name != "kind"}
            if kind == "settings":
                self._settings[held["digest"]] = held["value"]
            else:
                self._hold(_answer(held))

    def _hold(self, answer: StoredAnswer) -> None:
        self._answers[answer.key] = answer
        self._by_request[answer.settings, answer.example, answer.seed] = answer.key


def _require_key(key: Key) -> None:
    """Refuse a key that files cannot hold."""
    for name, value in (("defence", key[0]), ("channel", key[1]), ("id", key[2])):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(
                f"{name} must be text that can be written as UTF-8, got {value!r:.60} with a lone surrogate (half of a character); decode what it was made of again, "
                "or take that character out"
            ) from None
    if not -(2**63) <= key[3] < 2**63:
        raise ValueError(
            f"seed must be a whole number of 64 bits, from -2**63 to 2**63 - 1, got {key[3]}; take a smaller one"
        )


def _is_table(path: Path) -> bool:
    """Whether a path is an SQLite file, or is to be one."""
    begins = b""
    if path.is_file():
        with path.open("rb") as file:
            begins = file.read(len(MAGIC))
    return begins == MAGIC or (path.suffix in SUFFIXES and not begins.startswith(b"{"))


def _answer(row: Row) -> StoredAnswer:
    """An answer of its row, whose turns and tokens are lists in the file."""
    turns = tuple((role, text) for role, text in row.get("turns", ()))
    return StoredAnswer(**{**row, "turns": turns, "token_ids": tuple(row.get("token_ids", ()))})


def _older(content: bytes) -> list[Row] | None:
    """Rows of a store without sums; None if it is none.

    Raises:
        ArtifactError: If a line other than the last is damaged.
    """
    whole, _, cut = content.rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    if not (lines[0] if lines else cut).startswith((b'{"kind": "answ', b'{"kind": "sett')):
        return None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["kind"] != "settings":
                _answer({name: value for name, value in row.items() if name != "kind"})
            elif {*row} != {"kind", "digest", "value"}:
                raise ValueError("settings have a digest and a value")
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"line {number} of the store must be a stored answer, got {line[:50]!r}; take it out, and what it held is generated again"
            ) from error
        rows.append(row)
    return rows
