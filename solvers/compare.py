"""``compare``: several solvers on one problem from one start, as a table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ocnopt.ocp import OCP
from ocnopt.solvers.solution import Solution
from ocnopt.solvers.solve import Solver, make_solver, read_guess
from ocnopt.staged import StagedOCP, transcribe

HEAD = ("solver", "cost", "T", "iterations", "time [s]", "build [s]", "max |dx|", "converged")


@dataclass(frozen=True)
class Row:
    """One solver's line: worst case over a batch, cost summed over it; ``note`` says what the numbers do not."""

    solver: str
    cost: float
    horizon: float
    iterations: int
    wall_time: float
    build_time: float
    state_difference: float
    converged: bool
    status: str
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """The line as text, in the order of ``HEAD``."""
        numbers = (f"{self.cost:.10g}", f"{self.horizon:.6g}", str(self.iterations))
        times = (f"{self.wall_time:.3f}", f"{self.build_time:.3f}")
        return self.solver, *numbers, *times, f"{self.state_difference:.1e}", "yes" if self.converged else "no"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rows in the order asked for, and the solutions by solver name; ``print`` shows the table."""

    rows: tuple[Row, ...]
    solutions: dict[str, Solution]

    def __str__(self) -> str:
        table = [HEAD, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table]
        return "\n".join("  ".join(line).rstrip() for line in padded)


def compare(
    problem: OCP | StagedOCP,
    solvers: Sequence[str | Solver] = ("ddp", "casadi"),
    *,
    steps: int = 100,
    integrator: str = "rk4",
    initial_guess: Any = None,
) -> Comparison:
    """Solve with each solver from the same start.

    Args:
        problem: continuous or discrete.
        solvers: names or solver objects.
        steps: N, for a continuous problem.
        integrator: for a continuous problem.
        initial_guess: as for ``solve``.

    Returns:
        Rows with cost, T, iterations, time and the largest state difference to the first solver.
    """
    staged = problem if isinstance(problem, StagedOCP) else transcribe(problem, steps, integrator)
    guess = read_guess(staged, initial_guess)
    solutions: dict[str, Solution] = {}
    rows: list[Row] = []
    for solver in solvers:
        solution = make_solver(solver, {}).solve(staged, guess)
        name = solver if isinstance(solver, str) else type(solver).__name__.lower()
        while name in solutions:
            name += "'"
        solutions[name] = solution
        rows.append(_row(name, solution, solutions[next(iter(solutions))]))
    return Comparison(tuple(rows), solutions)


def _row(name: str, solution: Solution, first: Solution) -> Row:
    return Row(
        solver=name,
        cost=float(solution.cost.sum()),
        horizon=float(solution.horizon.max()),
        iterations=int(solution.iterations.max()),
        wall_time=solution.wall_time,
        build_time=solution.build_time,
        state_difference=max(float((a - b).abs().max()) for a, b in zip(_nodes(solution), _nodes(first), strict=True)),
        converged=bool(solution.converged.all()),
        status=solution.status if isinstance(solution.status, str) else "; ".join(dict.fromkeys(solution.status)),
    )


def _nodes(solution: Solution) -> tuple[Tensor, ...]:
    return solution.states if isinstance(solution.states, tuple) else torch.unbind(solution.states, dim=-2)
