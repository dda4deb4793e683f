"""What the gradient of a solution costs: one backward pass over an iteration of DDP, both in torch."""

import time
from statistics import median
from time import process_time
from typing import NamedTuple
from unittest.mock import patch

import ocnopt as oc
from tests.benchmarks.batch import starts_near
from tests.benchmarks.control import COMPILED, TORCH, prepared

NAME = "pendulum_swing_up"


class Cost(NamedTuple):
    """Median milliseconds of ``backward()``, over an iteration with the torch kernel and over a compiled solve."""

    batch: int
    milliseconds: float
    over_iteration: float
    over_solve: float


def measure(batch: int, repeats: int = 7, steps: int = 100) -> Cost:
    """Solve and differentiate in turn; a loss of all states and controls, of which every one has its cotangent."""
    record, starts = oc.problems.control(NAME), starts_near(NAME, batch)
    start = (starts if batch > 1 else starts[0]).requires_grad_()
    quick = prepared(record.build(initial_state=start.detach()), COMPILED, steps)
    built = oc.prepare(record.build(initial_state=start), TORCH.solver, steps=steps)
    rounds = []
    for _ in range(repeats + 1):
        with patch.object(time, "perf_counter", process_time):
            solution = built.solve(start, differentiable=True)
        loss = solution.states.square().sum() + solution.controls.square().sum()
        began = process_time()
        loss.backward()
        spent = process_time() - began
        rounds.append((spent, solution.wall_time / int(solution.iterations.max()), quick().wall_time))
    own = [spent for spent, _, _ in rounds[1:]]
    ratios = [[one[0] / one[i] for one in rounds[1:]] for i in (1, 2)]
    return Cost(batch, 1e3 * median(own), *(median(some) for some in ratios))
