"""DDP against CasADi with IPOPT on the pendulum: milliseconds per iteration and whole solves, same start."""

from statistics import median
from typing import NamedTuple

import ocnopt as oc


class Solve(NamedTuple):
    """One solver on one problem: medians over repeats."""

    solver: str
    steps: int
    milliseconds_per_iteration: float
    iterations: int
    seconds: float
    cost: float


def measure(name: str = "pendulum_swing_up", steps: int = 100, repeats: int = 3) -> list[Solve]:
    """Solve in turn."""
    problem = oc.problems.control(name).build()
    found: dict[str, list[oc.Solution]] = {"ddp": [], "casadi": []}
    for _ in range(repeats):
        for solver, solutions in found.items():
            solutions.append(oc.solve(problem, solver, steps=steps))
    rows = []
    for solver, solutions in found.items():
        seconds = median(solution.wall_time for solution in solutions)
        iterations = int(solutions[0].iterations)
        rows.append(
            Solve(solver, steps, 1e3 * seconds / max(1, iterations), iterations, seconds, float(solutions[0].cost))
        )
    return rows
