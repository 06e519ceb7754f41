"""What moments and a fit will take, in bytes, before anything is allocated.

Rows are 8 N d bytes and sums 8 d^2, so that rows are kept where N < d: at d = 3584 one [d, d] float64 is 103 MB, and
28 layers of 3 sites with 4 groups of rows in 2 classes and 2 modalities would be more than most machines have.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from care_lens.subspace.errors import SubspaceError
from care_lens.subspace.moments import Moments
from care_lens.subspace.solvers import Solver, solver_workspace

Keep = Literal["auto", "rows", "sums"]
"""What moments keep: rows, sums, or whichever is smaller."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a plan takes.

    Attributes:
        width: d.
        moments: Bytes of all moments together.
        fit: Largest further bytes of one fit; 0 if no fit is planned.
        forms: Name of a set of rows to "rows" or "sums".
        sites: How many sites the moments are kept for.
        solver: The solver that the fit's figure is for, or None.
    """

    width: int
    moments: int
    fit: int = 0
    forms: Mapping[str, str] = field(default_factory=dict)
    sites: int = 1
    solver: str | None = None

    @property
    def total(self) -> int:
        """Bytes of moments and fit."""
        return self.moments + self.fit

    def __str__(self) -> str:
        kept = ", ".join(f"{name} as {form}" for name, form in self.forms.items())
        where = "1 site" if self.sites == 1 else f"{self.sites} sites"
        fit = "" if self.solver is None else f"; a fit with solver {self.solver!r} takes {_readable(self.fit)} more"
        return f"moments of width {self.width} at {where} take {_readable(self.moments)} ({kept}){fit}"


def form_of(count: int, width: int, keep: Keep) -> Literal["rows", "sums"]:
    """The form that ``keep`` means for N rows of width d: with "auto", rows where N < d."""
    if keep == "auto":
        return "rows" if count < width else "sums"
    if keep not in ("rows", "sums"):
        raise SubspaceError(f"keep must be 'auto', 'rows' or 'sums', got {keep!r}")
    return keep


def plan_memory(
    width: int,
    counts: Mapping[str, int],
    *,
    sites: int = 1,
    keep: Keep = "auto",
    solver: Solver | None = None,
    rank: int = 64,
    fit: tuple[str, str] | None = None,
) -> MemoryPlan:
    """What keeping moments, and then a fit, will take.

    Args:
        width: d.
        counts: Name of each set of rows (a class, or a fold of a class and modality) to its number of rows.
        sites: How many sites each is kept for.
        keep: What is kept of each.
        solver: Also count the working memory of a fit with this solver; None: moments only.
        rank: Its number of directions.
        fit: Names of its benign and of its malicious set; None: the first two of ``counts``.

    Returns:
        The plan; ``str(plan)`` is a sentence.

    Raises:
        SubspaceError: If ``keep`` is unknown, or a fit has no two sets.

    Example:
        >>> print(plan_memory(3584, {"benign": 720, "malicious": 720}, solver="dual"))
        moments of width 3584 at 1 site take 41 MB (benign as rows, malicious as rows); a fit with solver 'dual' ...
    """
    forms = {name: form_of(count, width, keep) for name, count in counts.items()}
    each = {name: _bytes(counts[name], width, form) for name, form in forms.items()}
    work, used = 0, None
    if solver is not None:
        names = tuple(counts)[:2] if fit is None else fit
        if len(names) < 2 or any(name not in counts for name in names):
            raise SubspaceError(f"fit must name two of {list(counts)}, got {names}; count both classes")
        columns = [counts[name] if forms[name] == "rows" else None for name in names]
        used, work = solver_workspace(width, columns[0], columns[1], rank=rank, solver=solver)
    return MemoryPlan(width, sites * sum(each.values()), work, forms, sites, used)


def plan_fit(benign: Moments, malicious: Moments, *, rank: int, solver: Solver, low_rank: bool = False) -> MemoryPlan:
    """The plan of a fit from moments that are there; ``low_rank`` if C_m is the difference of means alone."""
    both = {"benign": benign, "malicious": malicious}
    columns = [None if of.rows is None else of.count for of in both.values()]
    used, work = solver_workspace(benign.width, columns[0], 1 if low_rank else columns[1], rank=rank, solver=solver)
    forms = {name: "sums" if of.rows is None else "rows" for name, of in both.items()}
    return MemoryPlan(benign.width, benign.nbytes + malicious.nbytes, work, forms, 1, used)


def _bytes(count: int, width: int, form: str) -> int:
    return 8 * width * (count + 1 if form == "rows" else width + 4)


def _readable(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
