"""Whole solves in turn: DDP, compiled and not, over CasADi with IPOPT, and the torch kernel over the lowered one.

Same problem, same start. NLP and kernels are built once and used by every solve; the first round of solves, which
uses them for the first time, stands apart. A solution's own `wall_time` leaves building out, and here the clock behind
it is the CPU time of this process.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest.mock import patch

import ocnopt as oc


class Way(NamedTuple):
    """A solver with its options."""

    name: str
    solver: oc.solvers.Solver


class Entry(NamedTuple):
    """One way: best time, iterations (sweeps) and cost, over the last way's; `first` is of the very first solves."""

    name: str
    milliseconds: float
    iterations: int
    ratio: float
    first: float
    difference: float


COMPILED = Way("compiled", oc.solvers.DDP(kernel="lowered", compile=True))
LOWERED = Way("lowered", oc.solvers.DDP(kernel="lowered", compile=False))
TORCH = Way("torch", oc.solvers.DDP(kernel="torch"))
IPOPT = Way("IPOPT", oc.solvers.CasADi())

WAYS = (COMPILED, LOWERED, IPOPT)
# problem, N, the ways, and the ratios to the last one that are wanted
CASES: list[tuple[str, int, tuple[Way, ...], tuple[float | None, ...]]] = [
    ("pendulum_swing_up", 100, WAYS, (0.5, 1.6)),
    ("pendulum_swing_up", 500, WAYS, (0.5, 1.6)),
    ("pendulum_swing_up_u5", 100, WAYS, (0.5, 1.6)),
    ("pendulum_swing_up_u5", 500, WAYS, (0.5, 1.6)),
    ("cartpole_swing_up_soft", 100, WAYS, (0.5, 1.6)),
    ("cartpole_swing_up_soft", 500, WAYS, (0.5, 1.6)),
    ("car_parking_tassa", 500, WAYS, (1.5, 4.0)),
    ("pendulum_swing_up", 100, (TORCH, LOWERED), (None,)),
]


def timed_solve(problem: oc.OCP | oc.StagedOCP, way: Way, steps: int) -> oc.Solution:
    """A solution whose `wall_time` is the CPU time of the search."""
    with patch.object(time, "perf_counter", time.process_time):
        return oc.solve(problem, way.solver, steps=steps)


def prepared(problem: oc.OCP | oc.StagedOCP, way: Way, steps: int) -> Callable[[], oc.Solution]:
    """The same solve again and again, its kernel or NLP built once."""
    built = oc.prepare(problem, way.solver, steps=steps)

    def solve() -> oc.Solution:
        with patch.object(time, "perf_counter", time.process_time):
            return built.solve()

    return solve


def measure(name: str, steps: int, ways: Sequence[Way], repeats: int = 5) -> list[Entry]:
    """Solve in turn."""
    problem = oc.problems.control(name).build()
    solves = [prepared(problem, way, steps) for way in ways]
    rounds = [[solve() for solve in solves] for _ in range(repeats + 1)]
    if not all(bool(solution.converged) for one in rounds for solution in one):
        raise RuntimeError(f"{name} with N = {steps}: a solver did not converge")
    times = [min(solution.wall_time for solution in column) for column in zip(*rounds[1:], strict=True)]
    first, cost = rounds[0], float(rounds[0][-1].cost)
    return [
        Entry(
            way.name,
            1e3 * seconds,
            int(solution.iterations),
            seconds / times[-1],
            solution.wall_time / first[-1].wall_time,
            abs(float(solution.cost) - cost) / (1 + abs(cost)),
        )
        for way, seconds, solution in zip(ways, times, first, strict=True)
    ]
