"""Conformal p-values of a subspace's scores: how unusual an activation is among benign ones.

With the scores s_1..s_n of benign items that the fit did not see, the p-value of a score s is
``(1 + #{i: s_i >= s}) / (n + 1)``. For a new benign item, exchangeable with those, P(p <= e) <= e for every
e, whatever the distribution (Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World"); the
probability is over the calibration set too. It never goes below ``1 / (n + 1)``.

Rows of one item are not exchangeable with those of others, so that an item counts once, with its largest
score: the p-value of any one row of a new item is then on the safe side. Calibrating on rows of the fit makes
p-values too small: the fit gave those rows low energy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.errors import NonFiniteError, SubspaceError, TooFewRowsError


@dataclass(frozen=True, eq=False)
class ConformalScores(ShortRepr):
    """Scores of benign calibration items, and the p-values they give.

    Attributes:
        scores: [n] ascending float64, one an item, on the CPU.

    Example:
        >>> calibrated = ConformalScores.from_scores(torch.arange(1.0, 20.0))
        >>> calibrated.p_values(torch.tensor([0.0, 10.0, 100.0])).tolist()
        [1.0, 0.55, 0.05]
        >>> calibrated.threshold(0.05)
        19.0
    """

    scores: Float[Tensor, " n"]

    @classmethod
    def from_scores(cls, scores: Float[Tensor, " rows"], *, groups: Sequence[str] | None = None) -> "ConformalScores":
        """Calibrate.

        Args:
            scores: [rows] of benign rows that the fit did not see; larger is less benign.
            groups: The item of each row; an item counts with its largest score. None: every row is an item.

        Returns:
            The calibration.

        Raises:
            TooFewRowsError: If there are no scores.
            NonFiniteError: If a score is NaN or infinite.
            SubspaceError: If the groups are not as long as the scores.
        """
        values = scores.detach().to("cpu", torch.float64)
        if values.numel() == 0:
            raise TooFewRowsError(
                "calibration scores must be 1 or more, got none; give benign rows held out of the fit"
            )
        if not bool(values.isfinite().all()):
            raise NonFiniteError("calibration scores must be finite, got NaN or infinity; drop those rows")
        if groups is not None:
            if len(groups) != len(values):
                raise SubspaceError(f"groups must be as long as the rows ({len(values)}), got {len(groups)}")
            largest: dict[str, float] = {}
            for item, value in zip(groups, values.tolist(), strict=True):
                largest[item] = max(largest.get(item, -math.inf), value)
            values = torch.tensor(list(largest.values()), dtype=torch.float64)
        return cls(values.sort().values)

    @property
    def count(self) -> int:
        """Number of calibration items n."""
        return len(self.scores)

    def p_values(self, scores: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """``(1 + #{calibration scores >= score}) / (n + 1)``.

        Args:
            scores: [...] of the same score.

        Returns:
            [...] float64 in [1/(n+1), 1], on the CPU. NaN where a score is NaN.
        """
        values = scores.detach().to("cpu", torch.float64)
        below = torch.searchsorted(self.scores, values.contiguous())
        p = (1 + self.count - below).double() / (self.count + 1)
        return torch.where(values.isnan(), torch.nan, p)

    def threshold(self, epsilon: float) -> float:
        """The score above which p is at most epsilon: the ``ceil((n+1)(1-epsilon))``-th order statistic.

        Args:
            epsilon: Share of benign items that may exceed it, between 0 and 1.

        Returns:
            The score.

        Raises:
            SubspaceError: If epsilon is not between 0 and 1.
            TooFewRowsError: If n is below ``1/epsilon - 1``: no score is then rare enough.
        """
        if not 0 < epsilon < 1:
            raise SubspaceError(f"epsilon must be between 0 and 1, got {epsilon!r}")
        # Floats such as (n+1)(1-0.05) fall a rounding above the whole number that they stand for.
        index = math.ceil(round((self.count + 1) * (1 - epsilon), 9))
        if index > self.count:
            raise TooFewRowsError(
                f"epsilon={epsilon} needs {math.ceil(round(1 / epsilon - 1, 9))} calibration items or more, got "
                f"{self.count}; give more benign items or a larger epsilon"
            )
        return float(self.scores[index - 1])
