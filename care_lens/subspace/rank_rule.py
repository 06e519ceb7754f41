"""What decides how many directions a fit keeps: one protocol, the package's own rules, and rules of one's own.

A rule is a function of eigenvalues and of what they are compared with, ``rule(eigenvalues, null) -> rank``. What it is given is said
by its attribute ``evidence``:

- "floor" (the default): the eigenvalues of the fit, descending, [k]; null [1, k], the eigenvalue where there is no effect.
- "permutation": one direction after the other, each found after those before it were taken out of the rows; null [draws, k], the
  first eigenvalue of fits with permuted labels. The rule is asked after each direction, and the search goes on while it keeps all.
- "heldout": malicious over benign energy of each direction on rows that the fit did not see, [k]; null [draws, k], the largest
  such ratio of benign rows against benign rows.

A plain function will do, and so will any object that can be called:

    def elbow(eigenvalues, null):
        return int((eigenvalues[:-1] / eigenvalues[1:]).argmax()) + 1

    SafetySubspace.fit(benign, malicious, rank=elbow)
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.renames import renamed_fields
from care_lens.subspace.errors import SubspaceError

Evidence = Literal["floor", "permutation", "heldout"]
"""What a rule looks at; see the module."""


@runtime_checkable
class RankRule(Protocol):
    """How many leading directions are kept.

    Args:
        eigenvalues: [k] in float64, one for each direction, in their order.
        null: [draws, k] what they are compared with: values of directions where there is nothing to find.

    Returns:
        A whole number from 0 to k. Where it is 0, a fit keeps one direction and warns.

    The optional attributes ``evidence`` and ``name`` say what the rule is given ("floor" if it does not say) and what the fit's
    diagnostics call it; ``draws`` is the number of permuted fits (19). Fields of a dataclass that are numbers or texts are kept in the
    diagnostics too. With an optional method ``thresholds(eigenvalues, null)`` they hold what each direction had to exceed.
    """

    def __call__(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> int: ...


@dataclass(frozen=True)
class EnergyRank:
    """The least rank whose directions hold a share of the excess energy.

    The excess of a direction is its eigenvalue less a floor: 1, at which malicious rows have the energy of benign
    ones, or the eigenvalue of the directions orthogonal to all rows, if that is larger (with metric="identity"
    the latter alone). The excess is summed over the directions that the rows determine, 64 at most.

    Attributes:
        share: In (0, 1].

    Raises:
        SubspaceError: If the share is not.

    Example:
        >>> import torch
        >>> from care_lens.subspace import EnergyRank
        >>> EnergyRank(0.7)(torch.tensor([5.0, 3.0, 2.0]), torch.ones(1, 3))  # excess 4, 2, 1
        2
    """

    share: float = 0.9
    name: ClassVar[str] = "energy"
    evidence: ClassVar[Evidence] = "floor"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SubspaceError(f"share must be in (0, 1], got {self.share!r}")

    def __call__(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> int:
        """The rank."""
        excess = (eigenvalues - self.thresholds(eigenvalues, null)).clamp(min=0)
        total = float(excess.sum())
        if not total > 0:
            return 0
        reached = excess.cumsum(dim=0) >= self.share * total * (1 - 1e-12)
        return int(reached.nonzero()[0]) + 1

    def thresholds(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> Float[Tensor, "k"]:
        """The floor of each direction."""
        return null.amax(dim=0)


@renamed_fields(level="significance")
@dataclass(frozen=True)
class PermutationRank:
    """Parallel analysis, one direction after the other: those whose eigenvalue permuted labels do not reach.

    Labels of whole items are permuted and the fit is repeated. The first direction stays if its eigenvalue is above the
    ``ceil((draws+1)(1-significance))``-th smallest first eigenvalue of the permuted fits. What it reads is then taken out of
    the rows of both classes, and the next is tested on what is left, up to the first that fails: beside a strong
    direction, which permuted labels spread over both classes, later eigenvalues would have no fair null. Where the
    classes are one distribution, a direction is kept with probability ``significance`` at most. contrast="covariance" is blind
    to the means, so that each class is centred before labels are permuted. Cost: ``draws + 1`` fits a direction tested.

    Horn 1965, "A rationale and test for the number of factors in factor analysis", with the deflation of Dray 2008, "On
    the number of principal components".

    Attributes:
        draws: Number of permutations, each a fit.
        significance: Probability of keeping a direction where there is none.

    Raises:
        SubspaceError: If the significance is not in (0, 1) or there are too few draws for it.
    """

    draws: int = 19
    significance: float = 0.05
    name: ClassVar[str] = "permutation"
    evidence: ClassVar[Evidence] = "permutation"

    def __post_init__(self) -> None:
        if not 0 < self.significance < 1:
            raise SubspaceError(f"significance must be in (0, 1), got {self.significance!r}")
        if self.order > self.draws:
            raise SubspaceError(
                f"draws must be {math.ceil(round(1 / self.significance - 1, 9))} or more for significance {self.significance}, got {self.draws}"
            )

    @property
    def order(self) -> int:
        """Which order statistic of the permuted eigenvalues is the threshold, counted from 1."""
        # (draws+1)(1-significance) may fall a rounding above the whole number that it stands for.
        return math.ceil(round((self.draws + 1) * (1 - self.significance), 9))

    def __call__(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> int:
        """The rank: directions before the first that does not pass."""
        return _leading(eigenvalues, self.thresholds(eigenvalues, null))

    def thresholds(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> Float[Tensor, "k"]:
        """The order statistic of each direction's null."""
        return null.sort(dim=0).values[self.order - 1]


@dataclass(frozen=True)
class HeldOutRank:
    """``rank="auto"``: the directions before the first whose held-out malicious over benign energy is not above what benign rows
    against benign rows reach (:mod:`care_lens.subspace.auto_rank`).
    """

    name: ClassVar[str] = "auto"
    evidence: ClassVar[Evidence] = "heldout"

    def __call__(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> int:
        """The rank: directions before the first that does not pass."""
        return _leading(eigenvalues, self.thresholds(eigenvalues, null))

    def thresholds(self, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> Float[Tensor, "k"]:
        """The largest of the null, or 0."""
        return null.amax(dim=0).clamp(min=0)


RULES: dict[str, RankRule] = {"auto": HeldOutRank(), "energy": EnergyRank(), "permutation": PermutationRank()}
"""The rules that have a name."""


def rule_of(rank: Any) -> RankRule | None:
    """The rule that an argument ``rank`` stands for; None if it is a number.

    Args:
        rank: A number, the name of a rule, or a rule.

    Raises:
        SubspaceError: If it is none of these, or the rule's ``evidence`` is not known.
    """
    if isinstance(rank, str) and rank in RULES:
        return RULES[rank]
    if isinstance(rank, int) and not isinstance(rank, bool):
        return None
    if isinstance(rank, type) or not callable(rank):
        raise SubspaceError(
            f"rank must be a number, one of {sorted(RULES)}, or a rule (a function of eigenvalues and null), got {rank!r}"
            + ("; make one: " + rank.__name__ + "()" if isinstance(rank, type) else "")
        )
    if evidence_of(rank) not in get_args(Evidence):
        raise SubspaceError(f"evidence of a rank rule must be one of {get_args(Evidence)}, got {evidence_of(rank)!r}")
    rule: Any = rank
    return rule


def evidence_of(rule: Any) -> Any:
    """What a rule looks at."""
    return getattr(rule, "evidence", "floor")


def name_of_rule(rule: Any) -> str:
    """What diagnostics call a rule."""
    return str(getattr(rule, "name", None) or getattr(rule, "__name__", None) or type(rule).__name__)


def settings_of(rule: Any) -> dict[str, int | float | str]:
    """Fields of a rule that are numbers or texts."""
    if not dataclasses.is_dataclass(rule):
        return {}
    held = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return {name: value for name, value in held.items() if isinstance(value, (int, float, str))}


def decided(rule: RankRule, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> int:
    """What a rule decides.

    Raises:
        SubspaceError: If it returns anything but a whole number from 0 to k.
    """
    rank: Any = rule(eigenvalues, null)
    most = len(eigenvalues)
    if isinstance(rank, Tensor) and rank.ndim == 0 and not rank.is_floating_point() and rank.dtype != torch.bool:
        rank = int(rank)
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or not 0 <= rank.__index__() <= most:
        raise SubspaceError(
            f"the rank rule {name_of_rule(rule)} must return a whole number from 0 to {most}, the directions it was given, got {rank!r}"
        )
    return rank.__index__()


def thresholds_of(rule: Any, eigenvalues: Float[Tensor, "k"], null: Float[Tensor, "draws k"]) -> tuple[float, ...]:
    """What each direction had to exceed; empty where the rule does not say."""
    told = getattr(rule, "thresholds", None)
    return () if told is None else tuple(told(eigenvalues, null).tolist())


def _leading(values: Tensor, thresholds: Tensor) -> int:
    """Directions before the first that is not above its threshold."""
    failed = (~(values > thresholds)).nonzero()
    return int(failed[0]) if len(failed) else len(values)
