"""Captured activations: one row an example for each site and selection, saved as safetensors and json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from care_lens.core.display import LinesRepr, listed
from care_lens.core.errors import ArtifactError, CareLensError
from care_lens.core.files import load_artifact, read_object, save_artifact, tensors_of
from care_lens.core.renames import renamed
from care_lens.core.site import Site, SiteLike

_SCHEMA = 2


class NotCapturedError(CareLensError, KeyError):
    """Activations were asked for that were not captured."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError shows its message in quotes


Key = tuple[Site, str]


@dataclass(frozen=True, eq=False)
class Activations(LinesRepr):
    """Activations of examples, pooled over selections of positions.

    Attributes:
        values: For each site and selection, [n, d] float32 rows on the CPU; NaN where an example has no such
            positions.
        present: For each site and selection, [n] whether the example has such positions.
        ids: The examples' ids.
        groups: The items that the examples are about: clusters for intervals and for cross-validation.
        provenance: What made them, JSON-able.

    Raises:
        ValueError: If lengths disagree.
    """

    values: Mapping[Key, Float[Tensor, "n d"]]
    present: Mapping[Key, Bool[Tensor, " n"]]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = {len(rows) for rows in (*self.values.values(), *self.present.values())}
        if lengths - {len(self.ids)} or len(self.groups) != len(self.ids):
            raise ValueError(
                f"all rows must be of one length, got {len(self.ids)} ids, {len(self.groups)} groups "
                f"and rows of {sorted(lengths)}"
            )
        if self.values.keys() != self.present.keys():
            raise ValueError("values and present must have the same sites and selections")

    def shown(self) -> tuple[str, dict[str, str]]:
        """How many examples, where and over which tokens."""
        selections = dict.fromkeys(selection for _, selection in self.values)
        rows = {
            "sites": listed(self.sites),
            "select": listed(selections),
            "of": f"{len(set(self.groups))} groups",
            "model": str(self.provenance.get("model", "")),
            "see": ".rows(site, positions), .sites, .ids, .groups, .provenance",
        }
        return f"Activations: {len(self)} examples", rows

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in the order of the forward pass."""
        return tuple(sorted({site for site, _ in self.values}))

    def selections(self, site: SiteLike) -> tuple[str, ...]:
        """The selections held at a site."""
        wanted = Site.parse(site)
        return tuple(select for at, select in self.values if at == wanted)

    @renamed(select="positions")
    def has(self, site: SiteLike, positions: str) -> Bool[Tensor, " n"]:
        """Which examples have positions of that selection (an image, a response).

        Args:
            site: The site.
            positions: The selection.

        Returns:
            [n] mask, for :meth:`subset`.

        Raises:
            KeyError: If that was not captured.
        """
        return self.present[self._key(site, positions)]

    @renamed(select="positions")
    def rows(self, site: SiteLike, positions: str) -> Float[Tensor, "n d"]:
        """The rows of all examples.

        Args:
            site: The site.
            positions: The selection.

        Returns:
            [n, d] float32 on the CPU.

        Raises:
            KeyError: If that was not captured.
            ValueError: If an example has no such positions.
        """
        key = self._key(site, positions)
        if not bool(self.present[key].all()):
            lacking = (~self.present[key]).nonzero()[:, 0].tolist()
            raise ValueError(
                f"every example must have positions of selection {positions!r} at {key[0]}, {len(lacking)} "
                f"of {len(self)} have none (first: {self.ids[lacking[0]] or lacking[0]!r}); take the others "
                "with .subset(activations.has(site, positions))"
            )
        return self.values[key]

    def subset(self, which: Bool[Tensor, " n"] | Sequence[int]) -> "Activations":
        """Some of the examples.

        Args:
            which: [n] mask, or indices in the order wanted.

        Returns:
            Their activations.

        Raises:
            ValueError: If a mask is of another length.
        """
        if isinstance(which, Tensor):
            if len(which) != len(self):
                raise ValueError(f"mask must be of length {len(self)}, got {len(which)}")
            which = which.nonzero()[:, 0].tolist()
        if out := [i for i in which if not -len(self) <= i < len(self)]:
            raise ValueError(f"which must name some of the {len(self)} examples, got {out[0]}")
        index = torch.tensor(list(which), dtype=torch.long)
        return Activations(
            values={key: rows[index] for key, rows in self.values.items()},
            present={key: rows[index] for key, rows in self.present.items()},
            ids=tuple(self.ids[i] for i in index.tolist()),
            groups=tuple(self.groups[i] for i in index.tolist()),
            provenance=self.provenance,
        )

    @classmethod
    def concatenate(cls, parts: Sequence["Activations"]) -> "Activations":
        """The examples of several, one after the other; provenance is the first one's.

        Raises:
            ValueError: If there are none, or their sites and selections differ.
        """
        if not parts:
            raise ValueError("parts must hold at least one Activations, got none")
        if wrong := [type(part).__name__ for part in parts if not isinstance(part, cls)]:
            raise ValueError(f"parts must be of care_lens.Activations, got {wrong[0]}")
        first = parts[0]
        if any(part.values.keys() != first.values.keys() for part in parts):
            raise ValueError("parts must have the same sites and selections; capture them with the same arguments")
        return cls(
            values={key: torch.cat([part.values[key] for part in parts]) for key in first.values},
            present={key: torch.cat([part.present[key] for part in parts]) for key in first.present},
            ids=tuple(name for part in parts for name in part.ids),
            groups=tuple(group for part in parts for group in part.groups),
            provenance=first.provenance,
        )

    def save(self, directory: str | Path, name: str) -> Path:
        """Write ``name.safetensors`` and ``name.json``, which holds the sums of both, into a directory.

        Args:
            directory: Made if it does not exist.
            name: Stem of both files.

        Returns:
            The path of the safetensors file.

        Raises:
            ArtifactError: If files of that name are there that care_lens did not write.
        """
        tensors: dict[str, Tensor] = {}
        for i, key in enumerate(self.values):
            tensors[f"values.{i}"] = self.values[key].contiguous()
            tensors[f"present.{i}"] = self.present[key].contiguous()
        save_artifact(
            directory,
            name,
            kind=type(self).__name__,
            schema=_SCHEMA,
            data={"safetensors": tensors_to_bytes(tensors)},
            content={
                "keys": [(str(site), select) for site, select in self.values],
                "ids": self.ids,
                "groups": self.groups,
                "provenance": self.provenance,
            },
        )
        return Path(directory) / f"{name}.safetensors"

    @classmethod
    def load(cls, directory: str | Path, name: str) -> "Activations":
        """Read what :meth:`save` wrote; files of schema 1, which have no sums, are read too.

        Raises:
            FileNotFoundError: If a file is not there.
            ArtifactError: If the files are damaged, hold something else, or come from a newer schema.
        """
        path = Path(directory) / f"{name}.json"
        held = read_object(path, kind=cls.__name__)
        if "files" not in held and held.get("schema") == 1 and held.get("kind") == cls.__name__:
            manifest, data = held, {"safetensors": path.with_suffix(".safetensors").read_bytes()}
        else:
            data, manifest = load_artifact(directory, name, kind=cls.__name__, schema=_SCHEMA)
        tensors = tensors_of(data, where=path)
        try:
            keys = [(Site.parse(site), select) for site, select in manifest["keys"]]
            found = cls(
                values={key: tensors[f"values.{i}"] for i, key in enumerate(keys)},
                present={key: tensors[f"present.{i}"] for i, key in enumerate(keys)},
                ids=tuple(manifest["ids"]),
                groups=tuple(manifest["groups"]),
                provenance=manifest["provenance"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} must describe the activations beside it, got others ({error}); copy both files again, or capture again"
            ) from error
        rows = {
            len(found.ids),
            len(found.groups),
            *(len(part) for part in (*found.values.values(), *found.present.values())),
        }
        if len(rows) > 1 or len(tensors) != 2 * len(found.values):
            raise ArtifactError(
                f"{path} must have one id and one group for each row, and a site and selection for each of {len(tensors) // 2} tables, got "
                f"{sorted(rows)} rows and {len(found.values)} keys; copy both files again, or capture again"
            )
        return found

    def _key(self, site: SiteLike, select: str) -> Key:
        key = (Site.parse(site), select)
        if key not in self.values:
            held = sorted({f"{at} {what}" for at, what in self.values})
            raise NotCapturedError(f"{key[0]} with selection {select!r} was not captured; captured were {held}")
        return key
