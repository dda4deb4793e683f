"""A batch solved at once over a loop of IPOPT: random initial states near the library's, milliseconds per problem."""

from typing import NamedTuple

import torch

import ocnopt as oc
from tests.benchmarks.control import IPOPT, LOWERED, timed_solve

PROBLEMS = ("pendulum_swing_up", "pendulum_swing_up_u5", "cartpole_swing_up_soft")
SIZES, FULL_SIZES = (64, 1024), (64, 1024, 8192)
SPREAD = 0.1


class Throughput(NamedTuple):
    """Times per problem; `same` counts the problems of the loop for which both found the same cost."""

    problem: str
    batch: int
    converged: int
    milliseconds: float
    ipopt_milliseconds: float
    same: int
    rows: int

    @property
    def gain(self) -> float:
        """Throughput over that of the loop."""
        return self.ipopt_milliseconds / self.milliseconds


def measure(name: str, batch: int, steps: int = 100, rows: int = 6) -> Throughput:
    """Half of the loop, the batch, the other half."""
    record = oc.problems.control(name)
    state = record.build().initial_state
    noise = torch.randn(batch, state.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = state + SPREAD * noise

    def loop(part: torch.Tensor) -> oc.Solution:
        return timed_solve(record.build(initial_state=part), IPOPT, steps)

    before = loop(starts[: rows // 2])
    together = timed_solve(record.build(initial_state=starts), LOWERED, steps)
    after = loop(starts[rows // 2 : rows])
    costs = torch.cat([before.cost, after.cost])
    return Throughput(
        name,
        batch,
        int(together.converged.sum()),
        1e3 * together.wall_time / batch,
        1e3 * (before.wall_time + after.wall_time) / rows,
        int(torch.isclose(together.cost[:rows], costs, rtol=1e-6, atol=1e-9).sum()),
        rows,
    )
