"""Whole solves in turn: DDP over CasADi with IPOPT, and the torch kernel over the lowered one.

Same problem, same start. What is built beforehand, an NLP or a kernel, is not in the time: a solution's own `wall_time`
leaves it out, and here the clock behind that is the CPU time of this process.
"""

import time
from typing import NamedTuple
from unittest.mock import patch

import ocnopt as oc


class Way(NamedTuple):
    """A solver with its options."""

    name: str
    solver: oc.solvers.Solver


class Duel(NamedTuple):
    """Two solvers on one problem; times are the best of several."""

    problem: str
    steps: int
    names: tuple[str, str]
    milliseconds: tuple[float, float]
    iterations: tuple[int, int]
    costs: tuple[float, float]

    @property
    def ratio(self) -> float:
        """The first one's time over the second one's."""
        return self.milliseconds[0] / self.milliseconds[1]

    @property
    def difference(self) -> float:
        """Between the two costs, relative."""
        return abs(self.costs[0] - self.costs[1]) / (1 + abs(self.costs[1]))


LOWERED = Way("lowered", oc.solvers.DDP(kernel="lowered"))
TORCH = Way("torch", oc.solvers.DDP(kernel="torch"))
IPOPT = Way("IPOPT", oc.solvers.CasADi())

# problem, N, both ways, and the ratio wanted
CASES = [
    ("pendulum_swing_up", 100, LOWERED, IPOPT, 1.6),
    ("pendulum_swing_up", 500, LOWERED, IPOPT, 1.6),
    ("pendulum_swing_up_u5", 100, LOWERED, IPOPT, 1.6),
    ("pendulum_swing_up_u5", 500, LOWERED, IPOPT, 1.6),
    ("cartpole_swing_up_soft", 100, LOWERED, IPOPT, 1.6),
    ("cartpole_swing_up_soft", 500, LOWERED, IPOPT, 1.6),
    ("car_parking_tassa", 500, LOWERED, IPOPT, 4.0),
    ("pendulum_swing_up", 100, TORCH, LOWERED, None),
]


def solve(problem: oc.OCP | oc.StagedOCP, way: Way, steps: int) -> oc.Solution:
    """A solution whose `wall_time` is the CPU time of the search."""
    with patch.object(time, "perf_counter", time.process_time):
        return oc.solve(problem, way.solver, steps=steps)


def measure(name: str, steps: int, first: Way, second: Way, repeats: int = 5) -> Duel:
    """Solve in turn."""
    problem = oc.problems.control(name).build()
    pairs = [(solve(problem, first, steps), solve(problem, second, steps)) for _ in range(repeats)]
    sides = list(zip(*pairs, strict=True))
    if not all(bool(solution.converged) for side in sides for solution in side):
        raise RuntimeError(f"{name} with N = {steps}: a solver did not converge")
    a, b = ([(1e3 * s.wall_time, int(s.iterations), float(s.cost)) for s in side] for side in sides)
    milliseconds, iterations, costs = zip(min(a), min(b), strict=True)
    return Duel(name, steps, (first.name, second.name), milliseconds, iterations, costs)
