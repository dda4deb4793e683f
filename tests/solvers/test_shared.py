"""One p for a batch of experiments: dense Gauss-Newton steps, least squares, and the one problem solved by IPOPT."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.modules import from_module
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.paths import Widened, rollout
from ocnopt.solvers.ddp import roll_controls
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.shared import SharedKernel, join_experiments, join_guess
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP, transcribe

F64 = torch.float64


def reaching(start, target, **changes):
    """A pendulum whose push and damping are for all, and what each is to reach for itself."""

    def dynamics(t, x, u, p):
        return torch.stack([x[..., 1], u[..., 0] - torch.sin(x[..., 0]) * p[..., 1] + p[..., 0]], dim=-1)

    def cost(t, x, u, p):
        return ((x - target) ** 2).sum(-1) + 0.1 * (u**2).sum(-1) + (p[..., 0] - 0.3) ** 2 + 1

    settings = {
        "control_dim": 1,
        "horizon": FreeHorizon(1.0, 0.2, 4.0),
        "parameters": [0.1, 1.0],
        "control_bounds": (-1.0, 1.0),
        "parameter_bounds": ([-2.0, 0.9], [2.0, 2.0]),
        "data": (target,),
    }

    def miss(t, x, p):
        return 10 * ((x - target) ** 2).sum(-1)

    return OCP(dynamics, cost, miss, initial_state=start, **{**settings, **changes})


def drawn(*shape, seed=0):
    return torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    def forward(self, t, x):
        return self.net(x)


def training(samples=9):
    """A small Neural ODE that is to turn points by a quarter."""
    torch.manual_seed(0)
    start = drawn(samples)
    goal = torch.stack([-start[:, 1], start[:, 0]], dim=-1)

    def loss(t, x, p):
        return ((x - goal) ** 2).sum(-1) + 1e-3 * (p**2).sum(-1)

    return from_module(Field(), loss, initial_state=start, horizon=1.0), goal


def test_one_gauss_newton_sweep_is_the_dense_step():
    problem, goal = training()
    staged = transcribe(problem, 4)
    kernel, joint = SharedKernel(Widened(staged)), Widened(join_experiments(staged))
    guess = join_guess(staged, read_guess(staged, None))
    first = joint.join([joint.problem.initial_state], guess.parameters)[0]
    path = roll_controls(kernel, first, joint.join_controls(guess.controls), joint.q, None)
    found = kernel.direction(path, torch.zeros((), dtype=F64), exact=False)

    def residuals(p):
        x = rollout(staged, [torch.zeros(9, 0, dtype=F64)] * 4, staged.initial_state, p.expand(9, -1)).states[-1]
        return torch.cat([(x - goal).reshape(-1), (9 * 1e-3) ** 0.5 * p])

    p = problem.parameters
    J, r = torch.autograd.functional.jacobian(residuals, p), residuals(p)
    wanted = -torch.linalg.solve(J.T @ J, J.T @ r)
    torch.testing.assert_close(found.dp, wanted, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.cost, r @ r)
    torch.testing.assert_close(found.linear, 2 * wanted @ J.T @ r, rtol=1e-8, atol=1e-8)


def test_a_network_is_trained_by_the_same_call():
    problem, _ = training()
    solution = solve(problem, steps=4, curvature="gauss_newton", max_iterations=25, shared_parameters=True)
    history = solution.history["cost"]
    assert float(solution.cost.sum()) < 0.05 * float(history[0, 0])
    torch.testing.assert_close(history[-1, 0], solution.cost.sum())
    assert bool((solution.parameters == solution.parameters[0]).all())


def test_estimation_is_least_squares():
    """Gravity and damping of a pendulum from five recorded runs, with noise."""
    steps, runs, h = 12, 5, 0.15
    start = drawn(runs)

    def step(x, p):
        rate = x[..., 1] + h * (-p[..., 0] * torch.sin(x[..., 0]) - p[..., 1] * x[..., 1])
        return torch.stack([x[..., 0] + h * rate, rate], dim=-1)

    truth = torch.tensor([2.0, 0.3], dtype=F64).expand(runs, 2)
    record = [start]
    for _ in range(steps):
        record.append(step(record[-1], truth))
    record = torch.stack(record) + 0.05 * drawn(steps + 1, runs, seed=1)

    def cost(k, x, u, p):
        return ((x - record[k.reshape(-1) if k.ndim else k]) ** 2).sum(-1)

    problem = StagedOCP(
        Stage(lambda k, x, u, p: step(x, p), cost),
        lambda x, p: ((x - record[-1]) ** 2).sum(-1),
        initial_state=start,
        steps=steps,
        parameters=[1.0, 0.0],
    )
    solution = solve(problem, shared_parameters=True, tolerance=1e-10)

    def residuals(p):
        x, p, parts = start, torch.as_tensor(p).expand(runs, 2), [start - record[0]]
        for k in range(steps):
            x = step(x, p)
            parts.append(x - record[k + 1])
        return torch.stack(parts).reshape(-1).numpy()

    wanted = scipy.optimize.least_squares(residuals, [1.0, 0.0], xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert bool(solution.converged.all())
    np.testing.assert_allclose(solution.parameters[0], wanted.x, rtol=1e-7)
    np.testing.assert_allclose(float(solution.cost.sum()), 2 * wanted.cost, rtol=1e-12)


def test_one_experiment_is_the_ordinary_solve():
    start, target = drawn(1), drawn(1, seed=3)
    one = solve(reaching(start, target), steps=8, kernel="torch")
    same = solve(reaching(start, target), steps=8, shared_parameters=True)
    assert bool((one.controls.abs() == 1.0).any())
    for name in ("states", "controls", "parameters", "horizon", "cost", "costates", "iterations", "times"):
        torch.testing.assert_close(getattr(same, name), getattr(one, name), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(same.gains.K, one.gains.K, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
def test_ipopt_solves_the_same_problem(batch):
    problem = reaching(drawn(*batch), drawn(*batch, seed=1))
    ddp, casadi = (solve(problem, solver, steps=6, shared_parameters=True) for solver in ("ddp", "casadi"))
    for solution in (ddp, casadi):
        assert bool(solution.converged.all())
        assert solution.cost.shape == solution.horizon.shape == batch
        assert solution.parameters.shape == (*batch, 2)
        assert float(solution.parameters.reshape(-1, 2).std(0).max()) < 1e-15
    for name in ("states", "controls", "parameters", "horizon", "cost", "costates"):
        torch.testing.assert_close(getattr(ddp, name), getattr(casadi, name), rtol=1e-6, atol=1e-6)
    alone = solve(problem, steps=6, initial_guess=ddp)
    assert float(ddp.cost.sum()) > float(alone.cost.sum())
    closed = ddp.rollout(problem.initial_state)
    torch.testing.assert_close(closed.cost, ddp.cost)


def test_prepared_and_from_states_that_miss_the_dynamics():
    start, target = drawn(3), drawn(3, seed=1)
    prepared = prepare(reaching(start, target), steps=6, shared_parameters=True)
    target += 0.2
    wanted = solve(reaching(start, target), steps=6, shared_parameters=True)
    torch.testing.assert_close(prepared.solve().cost, wanted.cost)
    guess = {"controls": torch.zeros(6, 1), "states": torch.zeros(7, 2), "parameters": [0.0, 1.0], "horizon": 1.2}
    found = prepared.solve(initial_guess=guess)
    torch.testing.assert_close(found.cost, wanted.cost)
    again = prepared.solve(initial_guess=wanted)
    assert int(again.iterations[0]) <= 1


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"initial_state": [0.0, 0.0]}, {}, "a problem that has no batch"),
        ({"state_bounds": (-9.0, 9.0)}, {}, "state_bounds; solver 'ddp' has no multipliers for it under shared"),
        ({"parameters": None, "horizon": 1.0, "parameter_bounds": None}, {}, "a problem that has no static controls"),
        ({}, {"kernel": "lowered"}, "kernel='lowered'"),
        ({}, {"solver": "indirect"}, "solver='indirect', which solves the continuous problem of one experiment"),
        ({}, {"solver": "casadi", "method": "collocation"}, "expected a solver of the discrete one: 'ddp', 'shooting'"),
        ({}, {"initial_guess": {"horizon": [1.0, 2.0]}}, "different parameters or horizons for experiments"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, options, message):
    settings = {"initial_state": torch.zeros(2, 2), "parameters": [0.1], "horizon": FreeHorizon(1.0, 0.5, 2.0)}
    settings |= {"parameter_bounds": None, "control_dim": 1} | changes
    problem = OCP(lambda t, x, u, *p: u + 0 * x, lambda t, x, u, *p: ((u - 1) ** 2).sum(-1), **settings)
    with pytest.raises(ProblemError, match=message):
        solve(problem, steps=3, shared_parameters=True, **options)


def test_sizes_that_vary_are_refused():
    stages = [
        Stage(lambda k, x, u, p: x + u, lambda k, x, u, p: (u**2).sum(-1), control_dim=2),
        Stage(lambda k, x, u, p: x + u, lambda k, x, u, p: (u**2).sum(-1), control_dim=1),
    ]
    problem = StagedOCP(
        stages, lambda x, p: (x - p).square().sum(-1), initial_state=torch.zeros(3, 2), parameters=[1.0]
    )
    with pytest.raises(ProblemError, match="sizes that vary by stage"):
        solve(problem, shared_parameters=True)
