"""What is said of a given path, against the sums written out by hand."""

import pytest
import torch

from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.audit import audit
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close


def path(*lead):
    states = torch.linspace(0, 1, 4).double().reshape(4, *(1,) * len(lead), 1).expand(4, *lead, 1)
    return list(states), list(torch.full((3, *lead, 1), 0.5).double())


def test_cost_and_gaps_of_a_batch():
    problem = transcribe(
        OCP(
            lambda t, x, u: u,
            lambda t, x, u: (u**2).sum(-1),
            lambda t, x: t * x[..., 0],
            initial_state=torch.zeros(2, 1),
            control_dim=1,
            horizon=FreeHorizon(1.5, 1.0, 2.0),
        ),
        3,
    )
    found = audit(problem, *path(2), torch.tensor([[1.5], [3.0]]).double())
    assert_close(found.cost, [1.5 * 0.25 + 1.5, 3.0 * 0.25 + 3.0])
    assert_close(found.gaps, [3 * abs(0.25 - 1 / 3), 3 * abs(0.5 - 1 / 3)])
    assert_close(found.violation, [0.0, 1.0])  # the second end time is beyond its bound


@pytest.mark.parametrize(
    ("broken", "violation"),
    [
        ({"control_bounds": (-1.0, 0.25)}, 0.25),
        ({"path_constraint": lambda k, x, u: x - 0.25}, 0.75),  # at the end alone
        ({"path_constraint": lambda k, x, u: 0.125 - x}, 0.125),  # at the start alone
        ({"terminal_constraint": lambda x: x - 3}, 2.0),
        ({"path_constraint": lambda k, x, u: torch.log(0.9 - x)}, torch.inf),
    ],
)
def test_the_largest_violation(broken, violation):
    stage = Stage(lambda k, x, u: x + u, control_dim=1)
    for stages in ({"stages": stage, "steps": 3}, {"stages": [stage] * 3}):
        problem = StagedOCP(**stages, initial_state=[0.0], **broken)
        found = audit(problem, *path(), problem.start_parameters())
        assert float(found.violation) == violation
