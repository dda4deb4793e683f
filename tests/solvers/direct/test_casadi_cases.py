"""The "casadi" solver on discrete problems, networks and float32; its options, its silence and its error messages."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP
from ocnopt.solvers.direct.casadi_solver import CasADi
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP
from tests.solvers.cases import scalar_lqr

F64 = torch.float64


def test_problems_that_are_discrete_from_the_start():
    table = torch.linspace(0, 1, 5, dtype=F64)
    stage = Stage(
        lambda k, x, u: 0.9 * x + u, lambda k, x, u: (u**2).sum(-1) + (x[..., 0] - table[k]) ** 2, control_dim=1
    )
    problem = StagedOCP(stage, lambda x: (x[..., 0] - 1) ** 2, initial_state=[1.0], steps=5)
    solution = solve(problem, "casadi")
    one_by_one = StagedOCP([stage] * 5, lambda x: (x[..., 0] - 1) ** 2, initial_state=[1.0])
    torch.testing.assert_close(solve(one_by_one, "casadi").cost, solution.cost, rtol=1e-12, atol=0)
    assert solution.times.tolist() == [0, 1, 2, 3, 4, 5]
    x, cost = problem.initial_state, 0.0
    for k in range(5):
        cost += stage.cost(k, x, solution.controls[k])
        x = stage.dynamics(k, x, solution.controls[k])
    assert float(solution.cost) == pytest.approx(float(cost + (x[0] - 1) ** 2), abs=1e-12)


def test_stages_may_branch_on_their_number_and_vary_in_size():
    def odd_only(k, x, u):
        return x + u if k % 2 else x

    shared = Stage(odd_only, lambda k, x, u: ((u - 0.1) ** 2).sum(-1), control_dim=2)
    widen = Stage(lambda k, x, u: torch.cat([x, u], dim=-1), None, control_dim=1)
    problem = StagedOCP(
        [shared, shared, shared, shared, widen],
        lambda x: ((x - torch.tensor([2.0, 2.0, 5.0], dtype=F64)) ** 2).sum(-1),
        initial_state=[0.0, 0.0],
        control_bounds=(-3.0, 3.0),
        path_constraint=lambda k, x, u: u[..., :1] - 2.5,
    )
    solution = solve(problem, "casadi")
    # Two odd steps: minimise 2 (u - 1/10)^2 + (2 - 2 u)^2 in each coordinate.
    odd, even = solution.controls[1], solution.controls[0]
    best = torch.full((2,), 0.7, dtype=F64)
    torch.testing.assert_close(odd, best, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(even, torch.full((2,), 0.1, dtype=F64), rtol=1e-7, atol=1e-7)
    assert float(solution.controls[4]) == pytest.approx(2.5, abs=1e-7)
    assert [len(x) for x in solution.states] == [2, 2, 2, 2, 2, 3]
    assert [len(x) for x in solution.costates] == [2, 2, 2, 2, 2, 3]


def test_wide_networks_and_quasi_newton():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    problem = OCP(
        lambda t, x, u: 0.3 * net(torch.cat([x, u], dim=-1)),
        lambda t, x, u: (u**2).sum(-1),
        lambda t, x: ((x - 0.2) ** 2).sum(-1),
        initial_state=[0.0, 0.0],
        control_dim=1,
        horizon=1.0,
    )
    exact = solve(problem, "casadi", steps=5)
    approximate = solve(problem, "casadi", steps=5, hessian="limited-memory", tolerance=1e-8)
    assert exact.converged
    torch.testing.assert_close(approximate.cost, exact.cost, rtol=1e-6, atol=0)


def test_float32_problems_keep_their_dtype():
    problem = OCP(
        lambda t, x, u: u,
        lambda t, x, u: (x**2 + u**2).sum(-1),
        initial_state=[1.0],
        control_dim=1,
        horizon=1.0,
        dtype=torch.float32,
    )
    solution = solve(problem, "casadi", steps=20)
    assert solution.states.dtype == solution.cost.dtype == torch.float32
    assert float(solution.cost) == pytest.approx(math.tanh(1), abs=2e-4)


def test_ipopt_prints_only_on_demand(capfd):
    solve(scalar_lqr(), "casadi", steps=5)
    out, err = capfd.readouterr()
    assert out == err == ""
    solve(scalar_lqr(), "casadi", steps=5, progress=True)
    assert "Ipopt" in capfd.readouterr().out


def test_options_are_checked():
    with pytest.raises(
        ProblemError, match="method is 'shooting'; expected 'multiple_shooting' or 'collocation'; did you mean"
    ):
        CasADi(method="shooting")
    with pytest.raises(ProblemError, match="hessian is 'bfgs'; expected 'exact' or 'limited-memory'"):
        CasADi(hessian="bfgs")
    with pytest.raises(ProblemError, match="restarts of CasADi is -1; expected restarts >= 0, a whole number"):
        CasADi(restarts=-1)
    with pytest.raises(ProblemError, match="IPOPT refused its options.*expected names and values"):
        solve(scalar_lqr(), CasADi(ipopt={"no_such_option": 1}), steps=5)
    with pytest.raises(ProblemError, match="collocation.*discrete from the start.*multiple_shooting"):
        solve(transcribed_without_origin(), CasADi(method="collocation"))
    assert solve(scalar_lqr(), CasADi(ipopt={"mu_strategy": "monotone"}), steps=5).converged


def transcribed_without_origin():
    stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
    return StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=3)


def numpy_cost(t, x, u):
    return torch.as_tensor(np.sin(x.detach().numpy()), dtype=F64).sum(-1)


def branch(t, x, u):
    return u if x.sum() > 0 else -u


@pytest.mark.filterwarnings("ignore:.* hides part of itself from derivatives:UserWarning")
@pytest.mark.parametrize("method", ["multiple_shooting", "collocation"])
def test_the_function_that_cannot_be_translated_is_named(method):
    good = {"initial_state": [1.0], "control_dim": 1, "horizon": 1.0}
    cases = [
        (OCP(branch, lambda t, x, u: (u**2).sum(-1), **good), "^dynamics cannot be translated.*torch.where"),
        (OCP(lambda t, x, u: u, numpy_cost, **good), "^running_cost cannot be translated.*write it in torch"),
        (scalar_lqr(path_constraint=branch), "^path_constraint cannot be translated"),
        (scalar_lqr(terminal_constraint=lambda t, x: x.sort().values), "^terminal_constraint uses sort"),
        (scalar_lqr(path_constraint=lambda t, x, u: torch.sort(x).values), "^path_constraint uses sort"),
    ]
    for problem, message in cases:
        with pytest.raises(ProblemError, match=message):
            solve(problem, "casadi", steps=5, method=method, initial_guess=torch.zeros(5, 1, dtype=F64))


def test_the_stage_that_cannot_be_translated_is_named():
    fine = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
    broken = Stage(lambda k, x, u: x + u, lambda k, x, u: u.sort().values.sum(-1), control_dim=1)
    one = StagedOCP(broken, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=3)
    several = StagedOCP([fine, fine, broken], lambda x: (x**2).sum(-1), initial_state=[1.0])
    for problem, message in ((one, "^the stage's cost uses sort"), (several, "^stage 2's cost uses sort")):
        with pytest.raises(ProblemError, match=message):
            solve(problem, "casadi")
