"""A fit whose number of directions is given, or decided by a rule from what the rule looks at.

A rule looks at held-out rows (rank="auto", :mod:`care_lens.subspace.auto_rank`), at the eigenvalues and their floor, or at eigenvalues
under permuted labels (both in :mod:`care_lens.subspace.rank_rules`). Held-out rows and permutations need rows; streamed moments have
none. What the rule saw goes into the diagnostics. A rule that finds no direction leaves rank 1, with a warning.
"""

import warnings
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor

from care_lens.subspace.auto_rank import RankChoice, choose_rank
from care_lens.subspace.contrast import Contrast, Metric, class_moments
from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.fitting import Projection, fit_moments
from care_lens.subspace.items import Groups, Items
from care_lens.subspace.moments import Moments
from care_lens.subspace.rank_rule import RankRule, evidence_of, rule_of
from care_lens.subspace.rank_rules import SpectrumRank, rank_by_floor, rank_of_rule
from care_lens.subspace.recipe import LARGEST_RANK, Recipe
from care_lens.subspace.shrinkage import Shrinkage, Target
from care_lens.subspace.solvers import Solver, _ritz, solve_pencil
from care_lens.subspace.solvers.pencil import signed

RankName = Literal["auto", "energy", "permutation"]


def fit_rows(
    benign: Float[Tensor, "n_b d"],
    malicious: Float[Tensor, "n_m d"],
    *,
    rank: int | RankName | RankRule,
    contrast: Contrast,
    shrinkage: Shrinkage,
    projection: Projection,
    solver: Solver,
    metric: Metric,
    groups: Groups | None,
    seed: int,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a subspace and the diagnostics of its fit on rows; see ``SafetySubspace.fit``."""
    rule, chosen = rule_of(rank), {}
    number = rank if isinstance(rank, int) else 1
    heldout = rule is not None and evidence_of(rule) == "heldout"
    if rule is not None and not heldout and contrast != "mean":
        recipe = Recipe(contrast, metric, shrinkage, solver)
        choice = rank_of_rule(benign, malicious, rule=rule, recipe=recipe, groups=groups, seed=seed)
        number, chosen = max(choice.rank, 1), {"rank_rule": choice.to_dict()}
        _warn_if_none(choice)
    if projection not in get_args(Projection):
        raise SubspaceError(f"projection must be one of {get_args(Projection)}, got {projection!r}")
    moments = class_moments(benign, malicious, contrast, metric)
    auto: RankChoice | None = None
    counts = (moments[0].count, moments[1].count)
    if groups is not None:
        Items(groups, counts)  # refuses those that are not as long as the rows
    if rule is not None and heldout and contrast != "mean":
        items = Items(groups, counts).groups
        recipe = Recipe(contrast, metric, shrinkage, solver)
        auto = _on_heldout_rows(moments, rule=rule, recipe=recipe, groups=items, seed=seed)
        number = max(auto.rank, 1)
    tensors, diagnostics = fit_moments(
        *moments,
        rank=number,
        contrast=contrast,
        shrinkage=shrinkage,
        projection=projection,
        solver=solver,
        metric=metric,
    )
    notes = {"auto_rank": None if auto is None else auto.to_dict(), "seed": seed}
    return tensors, {**diagnostics, **notes, **chosen}


def fit_streamed(
    benign: Moments,
    malicious: Moments,
    *,
    rank: int | Literal["energy"] | RankRule,
    contrast: Contrast,
    shrinkage: Shrinkage,
    projection: Projection,
    solver: Solver,
    metric: Metric,
    target: Target,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a subspace and the diagnostics of its fit on streamed moments; see ``SafetySubspace.from_moments``."""
    rule, chosen = rule_of(rank), {}
    number = rank if isinstance(rank, int) else 1
    if rule is not None and evidence_of(rule) != "floor":
        raise SubspaceError(
            f"rank must be a number, 'energy' or an EnergyRank (or a rule with evidence 'floor') for moments, got {rank!r}; other rules look at rows: use "
            "SafetySubspace.fit"
        )
    if rule is not None and contrast != "mean":
        recipe = Recipe(contrast, metric, shrinkage, solver, target)
        choice = rank_by_floor(benign, malicious, rule=rule, recipe=recipe)
        number, chosen = max(choice.rank, 1), {"rank_rule": choice.to_dict()}
        _warn_if_none(choice)
    tensors, diagnostics = fit_moments(
        benign,
        malicious,
        rank=number,
        contrast=contrast,
        shrinkage=shrinkage,
        projection=projection,
        solver=solver,
        metric=metric,
        target=target,
    )
    return tensors, {**diagnostics, **chosen}


def _on_heldout_rows(
    moments: tuple[Moments, Moments], *, rule: RankRule, recipe: Recipe, groups: Groups, seed: int
) -> RankChoice:
    """The rank that held-out energy gives; fits on parts of the rows need only be as exact as the choice is."""

    def directions(held_in: Tensor, against: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        of = recipe.moments(held_in, against)
        most = min(LARGEST_RANK, of[0].width)
        centre = of[1].mean if recipe.contrast == "covariance" else of[0].mean
        both = recipe.pencil(*of)
        if recipe.solver == "auto" and _ritz.serves(*both, most):
            # Exact eigenvectors would cost O(d^3) in each of 80 fits, and which rank is chosen does not hang on their digits.
            return signed(_ritz.leading(*both, most)), of[0].mean, centre
        return solve_pencil(*both, rank=most, solver=recipe.solver, clip=True).vectors, of[0].mean, centre

    rows = [of.centred + of.mean for of in moments]
    choice = choose_rank(rows[0], rows[1], directions, groups=groups, seed=seed, rule=rule)
    if choice.rank == 0 and choice.ratios:
        warnings.warn(
            f"rank={choice.rule!r} found no direction: held-out malicious/benign energy {choice.ratios[0]:.3g} of the "
            f"first is not above {choice.threshold:.3g}, which benign against benign reaches; rank 1 is "
            "kept, expect nothing of it",
            stacklevel=4,
        )
    return choice


def _warn_if_none(choice: SpectrumRank) -> None:
    if choice.rank == 0:
        warnings.warn(
            f"the {choice.rule} rule found no direction above its threshold; rank 1 is kept, expect nothing of it",
            stacklevel=4,
        )
