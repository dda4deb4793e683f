"""A batch solved at once over a loop of IPOPT: random initial states near the library's, milliseconds per problem."""

from collections.abc import Sequence
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


def measure(name: str, batch: int, ways: Sequence[Way] = WAYS, steps: int = 100, rows: int = 6) -> list[Throughput]:
    """Half of the loop, the batch each way, the other half."""
    record = oc.problems.control(name)
    state = record.build().initial_state
    noise = torch.randn(batch, state.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = state + SPREAD * noise

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
