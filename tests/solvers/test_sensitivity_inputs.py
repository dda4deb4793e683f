"""Gradients of solutions: what functions capture, and bounds on states."""

import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.modules import from_module
from ocnopt.ocp import OCP
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP
from tests.solvers.test_sensitivity import STEPS, assert_close, gradients, numbers, pendulum, random_loss

INFINITE = float("inf")


def test_active_bounds_on_states_stay_active():
    start, data = numbers([1.0, -0.5], [0.3, 0.8]), numbers([1.3, 0.8, 1.1])
    bounds = (numbers([-INFINITE, -0.6], [-INFINITE, -0.3])[:, None], 9.0)
    prepared = prepare(pendulum(data, start, state_bounds=bounds), "casadi", steps=STEPS, tolerance=1e-11)
    solution, found, wanted = gradients(prepared, start, data, random_loss)
    assert bool((solution.multipliers["state_bounds"].abs() > 1e-3).flatten(-2).any(-1).all())
    assert_close(found, wanted)


def test_both_solvers_have_the_same_gradients_at_bounds_on_states():
    found = []
    for solver, exact in (("casadi", {}), ("ddp", {"constraint_tolerance": 1e-11, "compile": False})):
        start, data = numbers([1.0, -0.5]).requires_grad_(), numbers([1.3, 0.8, 1.1]).requires_grad_()
        bounds = {"state_bounds": ([0.6, -INFINITE], INFINITE), "path_constraint": lambda t, x, u, p: u - 0.2}
        solution = solve(
            pendulum(data, start, **bounds), solver, steps=STEPS, differentiable=True, tolerance=1e-11, **exact
        )
        assert float(solution.states[:, 0].detach().min()) == pytest.approx(0.6, abs=1e-8)
        found.append(torch.autograd.grad(random_loss(solution), [start, data]))
    assert_close(*found)


def test_bounds_on_states_of_experiments_with_one_parameter():
    start, data = numbers([1.0, -0.5], [0.3, 0.8]), numbers([1.3, 0.8, 1.1])
    bounds = (numbers([-INFINITE, -0.6], [-INFINITE, -0.3])[:, None], INFINITE)
    prepared = prepare(
        pendulum(data, start, state_bounds=bounds), "casadi", steps=STEPS, tolerance=1e-11, shared_parameters=True
    )
    _, found, wanted = gradients(prepared, start, data, random_loss)
    assert_close(found, wanted)


def test_bounds_on_states_whose_number_varies_are_refused():
    weight = numbers([1.0]).requires_grad_()
    stages = [
        Stage(lambda k, x, u: weight * x + u, lambda k, x, u: (u**2).sum(-1), control_dim=2),
        Stage(lambda k, x, u: x[..., :1] + u, lambda k, x, u: (u**2).sum(-1), control_dim=1),
    ]
    problem = StagedOCP(stages, initial_state=numbers([1.0, 2.0]), state_bounds=(0.0, 9.0), data=(weight,))
    with pytest.raises(ProblemError, match="state_bounds and a state whose size varies by stage"):
        solve(problem, differentiable=True)


def drifting(factor, data=(), cost=None):
    start = numbers([1.0]).requires_grad_()
    cost = cost or (lambda t, x, u: (x**2 + u**2).sum(-1))
    settings = {"initial_state": start, "control_dim": 1, "horizon": 1.0, "data": data}
    return OCP(lambda t, x, u: factor() * x + u, cost, **settings)


class TestCapturedTensors:
    """What the functions capture and what requires grad, but is not among the data, would get no gradient."""

    @pytest.mark.parametrize("kind", ["leaf", "output of a module", "start"])
    def test_a_tensor_is_refused(self, kind):
        net = nn.Linear(1, 1).double()
        mass = {"leaf": numbers([0.5]).requires_grad_(), "output of a module": net(numbers([1.0]))}.get(kind)
        if mass is not None:
            problem = drifting(lambda: mass)
            assert solve(drifting(lambda: mass, data=(mass,)), steps=3, differentiable=True).cost.requires_grad
        else:
            start = numbers([1.0]).requires_grad_()
            problem = drifting(lambda: 1.0, cost=lambda t, x, u: ((x - start) ** 2 + u**2).sum(-1))
        with pytest.raises(
            ProblemError, match=r"capture a tensor of shape \(1,\) which requires grad but is not named"
        ):
            solve(problem, steps=3, differentiable=True)
        solve(problem, steps=3)

    def test_what_no_gradient_could_reach_is_no_alarm(self):
        mass = numbers([0.5]).requires_grad_()
        for factor in (mass.detach, lambda: float(mass), lambda: torch.zeros_like(mass) + len(mass)):
            solve(drifting(factor), steps=3, differentiable=True, kernel="torch")

    def test_parameters_of_a_module_are_warned_of(self):
        net = nn.Linear(1, 1, bias=False).double()
        with pytest.warns(UserWarning, match=r"parameters of a module \(1\) that require grad"):
            solve(drifting(lambda: net.weight[0]), steps=3, differentiable=True)
        weight = net.weight
        solution = solve(drifting(lambda: weight[0], data=(weight,)), steps=3, differentiable=True)
        assert float(torch.autograd.grad(solution.cost, weight)[0]) != 0
        net.requires_grad_(False)
        solve(drifting(lambda: net.weight[0]), steps=3, differentiable=True)

    def test_a_field_that_differentiates_within(self):
        def slope(x):
            with torch.enable_grad():
                point = x if x.requires_grad else x.detach().requires_grad_()
                return torch.autograd.grad(torch.cos(point).sum(), point, create_graph=True)[0]

        problem = OCP(
            lambda t, x, u: slope(x) + u,
            lambda t, x, u: (x**2 + u**2).sum(-1),
            initial_state=numbers([1.0]).requires_grad_(),
            control_dim=1,
            horizon=1.0,
        )
        solve(problem, steps=3, differentiable=True, kernel="torch")

    def test_weights_of_a_network_that_are_unknowns(self):
        class Field(nn.Linear):
            def forward(self, t, x):
                return super().forward(x)

        torch.manual_seed(0)
        start = numbers([[1.0, 0.0], [0.0, 1.0]]).requires_grad_()
        settings = {"initial_state": start, "horizon": 1.0}
        problem = from_module(Field(2, 2).double(), lambda t, x, p: (x**2).sum(-1) + (p**2).sum(-1), **settings)
        solution = solve(problem, steps=3, differentiable=True, shared_parameters=True)
        found = torch.autograd.grad(solution.cost.sum(), start)[0]
        torch.testing.assert_close(found, solution.costates[:, 0].detach(), rtol=1e-6, atol=1e-8)


def test_a_problem_given_up_without_a_path_takes_no_gradients_from_the_others():
    start = numbers([0.2, 0.0], [3.0, 0.0]).requires_grad_()
    problem = OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (u**2).sum(-1),
        initial_state=start,
        control_dim=1,
        horizon=1.0,
        control_bounds=(-2.0, 2.0),
        terminal_constraint=lambda t, x: x[..., :1],
    )
    with pytest.warns(UserWarning, match="1 of 2 problems did not converge.* NaN for 1 without a path"):
        solution = solve(problem, "casadi", steps=8, differentiable=True, restarts=0)
    (slope,) = torch.autograd.grad(solution.cost.sum(), start)
    # without active bounds J = h r^2 / (w.w) with r = x_0 + v_0 and w the effects of the controls on the end
    w = 0.125 * (1 - 0.125 * (torch.arange(8, dtype=torch.float64) + 0.5))
    assert_close([slope[0]], [torch.full((2,), 2 * 0.2 * 0.125 / float(w @ w), dtype=torch.float64)])
    assert bool(slope[1].isnan().all())
