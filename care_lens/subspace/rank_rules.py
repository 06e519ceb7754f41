"""Rules for the rank that look at the spectrum: a share of the energy, and parallel analysis.

Both look at the eigenvalues of the fit itself. Those are inflated by overfitting when rows are few, which the
energy rule does not see and the permutation rule corrects for; the third rule, ``rank="auto"``
(``care_lens.subspace.auto_rank``), looks at rows that the fit did not see.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.items import Groups, Items
from care_lens.subspace.moments import Moments
from care_lens.subspace.recipe import LARGEST_RANK, Recipe


@dataclass(frozen=True)
class EnergyRank:
    """The least rank whose directions hold a share of the excess energy.

    The excess of a direction is its eigenvalue less a floor: 1, at which malicious rows have the energy of benign
    ones, or the eigenvalue of the directions that no row speaks of, if that is larger (with metric="identity"
    the latter alone). The excess is summed over the directions that the rows determine, 64 at most.

    Attributes:
        share: In (0, 1].

    Raises:
        SubspaceError: If the share is not.
    """

    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SubspaceError(f"share must be in (0, 1], got {self.share!r}")


@dataclass(frozen=True)
class PermutationRank:
    """Parallel analysis, one direction after the other: those whose eigenvalue permuted labels do not reach.

    Labels of whole items are permuted and the fit is repeated. The first direction stays if its eigenvalue is above the
    ``ceil((draws+1)(1-level))``-th smallest first eigenvalue of the permuted fits. What it reads is then taken out of
    the rows of both classes, and the next is tested on what is left, up to the first that fails: beside a strong
    direction, which permuted labels spread over both classes, later eigenvalues would have no fair null. Where the
    classes are one distribution, a direction is kept with probability ``level`` at most. contrast="covariance" is blind
    to the means, so that each class is centred before labels are permuted. Cost: ``draws + 1`` fits a direction tested.

    Horn 1965, "A rationale and test for the number of factors in factor analysis", with the deflation of Dray 2008, "On
    the number of principal components".

    Attributes:
        draws: Number of permutations, each a fit.
        level: Probability of keeping a direction where there is none.

    Raises:
        SubspaceError: If the level is not in (0, 1) or there are too few draws for it.
    """

    draws: int = 19
    level: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise SubspaceError(f"level must be in (0, 1), got {self.level!r}")
        if self.order > self.draws:
            raise SubspaceError(
                f"draws must be {math.ceil(round(1 / self.level - 1, 9))} or more for level {self.level}, got {self.draws}"
            )

    @property
    def order(self) -> int:
        """Which order statistic of the permuted eigenvalues is the threshold, counted from 1."""
        # (draws+1)(1-level) may fall a rounding above the whole number that it stands for.
        return math.ceil(round((self.draws + 1) * (1 - self.level), 9))


RankRule: TypeAlias = EnergyRank | PermutationRank


@dataclass(frozen=True)
class SpectrumRank:
    """A rank that a rule chose from the spectrum, and what it saw.

    Attributes:
        rule: "energy" or "permutation".
        rank: Number of directions that passed; may be 0.
        eigenvalues: Of the fit, those it looked at.
        thresholds: What each had to exceed.
        settings: The rule's options.
        p_first: Of the first direction under permuted labels; None for the energy rule.
    """

    rule: str
    rank: int
    eigenvalues: tuple[float, ...]
    thresholds: tuple[float, ...]
    settings: dict[str, int | float]
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
    if isinstance(rule, EnergyRank):
        return rank_by_energy(*recipe.moments(benign, malicious), rule=rule, recipe=recipe)
    items = Items(groups, (len(benign), len(malicious)))
    items.require(4, "a permutation rank")
    rows = [part.detach().to("cpu", torch.float64) for part in (benign, malicious)]
    if recipe.contrast == "covariance":
        rows = [part - part.mean(dim=0) for part in rows]
    generator = torch.Generator().manual_seed(seed)
    values, thresholds, p_first = [], [], 1.0
    while len(values) < LARGEST_RANK and rows[0].shape[1] > 0:
        found, read_along = recipe.leading(rows[0], rows[1])
        null = torch.tensor([_first(recipe, rows, items, generator) for _ in range(rule.draws)], dtype=torch.float64)
        values.append(found)
        thresholds.append(float(null.sort().values[rule.order - 1]))
        if len(values) == 1:
            p_first = (1 + int((null >= found).sum())) / (rule.draws + 1)
        if not found > thresholds[-1]:
            break
        rows = [_without(part, read_along) for part in rows]
    rank = sum(value > threshold for value, threshold in zip(values, thresholds, strict=True))
    settings = {"draws": rule.draws, "level": rule.level}
    return SpectrumRank("permutation", rank, tuple(values), tuple(thresholds), settings, p_first)


def _first(recipe: Recipe, rows: list[Tensor], items: Items, generator: torch.Generator) -> float:
    """First eigenvalue under permuted labels."""
    sides = [torch.stack([rows[kind][row] for kind, row in side]) for side in items.relabelled(generator)]
    return recipe.leading(sides[0], sides[1])[0]


def _without(rows: Tensor, along: Tensor) -> Tensor:
    """[n, d-1] rows in an orthonormal basis of what is orthogonal to [d, 1] ``C_b u``: no combination of those
    coordinates reads what u reads, in the benign metric. One Householder reflection, O(n d)."""
    reflector, tau = torch.geqrf(along)
    return torch.ormqr(reflector, tau, rows.T, left=True, transpose=True)[1:].T.contiguous()


def rank_by_energy(benign: Moments, malicious: Moments, *, rule: EnergyRank, recipe: Recipe) -> SpectrumRank:
    """Choose a rank by a share of the energy, which needs moments only; errors as for :func:`rank_of_rule`."""
    solution, floor = recipe.spectrum(benign, malicious, LARGEST_RANK)
    values, floor = solution.eigenvalues, floor if recipe.metric == "identity" else max(floor, 1.0)
    excess = (values - floor).clamp(min=0)
    total = float(excess.sum())
    rank = 0
    if total > 0:
        reached = excess.cumsum(dim=0) >= rule.share * total * (1 - 1e-12)
        rank = int(reached.nonzero()[0]) + 1
    return SpectrumRank("energy", rank, tuple(values.tolist()), (floor,) * len(values), {"share": rule.share})
