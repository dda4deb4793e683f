"""A batch solved at once over a loop of IPOPT: random initial states near the library's, milliseconds per problem."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch

import ocnopt as oc
from tests.benchmarks.control import COMPILED, IPOPT, LOWERED, Way, timed_solve

PROBLEMS = ("pendulum_swing_up", "pendulum_swing_up_u5", "cartpole_swing_up_soft")
SIZES, FULL_SIZES = (64, 1024), (64, 256, 1024, 8192)
WAYS = (COMPILED, LOWERED)
# at a batch of 1024 and more
WANTED = {"compiled": 60, "lowered": 4}
SPREAD = 0.1


class Throughput(NamedTuple):
    """Times per problem; `same` counts the problems of the loop for which both found the same cost."""

    name: str
    converged: int
    milliseconds: float
    ipopt_milliseconds: float
    same: int
    rows: int

    @property
    def gain(self) -> float:
        """Throughput over that of the loop."""
        return self.ipopt_milliseconds / self.milliseconds


class Scaling(NamedTuple):
    """Milliseconds per problem in small batches and in a large one, and the median of their ratios."""

    small: float
    large: float
    ratio: float


def starts_near(name: str, batch: int) -> torch.Tensor:
    """Initial states near that of the library."""
    state = oc.problems.control(name).build().initial_state
    noise = torch.randn(batch, state.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return state + SPREAD * noise


def measure(name: str, batch: int, ways: Sequence[Way] = WAYS, steps: int = 100, rows: int = 6) -> list[Throughput]:
    """Half of the loop, the batch each way, the other half."""
    record = oc.problems.control(name)
    starts = starts_near(name, batch)

    def loop(part: torch.Tensor) -> oc.Solution:
        return timed_solve(record.build(initial_state=part), IPOPT, steps)

    before = loop(starts[: rows // 2])
    together = [timed_solve(record.build(initial_state=starts), way, steps) for way in ways]
    after = loop(starts[rows // 2 : rows])
    costs = torch.cat([before.cost, after.cost])
    return [
        Throughput(
            way.name,
            int(solution.converged.sum()),
            1e3 * solution.wall_time / batch,
            1e3 * (before.wall_time + after.wall_time) / rows,
            int(torch.isclose(solution.cost[:rows], costs, rtol=1e-6, atol=1e-9).sum()),
            rows,
        )
        for way, solution in zip(ways, together, strict=True)
    ]


def scaling(
    name: str, small: int = 256, large: int = 8192, steps: int = 100, parts: int = 4, repeats: int = 3
) -> Scaling:
    """Some small batches out of the large one, the large one, and so on."""
    record, starts = oc.problems.control(name), starts_near(name, large)

    def each(part: torch.Tensor) -> float:
        return 1e3 * timed_solve(record.build(initial_state=part), COMPILED, steps).wall_time / len(part)

    chosen = starts.split(small)[:parts]
    rounds = [(sum(each(part) for part in chosen) / len(chosen), each(starts)) for _ in range(repeats)]
    few, many = (median(column) for column in zip(*rounds, strict=True))
    return Scaling(few, many, median(there / here for here, there in rounds))
