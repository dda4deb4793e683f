"""Bounds on the rates of controls, against bounded least squares."""

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear

import ocnopt as oc

F64 = torch.float64
N, H, R = 8, 0.25, 1.5


def regulator(**options):
    given = {"initial_state": [1.0, 0.5], "control_dim": 1, "horizon": N * H} | options
    return oc.OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: (x**2).sum(-1) + 0.3 * (u**2).sum(-1),
        lambda t, x: 2 * (x**2).sum(-1),
        **given,
    )


def least_squares(u0=0.0):
    """The Euler steps of the regulator by hand: rates within +-R, u_{k+1} = u_k + H w_k, u_0 given."""
    step = np.array([[1.0, H, 0.0], [0.0, 1.0, H], [0.0, 0.0, 1.0]])
    z, maps, rows, sides = np.array([1.0, 0.5, u0]), np.zeros((3, N)), [], []
    for k in range(N + 1):
        weights = np.sqrt(H * np.array([1.0, 1.0, 0.3]) if k < N else np.array([2.0, 2.0, 0.0]))
        rows.append(weights[:, None] * maps)
        sides.append(-weights * z)
        if k < N:
            z, maps = step @ z, step @ maps
            maps[2, k] += H
    found = lsq_linear(np.concatenate(rows), np.concatenate(sides), (-R, R), method="bvls", tol=1e-14)
    return found.x, 2 * found.cost


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_a_regulator_equals_bounded_least_squares(solver):
    rates, cost = least_squares()
    problem = oc.limit_rates(regulator(), (-R, R), initial_control=[0.0])
    solution = oc.solve(problem, solver, steps=N, integrator="euler")
    assert bool(solution.converged)
    assert (np.abs(rates) > R - 1e-9).any()
    assert float(solution.cost) == pytest.approx(cost, rel=1e-7)
    assert solution.controls[:, 0].tolist() == pytest.approx(rates.tolist(), abs=2e-5)
    assert solution.states[1:, 2].tolist() == pytest.approx(np.cumsum(H * rates).tolist(), abs=2e-5)


def test_bounds_of_the_controls_hold_too_and_both_solvers_agree():
    problem = oc.limit_rates(regulator(control_bounds=(-0.9, 2.0)), (-R, R), initial_control=[0.2])
    pair = [oc.solve(problem, solver, steps=N) for solver in ("ddp", "casadi")]
    assert float(pair[0].cost) == pytest.approx(float(pair[1].cost), rel=1e-6)
    for solution in pair:
        assert float(solution.states[:, 2].min()) == pytest.approx(-0.9, abs=1e-6)
        assert float(solution.controls.abs().max()) <= R + 1e-9


def test_the_gradient_reaches_the_control_applied_last():
    u0 = torch.tensor([0.4], dtype=F64, requires_grad=True)
    solution = oc.solve(oc.limit_rates(regulator(), (-R, R), initial_control=u0), steps=N, differentiable=True)
    solution.cost.backward()
    sides = [
        float(oc.solve(oc.limit_rates(regulator(), (-R, R), initial_control=[0.4 + h]), steps=N).cost)
        for h in (1e-4, -1e-4)
    ]
    assert float(u0.grad) == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-6)
    assert float(u0.grad) == pytest.approx(float(solution.costates[0][2]), rel=1e-6)


def test_bounds_on_rates_may_be_a_function_of_time():
    limits = [oc.limit_rates(regulator(), given, initial_control=[0.0]) for given in ((-R, R), lambda t: (-R, R))]
    pair = [oc.solve(problem, steps=N) for problem in limits]
    assert float(pair[0].cost) == float(pair[1].cost)


def test_batches_names_parameters_and_a_free_end():
    problem = oc.OCP(
        lambda t, x, u, p: p * x + u,
        lambda t, x, u, p: (x**2 + u**2).sum(-1),
        lambda t, x, p: t + (p**2).sum(-1),
        initial_state=[[1.0], [2.0]],
        control_dim=1,
        horizon=oc.FreeHorizon(1.0, 0.5, 2.0),
        parameters=[0.1],
        path_constraint=lambda t, x, u, p: x - 5 + 0 * u,
        terminal_constraint=lambda t, x, p: x - 0.5,
        state_names=("place",),
        control_names=("push",),
    )
    slow = oc.limit_rates(problem, (-3.0, 3.0), initial_control=[[0.0], [-1.0]])
    assert slow.state_names == ("place", "push")
    assert slow.control_names == ("rate of push",)
    assert slow.initial_state.tolist() == [[1.0, 0.0], [2.0, -1.0]]
    assert slow.state_bounds is None
    t, z, w = torch.tensor(0.5, dtype=F64), slow.initial_state, torch.ones(2, 1, dtype=F64)
    p = torch.tensor([0.1], dtype=F64)
    assert slow.dynamics(t, z, w, p).tolist() == [[0.1, 1.0], [pytest.approx(-0.8), 1.0]]
    assert slow.terminal_constraint(t, z, p).tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: oc.limit_rates(3, (-1, 1), initial_control=[0.0]), "is int; expected an oc.OCP with controls"),
        (lambda: oc.limit_rates(regulator(), None, initial_control=[0.0]), "rate_bounds=None; expected a pair"),
        (lambda: oc.limit_rates(regulator(), (1, -1), initial_control=[0.0]), "rate_bounds: lower 1.0 exceeds upper"),
        (
            lambda: oc.limit_rates(regulator(), (-1, 1), initial_control=[0.0, 1.0]),
            r"has shape \(2,\); expected \(1,\)",
        ),
        (
            lambda: oc.limit_rates(regulator(control_bounds=(-1, 1)), (-1, 1), initial_control=[3.0]),
            "is outside control_bounds; expected it within",
        ),
        (
            lambda: oc.limit_rates(regulator(control_bounds=lambda t: (-1.0 - t, 1.0)), (-1, 1), initial_control=[0.0]),
            "control_bounds that vary in time",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(oc.ProblemError, match=message):
        make()
