"""Choosing the rank from held-out rows.

A direction is worth keeping if, on rows that the fit did not see, malicious rows have more energy along it
than benign rows do, by more than a fit that has nothing to find would show. Both figures come from grouped
cross-validation:

- observed: in each fold fit on the other folds, then on the fold's rows take, for the j-th direction, the
  malicious and the benign energy about the training mean; sum both over the folds; their ratio is r_j.
- null: draw benign groups at random, as many as the malicious class has but at most half, call them malicious
  and do the same; take the largest r_j. Repeat; the threshold is the largest of all repeats.

The rank is the number of leading directions before the first whose r_j is not above the threshold
(:class:`~care_lens.subspace.rank_rule.HeldOutRank`; a rule of one's own with ``evidence = "heldout"`` is given the same
figures). With R repeats a class with nothing to find passes its first direction with probability about 1/(R + 1) or less.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_lens.subspace.errors import TooFewRowsError
from care_lens.subspace.rank_rule import HeldOutRank, RankRule, decided, name_of_rule

_FOLDS = 4
_LEAST_GROUPS = (8, 4)
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
        rule: Which rule decided.
    """

    rank: int
    ratios: tuple[float, ...]
    threshold: float
    folds: int
    draws: int
    rule: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "passed": self.rank,
            "heldout_ratios": list(self.ratios),
            "threshold": self.threshold,
            "folds": self.folds,
            "null_draws": self.draws,
            **({} if self.rule == "auto" else {"rule": self.rule}),
        }


def choose_rank(
    benign: Tensor,
    malicious: Tensor,
    directions: Directions,
    *,
    groups: tuple[Sequence[str], Sequence[str]],
    seed: int,
    rule: RankRule | None = None,
) -> RankChoice:
    """Choose a rank by held-out energy against a benign-against-benign null.

    Args:
        benign: [n_b, d] float64 rows.
        malicious: [n_m, d] float64 rows.
        directions: The fit, at the largest rank that comes into question.
        groups: The item of each benign and of each malicious row; rows of one item are never on both sides of
            a split.
        seed: Of the folds and the null draws.
        rule: What decides on the ratios; None: HeldOutRank.

    Returns:
        The choice.

    Raises:
        TooFewRowsError: If the benign rows have fewer than 8 groups or the malicious ones fewer than 4.
    """
    names = [list(dict.fromkeys(items)) for items in groups]
    if any(len(found) < least for found, least in zip(names, _LEAST_GROUPS, strict=True)):
        raise TooFewRowsError(
            f"rank='auto' needs {_LEAST_GROUPS[0]} groups of benign and {_LEAST_GROUPS[1]} of malicious rows "
            f"or more, got {len(names[0])} and {len(names[1])}; give a rank or more items"
        )
    generator = torch.Generator().manual_seed(seed)
    ratios = _heldout_ratios((benign, malicious), groups, directions, generator)
    largest = []
    for _ in range(_NULL_DRAWS):
        order = torch.randperm(len(names[0]), generator=generator).tolist()
        leaving = {names[0][i] for i in order[: min(len(order) // 2, len(names[1]))]}
        sides = [[i for i, item in enumerate(groups[0]) if (item in leaving) == away] for away in (False, True)]
        items = ([groups[0][i] for i in sides[0]], [groups[0][i] for i in sides[1]])
        null = _heldout_ratios((benign[sides[0]], benign[sides[1]]), items, directions, generator)
        largest.append(max([0.0, *null.tolist()]))
    rule = HeldOutRank() if rule is None else rule
    null = torch.tensor(largest, dtype=ratios.dtype)[:, None].expand(-1, len(ratios))
    rank = decided(rule, ratios, null)
    return RankChoice(rank, tuple(ratios.tolist()), max(largest), _FOLDS, _NULL_DRAWS, name_of_rule(rule))


def heldout_energies(
    rows: tuple[Tensor, Tensor],
    groups: tuple[Sequence[str], Sequence[str]],
    directions: Directions,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Energy of every row along directions that were fitted without its item.

    Args:
        rows: [n_b, d] benign and [n_m, d] malicious rows, float64.
        groups: The item of each; rows of one item are held out together.
        directions: The fit.
        generator: Of the folds.

    Returns:
        [n_b, k] benign and [n_m, k] malicious squared coordinates about the training means, in the order of the
        rows; k is the least number of directions that a fold's fit determined.
    """
    fold_of = _assign(groups, generator)
    folded = [torch.tensor([fold_of[item] for item in items]) for items in groups]
    energies: list[list[Tensor]] = [[], []]
    for fold in range(_FOLDS):
        train = [part[index != fold] for part, index in zip(rows, folded, strict=True)]
        found, *centres = directions(train[0], train[1])
        for side, (part, index, centre) in enumerate(zip(rows, folded, centres, strict=True)):
            energies[side].append(((part[index == fold] - centre) @ found).square())
    shared = min(energy.shape[1] for energy in energies[0])
    joined = []
    for side, index in zip(energies, folded, strict=True):
        # Folds come one after the other; put the rows back in their places.
        places = torch.cat([(index == fold).nonzero()[:, 0] for fold in range(_FOLDS)])
        ordered = torch.cat([energy[:, :shared] for energy in side])
        joined.append(torch.empty_like(ordered).index_copy_(0, places, ordered))
    return joined[0], joined[1]


def _heldout_ratios(
    rows: tuple[Tensor, Tensor],
    groups: tuple[Sequence[str], Sequence[str]],
    directions: Directions,
    generator: torch.Generator,
) -> Tensor:
    """[k] ratio of malicious to benign mean energy, each over all held-out rows."""
    benign, malicious = heldout_energies(rows, groups, directions, generator)
    return malicious.mean(dim=0) / benign.mean(dim=0)


def _assign(groups: tuple[Sequence[str], Sequence[str]], generator: torch.Generator) -> dict[str, int]:
    """Deal groups to folds: those of both classes, of the benign only, of the malicious only, so that each is
    even."""
    benign, malicious = (dict.fromkeys(items) for items in groups)
    both = [item for item in benign if item in malicious]
    fold_of: dict[str, int] = {}
    for start, stratum in (
        (0, both),
        (len(both), [item for item in benign if item not in malicious]),
        (len(both), [item for item in malicious if item not in benign]),
    ):
        for position, index in enumerate(torch.randperm(len(stratum), generator=generator).tolist()):
            fold_of[stratum[index]] = (start + position) % _FOLDS
    return fold_of
