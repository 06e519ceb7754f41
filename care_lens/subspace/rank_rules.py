"""Evidence for rules that look at the spectrum: eigenvalues and their floor, and parallel analysis.

Both look at the eigenvalues of the fit itself. Those are inflated by overfitting when rows are few, which the
energy rule does not see and the permutation rule corrects for; the third kind of evidence, ``rank="auto"``
(``care_lens.subspace.auto_rank``), is of rows that the fit did not see. The rules themselves are in
``care_lens.subspace.rank_rule``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.items import Groups, Items
from care_lens.subspace.moments import Moments
from care_lens.subspace.rank_rule import (
    EnergyRank,
    PermutationRank,
    RankRule,
    decided,
    evidence_of,
    name_of_rule,
    settings_of,
    thresholds_of,
)
from care_lens.subspace.recipe import LARGEST_RANK, Recipe

__all__ = ["EnergyRank", "PermutationRank", "RankRule", "SpectrumRank", "rank_by_floor", "rank_of_rule"]

_DRAWS = 19
"""Permuted fits where a rule does not say how many."""


@dataclass(frozen=True)
class SpectrumRank:
    """A rank that a rule chose from the spectrum, and what it saw.

    Attributes:
        rule: "energy" or "permutation", or the name of a rule of one's own.
        rank: Number of directions that passed; may be 0.
        eigenvalues: Of the fit, those it looked at.
        thresholds: What each had to exceed; empty where the rule does not say.
        settings: The rule's options.
        p_first: Of the first direction under permuted labels; None without permutations.
    """

    rule: str
    rank: int
    eigenvalues: tuple[float, ...]
    thresholds: tuple[float, ...]
    settings: dict[str, int | float | str]
    p_first: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "rule": self.rule,
            "passed": self.rank,
            "eigenvalues": list(self.eigenvalues),
            "thresholds": list(self.thresholds),
            "p_first": self.p_first,
            **self.settings,
        }


def rank_of_rule(
    benign: Tensor, malicious: Tensor, *, rule: RankRule, recipe: Recipe, groups: Groups | None, seed: int
) -> SpectrumRank:
    """Choose a rank by a rule.

    Args:
        benign: [n_b, d] rows of any floating dtype.
        malicious: [n_m, d].
        rule: The rule.
        recipe: The options of the fit.
        groups: The item of each benign and of each malicious row; None: every row is an item.
        seed: Of the permutations.

    Returns:
        The choice.

    Raises:
        SubspaceError: As for ``SafetySubspace.fit``; TooFewRowsError for permutations of fewer than 4 items a class.
    """
    if evidence_of(rule) == "floor":
        return rank_by_floor(*recipe.moments(benign, malicious), rule=rule, recipe=recipe)
    items = Items(groups, (len(benign), len(malicious)))
    items.require(4, "a permutation rank")
    rows = [part.detach().to("cpu", torch.float64) for part in (benign, malicious)]
    if recipe.contrast == "covariance":
        rows = [part - part.mean(dim=0) for part in rows]
    draws = getattr(rule, "draws", _DRAWS)
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise SubspaceError(f"draws of a rank rule must be a whole number of 1 or more, got {draws!r}")
    generator = torch.Generator().manual_seed(seed)
    values, nulls, rank = torch.zeros(0, dtype=torch.float64), torch.zeros(draws, 0, dtype=torch.float64), 0
    while len(values) < LARGEST_RANK and rows[0].shape[1] > 0:
        found, read_along = recipe.leading(rows[0], rows[1])
        null = torch.tensor([_first(recipe, rows, items, generator) for _ in range(draws)], dtype=torch.float64)
        values, nulls = torch.cat([values, values.new_tensor([found])]), torch.cat([nulls, null[:, None]], dim=1)
        rank = decided(rule, values, nulls)
        if rank < len(values):
            break
        rows = [_without(part, read_along) for part in rows]
    p_first = (1 + int((nulls[:, 0] >= values[0]).sum())) / (draws + 1) if len(values) else 1.0
    return _told(rule, rank, values, nulls, p_first)


def _told(rule: RankRule, rank: int, values: Tensor, null: Tensor, p_first: float | None) -> SpectrumRank:
    return SpectrumRank(
        name_of_rule(rule),
        rank,
        tuple(values.tolist()),
        thresholds_of(rule, values, null),
        settings_of(rule),
        p_first,
    )


def _first(recipe: Recipe, rows: list[Tensor], items: Items, generator: torch.Generator) -> float:
    """First eigenvalue under permuted labels."""
    sides = [torch.stack([rows[kind][row] for kind, row in side]) for side in items.relabelled(generator)]
    return recipe.leading(sides[0], sides[1])[0]


def _without(rows: Tensor, along: Tensor) -> Tensor:
    """[n, d-1] rows in an orthonormal basis of what is orthogonal to [d, 1] ``C_b u``: no combination of those
    coordinates reads what u reads, in the benign metric. One Householder reflection, O(n d)."""
    reflector, tau = torch.geqrf(along)
    return torch.ormqr(reflector, tau, rows.T, left=True, transpose=True)[1:].T.contiguous()


def rank_by_floor(benign: Moments, malicious: Moments, *, rule: RankRule, recipe: Recipe) -> SpectrumRank:
    """Choose a rank by eigenvalues and their floor, which needs moments only; errors as for :func:`rank_of_rule`."""
    solution, floor = recipe.spectrum(benign, malicious, LARGEST_RANK)
    values, floor = solution.eigenvalues, floor if recipe.metric == "identity" else max(floor, 1.0)
    null = torch.full((1, len(values)), floor, dtype=values.dtype)
    return _told(rule, decided(rule, values, null), values, null, None)
