"""Top of the pencil ``C_m u = lambda C_b u``: one private file a solver, behind :func:`solve_pencil`."""

from care_lens.subspace.solvers._cost import solver_workspace
from care_lens.subspace.solvers.pencil import PencilSolution, Solver, solve_pencil

__all__ = ["PencilSolution", "Solver", "solve_pencil", "solver_workspace"]
