"""Moments by fold of groups, class and modality, so that any fold can be left out without going back to the rows.

A group (all paraphrases of one prompt, say) is in one fold, which its name decides: a stream can be dealt out before its
end is known, and two machines deal alike. Tables of different shards are merged; every total is exact.
"""

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core import files
from care_lens.core.display import LinesRepr, listed
from care_lens.core.errors import ArtifactError
from care_lens.core.held import not_held
from care_lens.core.results import package_versions
from care_lens.subspace.errors import SubspaceError, SubspaceFileError, TooFewRowsError, WidthError
from care_lens.subspace.memory import Keep, MemoryPlan, form_of, plan_memory
from care_lens.subspace.moments import Moments, Sums

_SCHEMA = 2
_KIND, _NAME = "care_lens.MomentsTable", "moments"
_KEYS_1 = {"schema", "kind", "versions", "width", "folds", "keep", "seed", "entries", "sha256"}
_SUMS = ("scatter", "third", "cubes", "quartics")

logger = logging.getLogger(__name__)


class MomentsKey(NamedTuple):
    """Whose moments they are.

    Attributes:
        fold: Number of the fold, from 0.
        label: The class, e.g. "benign", or a family of attacks.
        modality: "visual" or "textual".
    """

    fold: int
    label: str
    modality: str


def fold_of_group(group: str, folds: int, *, seed: int = 0) -> int:
    """The fold of a group, from its name alone: the same on every machine and in every order.

    Args:
        group: Its name.
        folds: How many there are, 1 or more.
        seed: Another seed deals otherwise.

    Raises:
        SubspaceError: If there is not at least one fold.
    """
    if folds < 1:
        raise SubspaceError(f"folds must be 1 or more, got {folds!r}")
    return int.from_bytes(hashlib.sha256(f"{seed}\x00{group}".encode()).digest()[:8], "big") % folds


class MomentsTable(LinesRepr):
    """Moments of a stream of rows, kept apart by fold, class and modality.

    Args:
        width: d.
        folds: Number of folds.
        keep: "auto" keeps the rows of an entry while they are fewer than d, then their sums; "rows" and "sums" keep
            one form throughout.
        seed: Of the folds.

    Raises:
        SubspaceError: If an option is out of its range.

    Example:
        >>> import torch
        >>> table = MomentsTable(3, folds=2)
        >>> table.update(torch.eye(3), label="benign", modality="visual", groups=["a", "b", "c"])
        >>> table.total("benign", "visual").count
        3
    """

    def __init__(self, width: int, *, folds: int = 4, keep: Keep = "auto", seed: int = 0) -> None:
        if width < 1 or folds < 1:
            raise SubspaceError(f"width and folds must be 1 or more, got {width!r} and {folds!r}")
        form_of(0, width, keep)
        self.width, self.folds, self.seed = width, folds, seed
        self.keep: Keep = keep
        self._entries: dict[MomentsKey, Moments] = {}

    def shown(self) -> tuple[str, dict[str, str]]:
        """How wide, and what is in it."""
        kinds = dict.fromkeys(f"{key.label} {key.modality}" for key in self)
        return f"MomentsTable: {len(self)} entries", {
            "width": str(self.width),
            "folds": str(self.folds),
            "holds": listed(kinds),
            "see": ".total(label, modality)",
        }

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[MomentsKey]:
        return iter(sorted(self._entries))

    def __getitem__(self, key: MomentsKey) -> Moments:
        if key not in self._entries:
            raise not_held("entry of moments", key, self)
        return self._entries[key]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self._entries.values())

    def plan(self, counts: Mapping[str, int], *, sites: int = 1) -> MemoryPlan:
        """What a stream will take: ``counts`` is the number of rows of each class and modality, over all folds.

        The plan is logged; folds are taken to be even.
        """
        each = {
            f"{name} fold {fold}": -(-count // self.folds)
            for name, count in counts.items()
            for fold in range(self.folds)
        }
        plan = plan_memory(self.width, each, sites=sites, keep=self.keep)
        logger.info("%s", plan)
        return plan

    def update(self, rows: Float[Tensor, "n d"], *, label: str, modality: str, groups: Sequence[str]) -> None:
        """Add rows to the folds of their groups.

        Args:
            rows: [n, d] of any floating dtype on any device.
            label: Their class.
            modality: Their modality.
            groups: The group of each row.

        Raises:
            WidthError: If the rows are not [n, d] of this table's width.
            NonFiniteError: If one holds NaN or infinity.
            SubspaceError: If there is not one group a row. Nothing is added in any of these cases.
        """
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise WidthError(f"rows must be [n, {self.width}], got {tuple(rows.shape)}; give this table's site's")
        if len(groups) != len(rows):
            raise SubspaceError(f"groups must be as many as the rows, {len(rows)}, got {len(groups)}")
        if not len(rows):
            return
        Moments.from_rows(rows, name=label, least=1)  # all rows are sound, or none is added
        folds = torch.tensor([fold_of_group(group, self.folds, seed=self.seed) for group in groups])
        for fold in folds.unique().tolist():
            picked = rows[(folds == fold).to(rows.device)]
            self._add(MomentsKey(fold, label, modality), Moments.from_rows(picked, name=label, least=1))

    def merge(self, other: "MomentsTable") -> "MomentsTable":
        """A table of the rows of both; both stay as they are.

        Raises:
            SubspaceError: If they differ in width, folds or seed.
        """
        if (self.width, self.folds, self.seed) != (other.width, other.folds, other.seed):
            raise SubspaceError(
                f"tables to merge must have one width, number of folds and seed, got {self.width, self.folds, self.seed}"
                f" and {other.width, other.folds, other.seed}; fill both alike"
            )
        merged = MomentsTable(self.width, folds=self.folds, keep=self.keep, seed=self.seed)
        for table in (self, other):
            for key in table:
                merged._add(key, table[key])
        return merged

    def total(self, label: str, modality: str, *, without: Collection[int] = (), only: Collection[int] = ()) -> Moments:
        """The moments of a class and modality over folds.

        Args:
            label: The class.
            modality: The modality.
            without: Folds to leave out.
            only: Folds to take; none given: all.

        Returns:
            Their moments, merged; in the form of rows if every part is.

        Raises:
            TooFewRowsError: If there are none.
        """
        parts = [
            self._entries[key]
            for key in self
            if (key.label, key.modality) == (label, modality)
            and key.fold not in without
            and (not only or key.fold in only)
        ]
        if not parts:
            known = sorted({(key.label, key.modality) for key in self})
            raise TooFewRowsError(
                f"{label} must have rows of modality {modality} in the folds asked for, got none; there are {known}"
            )
        return merge_all(parts)

    def save(self, directory: str | Path) -> Path:
        """Write ``moments.safetensors`` and ``moments.json`` (schema, versions, counts, checksums) into a directory."""
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for number, key in enumerate(self):
            entry = self._entries[key]
            tensors[f"{number}.mean"] = entry.mean
            note = {**key._asdict(), "count": entry.count, "form": "sums" if entry.rows is None else "rows"}
            if entry.rows is not None:
                tensors[f"{number}.rows"] = entry.rows
            else:
                tensors |= {f"{number}.{name}": getattr(entry.sums, name) for name in _SUMS}
                note["fourth"] = entry.sums.fourth
            entries.append(note)
        files.save_artifact(
            directory,
            _NAME,
            kind=_KIND,
            schema=_SCHEMA,
            data={"safetensors": files.tensor_bytes(tensors)},
            content={
                "versions": package_versions(),
                "width": self.width,
                "folds": self.folds,
                "keep": self.keep,
                "seed": self.seed,
                "entries": entries,
            },
        )
        return Path(directory)

    @classmethod
    def load(cls, directory: str | Path) -> "MomentsTable":
        """Read what :meth:`save` wrote, in this version or an older one; nothing is executed.

        Raises:
            FileNotFoundError: If a file is not there.
            SubspaceFileError: If a file is damaged, of another kind, or of a newer schema, or holds no moments.
        """
        path = Path(directory) / f"{_NAME}.json"
        try:
            manifest = files.read_object(path, kind="MomentsTable")
            if manifest.get("kind") == _KIND and manifest.get("schema") == 1 and {*manifest} == _KEYS_1:
                data = _data_of_1(manifest, path.with_suffix(".safetensors"))
            else:
                data, manifest = files.load_artifact(directory, _NAME, kind=_KIND, schema=_SCHEMA, oldest=2)
            tensors = files.tensors_of(data, where=path.with_suffix(".safetensors"))
        except ArtifactError as error:
            raise SubspaceFileError(str(error)) from None
        try:
            for name in ("width", "folds", "seed"):
                if type(manifest[name]) is not int:
                    raise SubspaceError(f"{name} must be a whole number, got {manifest[name]!r}")
            table = cls(manifest["width"], folds=manifest["folds"], keep=manifest["keep"], seed=manifest["seed"])
            for number, note in enumerate(manifest["entries"]):
                key = MomentsKey(note["fold"], note["label"], note["modality"])
                if type(key.fold) is not int or not 0 <= key.fold < table.folds or key in table._entries:
                    raise SubspaceError(f"fold of entry {number} must be one of {table.folds}, once a class, got {key}")
                if not isinstance(key.label, str) or not isinstance(key.modality, str):
                    raise SubspaceError(f"label and modality of entry {number} must be texts, got {key}")
                table._entries[key] = _entry(tensors, number, note, table.width)
        except (KeyError, TypeError, ValueError) as error:
            raise SubspaceFileError(
                f"{directory} must hold a whole MomentsTable, got {error!r}; save it again"
            ) from None
        return table

    def _add(self, key: MomentsKey, moments: Moments) -> None:
        if key in self._entries:
            moments = self._entries[key].merge(moments)
        keeps_rows = form_of(moments.count, self.width, self.keep) == "rows"
        self._entries[key] = moments if keeps_rows else moments.without_rows()


def merge_all(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows of some sets, at least one; see :meth:`Moments.merge`."""
    if not parts:
        raise TooFewRowsError("parts must be one set of moments or more, got none; give some")
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _data_of_1(manifest: Mapping[str, Any], path: Path) -> dict[str, bytes]:
    """The tensor file of schema 1, whose manifest had no sum of its own."""
    data = path.read_bytes()
    if files.sha256(data) != manifest["sha256"]:
        raise SubspaceFileError(
            f"{path} must be the file its manifest describes, but its checksum differs; copy both files again"
        )
    return {"safetensors": data}


def _entry(tensors: Mapping[str, Tensor], number: int, note: Mapping[str, Any], width: int) -> Moments:
    rows, count = note["form"] == "rows", note["count"]
    shapes = {"mean": (width,), "rows": (count, width)}
    if not rows:
        shapes = {"mean": (width,), "scatter": (width, width)} | {name: (width,) for name in _SUMS[1:]}
    if type(count) is not int or count < 1 or note["form"] not in ("rows", "sums"):
        raise SubspaceError(f"entry {number} must have a form and a count of 1 or more, got {dict(note)}")
    held = {name: tensors[f"{number}.{name}"] for name in shapes}
    for name, tensor in held.items():
        if tensor.dtype != torch.float64 or tuple(tensor.shape) != shapes[name] or not bool(tensor.isfinite().all()):
            raise SubspaceError(
                f"{name} of entry {number} must be finite float64 of shape {shapes[name]}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}{'' if bool(tensor.isfinite().all()) else ' with NaN or infinity'}"
            )
    mean = held.pop("mean")
    if rows:
        return Moments(mean, held["rows"])
    fourth = note["fourth"]
    if not isinstance(fourth, float) or not fourth >= 0 or bool((held["scatter"].diagonal() < 0).any()):
        raise SubspaceError(f"sums of entry {number} must be of squares and fourth powers, got negative ones")
    return Moments(mean, None, Sums(count=count, fourth=fourth, **held))
