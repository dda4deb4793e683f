"""Whole solves in turn: DDP, compiled and not, and crocoddyl over CasADi with IPOPT; the torch kernel over the lowered.

Same problem, same start. NLP and kernels are built once and used by every solve; the first round of solves, which
uses them for the first time, stands apart. A solution's own `wall_time` leaves building out, and here the clock behind
it is the CPU time of this process.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from unittest.mock import patch

import ocnopt as oc
from tests.benchmarks import crocoddyl_solver as peer


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
    converged: bool


COMPILED = Way("compiled", oc.solvers.DDP(kernel="lowered", compile=True))
LOWERED = Way("lowered", oc.solvers.DDP(kernel="lowered", compile=False))
TORCH = Way("torch", oc.solvers.DDP(kernel="torch"))
IPOPT = Way("IPOPT", oc.solvers.CasADi())

PEER = Way("crocoddyl, Python", peer.Crocoddyl(peer.python_models))
PEER_C = Way("crocoddyl, C++", peer.Crocoddyl(peer.unicycle_models))
PEERS = (PEER, PEER_C)

WAYS = (COMPILED, LOWERED, IPOPT)
BESIDE = (COMPILED, LOWERED, PEER, IPOPT)
UNICYCLE = "crocoddyl_unicycle"
# problem, N, the ways, and the ratios to the last one that are wanted
CASES: list[tuple[str, int, tuple[Way, ...], tuple[float | None, ...]]] = [
    ("pendulum_swing_up", 100, BESIDE, (0.5, 1.6, None)),
    ("pendulum_swing_up", 500, WAYS, (0.5, 1.6)),
    ("pendulum_swing_up_u5", 100, BESIDE, (0.5, 1.6, None)),
    ("pendulum_swing_up_u5", 500, WAYS, (0.5, 1.6)),
    ("cartpole_swing_up_soft", 100, BESIDE, (0.5, 1.6, None)),
    ("cartpole_swing_up_soft", 500, WAYS, (0.5, 1.6)),
    ("car_parking_tassa", 500, BESIDE, (1.5, 4.0, None)),
    (UNICYCLE, 100, (COMPILED, LOWERED, PEER, PEER_C, IPOPT), (None, None, None, None)),
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


def build(name: str, steps: int) -> oc.OCP | oc.StagedOCP:
    """A problem of the library, or crocoddyl's own."""
    return peer.unicycle(steps) if name == UNICYCLE else oc.problems.control(name).build()


def measure(name: str, steps: int, ways: Sequence[Way], repeats: int = 5) -> list[Entry | None]:
    """Solve in turn; a peer that is not installed gives None, one that does not converge is asked once."""
    problem = build(name, steps)
    here = [way for way in ways if peer.INSTALLED or way not in PEERS]
    solves = {way.name: prepared(problem, way, steps) for way in here}
    first = {name: solve() for name, solve in solves.items()}
    if lost := [way.name for way in here if way not in PEERS and not bool(first[way.name].converged)]:
        raise RuntimeError(f"{name} with N = {steps}: {', '.join(lost)} did not converge")
    again = {name: solve for name, solve in solves.items() if bool(first[name].converged)}
    rounds = [{name: solve().wall_time for name, solve in again.items()} for _ in range(repeats)]
    best = {name: min(one[name] for one in rounds) if name in again else first[name].wall_time for name in solves}
    base = ways[-1].name
    cost = float(first[base].cost)
    return [
        Entry(
            way.name,
            1e3 * best[way.name],
            int(first[way.name].iterations),
            best[way.name] / best[base],
            first[way.name].wall_time / first[base].wall_time,
            abs(float(first[way.name].cost) - cost) / (1 + abs(cost)),
            way.name in again,
        )
        if way in here
        else None
        for way in ways
    ]
