"""The accepted steps of a solve, walked in both directions, kept whole or thinned."""

import pytest
import torch

from ocnopt.differential.discrete import Gradient, StagewisePull, Trajectory, WholePull, shortened
from ocnopt.integrate import fixed
from ocnopt.integrate.tableaus import TABLEAUS
from ocnopt.neural.evaluation import Evaluation, Packing, Surroundings
from tests.neural.cases import Tanh, start


def walked(name, depth, budget, n=21):
    field, x = Tanh(), start(2, 3)
    evaluation = Evaluation(field, Packing(), [*field.parameters()], Surroundings(field, x.device))
    trajectory = Trajectory(TABLEAUS[name], depth, budget, evaluation)
    with torch.no_grad():
        fixed.integrate(evaluation, x, (0.0, 1.0), step_size=1 / n, tableau=TABLEAUS[name], on_step=trajectory.append)
    return trajectory, evaluation


@pytest.mark.parametrize("name", ["dopri5", "rk4", "euler"])
def test_a_thinned_trajectory_holds_the_same_steps(name):
    depth = len(shortened(TABLEAUS[name]).c)
    torch.manual_seed(0)
    whole, _ = walked(name, depth, 2**20)
    torch.manual_seed(0)
    thin, _ = walked(name, depth, 0)
    assert len(whole) == len(thin) == 21
    with torch.no_grad():
        for kept, retaken in zip(whole, thin, strict=True):
            assert (kept.time, kept.size, kept.output) == (retaken.time, retaken.size, retaken.output)
            assert len(kept.points) == len(retaken.points) == depth
            assert all(torch.equal(one, other) for one, other in zip(kept.points, retaken.points, strict=True))
        assert [step.time for step in reversed(thin)] == [step.time for step in thin][::-1]


def test_what_is_released_comes_back():
    trajectory, _ = walked("rk4", 4, 2**20)
    before = [step.points for step in trajectory]
    tensors = trajectory.release()
    assert len(tensors) == 4 * len(trajectory)
    assert [*trajectory] == []
    trajectory.restore(tensors)
    assert [step.points for step in trajectory] == before


@pytest.mark.parametrize("name", sorted(TABLEAUS))
def test_both_pulls_of_a_step_agree(name):
    tableau = shortened(TABLEAUS[name])
    trajectory, evaluation = walked(name, len(tableau.c), 2**20, n=3)
    for replay in trajectory:
        costate, results = start(2, 3), []
        for pull in (WholePull(tableau, evaluation), StagewisePull(tableau, evaluation)):
            gradient = Gradient(len(evaluation.parameters))
            results.append((pull(replay, costate, gradient).x, *gradient.totals))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
