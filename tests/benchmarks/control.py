"""Whole solves in turn: DDP over CasADi with IPOPT, and the torch kernel over the lowered one.

Same problem, same start. NLP and kernel are built once and used by every solve; the first pair of solves, which uses
them for the first time, stands apart. A solution's own `wall_time` leaves building out, and here the clock behind it
is the CPU time of this process.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import ocnopt as oc
from ocnopt.solvers.direct import attempts


class Way(NamedTuple):
    """A solver with its options."""

    name: str
    solver: oc.solvers.Solver


class Duel(NamedTuple):
    """Two solvers on one problem; times are the best of several, `first_ratio` is that of the very first solves."""

    problem: str
    steps: int
    names: tuple[str, str]
    milliseconds: tuple[float, float]
    iterations: tuple[int, int]
    costs: tuple[float, float]
    first_ratio: float

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


def built_once(make: Callable[..., Any]) -> Callable[..., Any]:
    """What the first call makes, for every call."""
    built: list[Any] = []

    def again(*arguments: Any, **options: Any) -> Any:
        if not built:
            built.append(make(*arguments, **options))
        return built[0]

    return again


def timed_solve(problem: oc.OCP | oc.StagedOCP, way: Way, steps: int) -> oc.Solution:
    """A solution whose `wall_time` is the CPU time of the search."""
    with patch.object(time, "perf_counter", time.process_time):
        return oc.solve(problem, way.solver, steps=steps)


def prepared(problem: oc.OCP | oc.StagedOCP, way: Way, steps: int) -> Callable[[], oc.Solution]:
    """The same solve again and again, its kernel or NLP built once."""
    kernel, nlp = built_once(oc.solvers.DDP._kernel), built_once(attempts.make_solver)

    def solve() -> oc.Solution:
        with patch.object(oc.solvers.DDP, "_kernel", kernel), patch.object(attempts, "make_solver", nlp):
            return timed_solve(problem, way, steps)

    return solve


def measure(name: str, steps: int, first: Way, second: Way, repeats: int = 5) -> Duel:
    """Solve in turn."""
    problem = oc.problems.control(name).build()
    solve_first, solve_second = (prepared(problem, way, steps) for way in (first, second))
    pairs = [(solve_first(), solve_second()) for _ in range(repeats + 1)]
    sides = list(zip(*pairs[1:], strict=True))
    if not all(bool(solution.converged) for side in sides for solution in side):
        raise RuntimeError(f"{name} with N = {steps}: a solver did not converge")
    a, b = ([(1e3 * s.wall_time, int(s.iterations), float(s.cost)) for s in side] for side in sides)
    milliseconds, iterations, costs = zip(min(a), min(b), strict=True)
    first_ratio = pairs[0][0].wall_time / pairs[0][1].wall_time
    return Duel(name, steps, (first.name, second.name), milliseconds, iterations, costs, first_ratio)
