"""Rows by item: drawing, halving and relabelling items whole, so that rows of one item stay together.

Items with rows in both classes, in the benign one only and in the malicious one only are dealt separately, so
that both classes keep their numbers of items in every draw.
"""

from collections.abc import Sequence

import torch

from care_lens.subspace.errors import SubspaceError, TooFewRowsError

Groups = tuple[Sequence[str], Sequence[str]]
Indices = tuple[list[int], list[int]]


class Items:
    """The items of benign and of malicious rows.

    Args:
        groups: The item of each benign and of each malicious row; None: every row is an item by itself.
        counts: Numbers of rows.

    Raises:
        SubspaceError: If groups and rows differ in length.
    """

    def __init__(self, groups: Groups | None, counts: tuple[int, int]) -> None:
        if groups is None:
            groups = ([f"benign {i}" for i in range(counts[0])], [f"malicious {i}" for i in range(counts[1])])
        if tuple(map(len, groups)) != counts:
            raise SubspaceError(
                f"groups must be as long as the rows {counts}, got {tuple(map(len, groups))}; give the item of "
                "each benign and of each malicious row"
            )
        self.groups: Groups = groups
        self.rows: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
        for members, names in zip(self.rows, groups, strict=True):
            for row, name in enumerate(names):
                members.setdefault(name, []).append(row)
        benign, malicious = self.rows
        self.both = [name for name in benign if name in malicious]
        self.benign_only = [name for name in benign if name not in malicious]
        self.malicious_only = [name for name in malicious if name not in benign]

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of benign and of malicious items."""
        return len(self.rows[0]), len(self.rows[1])

    def require(self, least: int, what: str) -> None:
        """Raise TooFewRowsError if either class has fewer items."""
        if min(self.counts) < least:
            raise TooFewRowsError(
                f"{what} needs {least} items or more in each class, got {self.counts[0]} benign and "
                f"{self.counts[1]} malicious; give more items"
            )

    def bootstrap(self, generator: torch.Generator) -> Indices:
        """Row numbers of a draw with replacement of as many items."""
        drawn: list[str] = []
        for stratum in (self.both, self.benign_only, self.malicious_only):
            if stratum:
                drawn += [
                    stratum[i] for i in torch.randint(len(stratum), (len(stratum),), generator=generator).tolist()
                ]
        return self._rows_of(drawn)

    def halves(self, generator: torch.Generator) -> tuple[Indices, Indices]:
        """Row numbers of two halves of the items that share none."""
        first: list[str] = []
        second: list[str] = []
        for stratum in (self.both, self.benign_only, self.malicious_only):
            order = [stratum[i] for i in torch.randperm(len(stratum), generator=generator).tolist()]
            first += order[: len(order) // 2]
            second += order[len(order) // 2 :]
        return self._rows_of(first), self._rows_of(second)

    def relabelled(self, generator: torch.Generator) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(class, row) pairs of the two classes under permuted labels.

        An item in both classes swaps its two sets of rows or does not, like the toss of a coin; the items of one
        class only are dealt anew to the two, which keep their numbers of those.
        """
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        swaps = torch.randint(2, (len(self.both),), generator=generator).tolist()
        for name, swap in zip(self.both, swaps, strict=True):
            for kind in (0, 1):
                sides[kind ^ swap].extend((kind, row) for row in self.rows[kind][name])
        units = [(0, name) for name in self.benign_only] + [(1, name) for name in self.malicious_only]
        order = torch.randperm(len(units), generator=generator).tolist()
        for place, i in enumerate(order):
            kind, name = units[i]
            sides[place >= len(self.benign_only)].extend((kind, row) for row in self.rows[kind][name])
        return sides

    def _rows_of(self, names: Sequence[str]) -> Indices:
        benign, malicious = ([row for name in names for row in members.get(name, ())] for members in self.rows)
        return benign, malicious
