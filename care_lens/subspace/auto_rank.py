"""Choosing the rank from held-out rows.

A direction is worth keeping if, on rows that the fit did not see, malicious rows have more energy along it than benign
rows do, by more than a fit that has nothing to find would show. Both figures come from grouped cross-validation:

- observed: in each fold fit on the other folds, then on the fold's rows take, for the j-th direction, the malicious and
  the benign energy about the training mean; sum both over the folds; their ratio is r_j.
- null: halve the benign groups at random, call one half malicious (with no more rows than the malicious class has) and
  do the same; take the largest r_j. Repeat; the threshold is the largest of all repeats.

The rank is the number of leading directions before the first whose r_j is not above the threshold. With R repeats a
class with nothing to find passes its first direction with probability about 1/(R + 1) or less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_lens.subspace.errors import TooFewRowsError

_FOLDS = 4
_NULL_DRAWS = 19

Directions = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From benign and malicious rows to [d, k] directions, and the centres of benign and of malicious energy."""


@dataclass(frozen=True)
class RankChoice:
    """A rank and the evidence for it.

    Attributes:
        rank: Number of leading directions that passed; 0 if not even the first did.
        ratios: Held-out malicious over benign energy of each direction.
        threshold: What benign against benign reached.
        folds: Number of folds.
        draws: Number of benign-against-benign draws.
    """

    rank: int
    ratios: tuple[float, ...]
    threshold: float
    folds: int
    draws: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "passed": self.rank,
            "heldout_ratios": list(self.ratios),
            "threshold": self.threshold,
            "folds": self.folds,
            "null_draws": self.draws,
        }


def choose_rank(
    benign: Tensor,
    malicious: Tensor,
    directions: Directions,
    *,
    groups: tuple[Sequence[str], Sequence[str]],
    seed: int,
) -> RankChoice:
    """Choose a rank by held-out energy against a benign-against-benign null.

    Args:
        benign: [n_b, d] float64 rows.
        malicious: [n_m, d] float64 rows.
        directions: The fit, at the largest rank that comes into question.
        groups: The item of each benign and of each malicious row; rows of one item are never on both sides of a split.
        seed: Of the folds and the null draws.

    Returns:
        The choice.

    Raises:
        TooFewRowsError: If the benign rows have fewer than 4 groups or the malicious ones fewer than 2.
    """
    names = [list(dict.fromkeys(items)) for items in groups]
    if len(names[0]) < 4 or len(names[1]) < 2:
        raise TooFewRowsError(
            "rank='auto' needs 4 groups of benign rows and 2 of malicious rows or more, got "
            f"{len(names[0])} and {len(names[1])}; give a rank or more items"
        )
    generator = torch.Generator().manual_seed(seed)
    folds = min(_FOLDS, len(names[0]) // 2, len(names[1]))
    ratios = _heldout_ratios((benign, malicious), groups, directions, folds, generator)
    null: list[float] = []
    while len(null) < _NULL_DRAWS:
        rows, items = _null_draw(benign, groups[0], names[0], len(malicious), generator)
        null.append(float(_heldout_ratios(rows, items, directions, folds, generator).max()))
    threshold = max(null)
    failed = (~(ratios > threshold)).nonzero()
    rank = int(failed[0]) if len(failed) else len(ratios)
    return RankChoice(rank, tuple(ratios.tolist()), threshold, folds, len(null))


def _null_draw(
    benign: Tensor, items: Sequence[str], names: list[str], most: int, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[list[str], list[str]]]:
    order = torch.randperm(len(names), generator=generator).tolist()
    half = {names[i] for i in order[: len(names) // 2]}
    stay = [i for i, item in enumerate(items) if item not in half]
    leave = [i for i, item in enumerate(items) if item in half]
    shuffled = torch.randperm(len(leave), generator=generator).tolist()
    leave = sorted(leave[i] for i in shuffled[: max(most, 2)])
    return (benign[stay], benign[leave]), ([items[i] for i in stay], [items[i] for i in leave])


def _heldout_ratios(
    rows: tuple[Tensor, Tensor],
    groups: tuple[Sequence[str], Sequence[str]],
    directions: Directions,
    folds: int,
    generator: torch.Generator,
) -> Tensor:
    """[k] ratio of malicious to benign mean energy, each over all held-out rows."""
    fold_of = _assign(groups, folds, generator)
    folded = [torch.tensor([fold_of[item] for item in items]) for items in groups]
    energies: list[list[Tensor]] = [[], []]
    for fold in range(folds):
        train = [part[index != fold] for part, index in zip(rows, folded)]
        found, *centres = directions(train[0], train[1])
        for side, (part, index, centre) in enumerate(zip(rows, folded, centres)):
            energies[side].append(((part[index == fold] - centre) @ found).square())
    shared = min(energy.shape[1] for energy in energies[0])
    benign, malicious = (torch.cat([energy[:, :shared] for energy in side]).mean(dim=0) for side in energies)
    return malicious / benign


def _assign(groups: tuple[Sequence[str], Sequence[str]], folds: int, generator: torch.Generator) -> dict[str, int]:
    """Deal groups to folds: those of both classes, of the benign only, of the malicious only, each evenly."""
    benign, malicious = (dict.fromkeys(items) for items in groups)
    strata = (
        [item for item in benign if item in malicious],
        [item for item in benign if item not in malicious],
        [item for item in malicious if item not in benign],
    )
    fold_of: dict[str, int] = {}
    for stratum in strata:
        for position, index in enumerate(torch.randperm(len(stratum), generator=generator).tolist()):
            fold_of[stratum[index]] = position % folds
    return fold_of
