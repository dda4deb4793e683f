"""Outputs interpolated within the steps: states, counts, gradients; repeated output times."""

import math

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.integrate import adaptive, fixed
from ocnopt.integrate.runge_kutta import closed
from ocnopt.integrate.tableaus import DOPRI5, RK4, TABLEAUS, TSIT5
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import Horizon
from tests.neural.cases import Coupled, Tanh, assert_gradients_of_times, distance, gradients, loss, start
from tests.neural.test_gradients import Watcher

METHODS = [("dopri5", None), ("tsit5", None), ("dopri8", None), ("bosh3", None), ("rk4", 5)]
TIMES = [0.0, 0.1, 0.15, 0.4, 0.4, 0.7, 0.9]


def pendulum(t, x):
    return torch.stack([x[..., 1], -torch.sin(x[..., 0]) + 0.1 * t], -1)


@pytest.mark.parametrize("times", [(0.0, 0.01, 0.5, 0.51, 2.0), (2.0, 1.9, 0.3, -1.0)])
@pytest.mark.parametrize("name", ["dopri5", "tsit5", "dopri8"])
def test_a_dense_walk_takes_the_steps_of_one_without_outputs(name, times):
    x, tableau = start(3, 2), closed(TABLEAUS[name])
    control = {"rtol": 1e-7, "atol": 1e-7}
    steps = []
    walk = adaptive.integrate(pendulum, x, times, tableau=TABLEAUS[name], dense=True, on_step=steps.append, **control)
    plain = adaptive.integrate(pendulum, x, (times[0], times[-1]), tableau=tableau, **control)
    assert torch.equal(walk.state, plain.state)
    assert (walk.evaluations, walk.steps) == (plain.evaluations, plain.steps)
    assert [i for step in steps for i in step.inside] == [*range(1, len(times) - 1)]
    assert [step.output for step in steps if step.output is not None] == [len(times) - 1]
    exact = adaptive.integrate(pendulum, x, times, rtol=1e-12, atol=1e-12).states
    torch.testing.assert_close(torch.stack(walk.states), torch.stack(exact), rtol=0, atol=5e-6)


def test_a_dense_grid_is_one_interval():
    walk = fixed.integrate(pendulum, start(2), (0.0, 0.31, 0.52, 1.0), step_size=0.25, tableau=RK4, dense=True)
    assert (walk.steps, walk.evaluations) == (4, 17)
    assert len(walk.states) == 3


@pytest.mark.parametrize(("tableau", "order"), [(DOPRI5, 5), (TSIT5, 5), (RK4, 4)], ids=["dopri5", "tsit5", "rk4"])
def test_the_error_within_steps_falls_with_the_order_of_the_interpolant(tableau, order):
    """At the middle of a step of an odd number of them."""
    x, errors = torch.ones(1, dtype=torch.float64), []
    for n in (3, 9):
        walk = fixed.integrate(
            lambda t, x: torch.sin(x) * math.cos(t),
            x,
            (0.0, 0.5, 1.0),
            step_size=1 / n,
            tableau=tableau,
            dense=True,
        )
        errors.append(abs(float(walk.states[0]) - 2 * math.atan(math.exp(math.sin(0.5)) * math.tan(0.5))))
    assert math.log(errors[0] / errors[1], 3) == pytest.approx(order, abs=0.6)


@pytest.mark.parametrize(("method", "steps"), METHODS)
@pytest.mark.parametrize(
    ("horizon", "times"), [(1.0, TIMES), (1.0, [0.9, 0.5, 0.1]), (Horizon(1.0, -1.0), [0.6, -0.3])]
)
def test_discrete_is_back_propagation_through_interpolants(method, steps, horizon, times):
    field, x = Tanh(), start(4, 3)
    control = {"method": method, "steps": steps, "rtol": 1e-3, "atol": 1e-3, "dense": True}
    value, expected = gradients(NeuralODE(field, horizon, adjoint="backprop", **control), x, times)
    for budget in (60_000, 0):
        ode = NeuralODE(field, horizon, checkpoint_bytes=budget, **control)
        ours, gradient = gradients(ode, x, times)
        assert torch.equal(ours, value)
        assert distance(gradient, expected) < 1e-12
    watcher = Watcher()
    ode.observe(watcher)
    assert distance(gradients(ode, x, times)[1], expected) < 1e-12
    assert sum(weight for weight, _ in watcher.weights) == pytest.approx(abs(times[-1] - ode._read_times(times)[0][0]))


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "dopri8", "bosh3"])
def test_continuous_meets_a_tight_solve(method):
    field, x = Tanh(), start(4, 3)
    _, expected = gradients(NeuralODE(field, rtol=1e-12, atol=1e-12), x, TIMES)
    ode = NeuralODE(field, method=method, rtol=1e-8, atol=1e-8, adjoint="continuous", dense=True)
    assert distance(gradients(ode, x, TIMES)[1], expected) < 1e-5


@pytest.mark.parametrize("times", [[0.0, 0.17, 0.4, 0.95], [0.3, 0.35, 0.9], [1.0, 0.77, 0.2]])
def test_gradients_of_times(times):
    """Of a rough method on few steps: the exact gradient of the discrete solve alone meets the differences."""
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, method="heun", steps=7, dense=True)
    assert_gradients_of_times(ode, x, times)


def test_a_tuple_state_and_an_output_that_counts_alone():
    field, x = Coupled(), (start(4, 2), start(4, 2, 3), start(4))
    found = []
    for adjoint, budget in (("backprop", 0), ("discrete", 0)):
        ode = NeuralODE(field, rtol=1e-4, atol=1e-4, adjoint=adjoint, checkpoint_bytes=budget, dense=True)
        second = tuple(part[1] for part in ode(x, [0.0, 0.3, 0.6, 1.0]))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(second), [*field.parameters()])]))
    assert distance(found[1], found[0]) < 1e-12


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.drop = Tanh(), nn.Dropout(0.3)

    def forward(self, t, x):
        return self.drop(self.net(t, x))


def test_a_replay_draws_the_same_numbers():
    field, x = Dropping(), start(4, 3)
    found = []
    for adjoint in ("backprop", "discrete"):
        torch.manual_seed(3)
        ode = NeuralODE(field, method="rk4", steps=4, adjoint=adjoint, checkpoint_bytes=0, dense=True)
        found.append(gradients(ode, x, [0.0, 0.3, 0.6, 1.0]))
    assert torch.equal(found[0][0], found[1][0])
    assert distance(found[1][1], found[0][1]) < 1e-12


@pytest.mark.parametrize("dense", [False, True])
def test_repeated_times_give_equal_states(dense):
    field, x = Tanh(), start(4, 3)
    ode = NeuralODE(field, dense=dense)
    y = ode(x, [0.0, 0.0, 0.5, 0.5, 0.5, 1.0])
    once = ode(x, [0.0, 0.5, 1.0])
    assert torch.equal(y, once[[0, 0, 1, 1, 1, 2]])
    assert torch.equal(ode(x, [0.0, 0.0]), torch.stack([x, x]))
    found = torch.autograd.grad(y.square().sum(), [*field.parameters()])
    weight = torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)[:, None, None]
    expected = torch.autograd.grad((weight * once.square()).sum(), [*field.parameters()])
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-14)


def test_repeated_times_share_a_gradient_and_say_so():
    times = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    with pytest.raises(ProblemError, match=r"are repeated; expected each of them once.*index the output"):
        NeuralODE(Tanh())(start(4, 3), times)


def test_many_outputs_cost_no_evaluations():
    field, x = Tanh(), start(4, 3)
    few, many = NeuralODE(field, dense=True), NeuralODE(field)
    few(x, torch.linspace(0.0, 1.0, 60))
    many(x, torch.linspace(0.0, 1.0, 60))
    assert few.statistics.forward < many.statistics.forward / 10
