"""The "indirect" solver: the Jacobians against finite differences, the optimum against closed forms, refusals, ends."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

import ocnopt as oc
from ocnopt.solvers.conditions import Collocated, Conditions, Steps
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.hamiltonian import Hamiltonian
from ocnopt.solvers.indirect import Indirect, _status
from tests.oracles.compare import assert_close
from tests.solvers.cases import free_end, pushed, regulator, scalar_lqr, swing

TANH = math.tanh(1.0)


def check(solution):
    assert bool(solution.converged.all()), solution.status
    assert float(solution.constraint_violation.max()) <= 1e-6
    assert solution.gains is None


def differences(function, at, h=1e-6):
    rows = [(np.asarray(function(at + h * e)) - np.asarray(function(at - h * e))) / (2 * h) for e in np.eye(at.size)]
    return np.stack(rows, axis=-1)


def ended(**options):
    """A free end time, a parameter, a terminal constraint, a bounded control."""
    return free_end(
        terminal_constraint=lambda t, x, p: x**2 - 0.1 * p * t[..., None],
        control_bounds=(-0.4, 2.0),
        parameter_bounds=(-1.0, 1.0),
        **options,
    )


def test_jacobians_against_finite_differences():
    staged = oc.transcribe(ended(), 4)
    c = Conditions(staged, staged.origin, Steps(10, Stopwatch(None)))
    s, rng = np.linspace(0.0, 1.0, 5), np.random.default_rng(0)
    y, numbers = rng.standard_normal((3 * c.n + 1, 5)) + 0.5, np.array([0.3, 1.2, 0.7])
    c.remember(s, np.zeros((1, 5)))
    in_y, in_numbers = c.jacobian(s, y, numbers)
    for k in range(5):

        def rate(z, k=k):
            return c.slopes(s[k : k + 1], z[:, None], numbers)[:, 0]

        assert_close(in_y[..., k], differences(rate, y[:, k]), rtol=1e-6, atol=1e-7)
    expected = differences(lambda v: c.slopes(s, y, v), numbers)
    assert_close(np.moveaxis(in_numbers, 1, -1), expected, rtol=1e-6, atol=1e-7)
    ya, yb = y[:, 0], y[:, -1]
    a, b, d = c.boundary_jacobian(ya, yb, numbers)
    assert_close(a, differences(lambda v: c.boundary(v, yb, numbers), ya), rtol=1e-6, atol=1e-7)
    assert_close(b, differences(lambda v: c.boundary(ya, v, numbers), yb), rtol=1e-6, atol=1e-7)
    assert_close(d, differences(lambda v: c.boundary(ya, yb, v), numbers), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bounds", [None, (-1.0, 0.5)])
def test_the_minimum_over_the_box(bounds):
    """H = (u0^2 - 1)^2 + 0.3 u0 + (u1 - x)^2 + u0 u1 / 2 has a maximum between two minima in u0."""

    def cost(t, x, u):
        return (u[..., 0] ** 2 - 1) ** 2 + 0.3 * u[..., 0] + (u[..., 1] - x[..., 0]) ** 2 + 0.5 * u[..., 0] * u[..., 1]

    problem = oc.OCP(
        lambda t, x, u: 0 * x, cost, initial_state=[0.0], control_dim=2, horizon=1.0, control_bounds=bounds
    )
    h = Hamiltonian(oc.transcribe(problem, 2).origin)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    w = torch.stack([x, x, torch.full_like(x, 0.05), x], dim=-1)
    found = h.minimise(torch.zeros(7, dtype=torch.float64), w)[:, h.u]
    grid = torch.linspace(-1.6, 1.6, 801, dtype=torch.float64)
    lower, upper = (-1e9, 1e9) if bounds is None else bounds
    for row, value in enumerate(x):
        u0, u1 = torch.meshgrid(grid.clamp(lower, upper), grid.clamp(lower, upper), indexing="ij")
        table = (u0**2 - 1) ** 2 + 0.3 * u0 + (u1 - value) ** 2 + 0.5 * u0 * u1
        ours = cost(None, value[None], found[row])
        sign = u0 * found[row, 0] >= 0
        assert float(ours) <= float(table[sign].min()) + 1e-12
        assert float(ours) >= float(table[sign].min()) - 1e-4


def test_the_scalar_regulator():
    solution = oc.solve(scalar_lqr(), "indirect", steps=10)
    check(solution)
    assert_close(solution.cost, TANH, rtol=1e-12)
    t = solution.times
    assert_close(solution.states[:, 0], torch.cosh(1 - t) / math.cosh(1), rtol=1e-6, atol=1e-7)
    middle = 0.5 * (t[1:] + t[:-1])
    assert_close(solution.controls[:, 0], -torch.sinh(1 - middle) / math.cosh(1), rtol=1e-6, atol=1e-7)
    assert_close(solution.costates[:, 0], 2 * torch.sinh(1 - t) / math.cosh(1), rtol=1e-6, atol=1e-6)
    assert "cost of the continuous problem" in solution.status


def test_a_regulator_against_the_hamiltonian_matrix():
    solution = oc.solve(regulator(), "indirect", steps=10)
    check(solution)
    A, B = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0], [1.0]])
    M = expm(-np.block([[A, -0.5 * B @ B.T], [-2 * np.eye(2), -A.T]]))
    P = M[2:, :2] @ np.linalg.inv(M[:2, :2])
    assert_close(solution.cost, 0.5 * P[0, 0], rtol=1e-10)
    assert_close(solution.costates[0], P[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "scalar_lqr",
        "hager_lq",
        "mimo_lqr_two_masses",
        "double_integrator_min_energy",
        "brachistochrone",
        "pendulum_swing_up",
        "pendulum_swing_up_u5",
        "cartpole_swing_up_soft",
        "planar_quadrotor_energy",
        "unicycle_parking",
    ],
)
def test_the_library(name):
    record = oc.problems.get(name)
    solution = oc.solve(record.build(), "indirect", steps=50)
    check(solution)
    assert_close(solution.cost, record.optimal_cost, rtol=3e-9)
    if record.T_star is not None:
        assert_close(solution.horizon, record.T_star, rtol=1e-8)


def test_kellys_cartpole_without_its_idle_limits():
    record = oc.problems.get("cartpole_swing_up_kelly")
    limited = record.build()
    problem = oc.OCP(
        limited.dynamics,
        limited.running_cost,
        initial_state=limited.initial_state,
        control_dim=1,
        horizon=limited.horizon,
        terminal_constraint=limited.terminal_constraint,
        initial_guess=limited.initial_guess,
    )
    solution = oc.solve(problem, "indirect", steps=60)
    check(solution)
    assert_close(solution.cost, record.optimal_cost, rtol=1e-9)


def test_a_terminal_constraint_and_its_multipliers():
    """u = 6 - 12 t, lambda = -u for v, and lambda_p = 12 (s) constant: dJ/dp(0) = -dJ/dp_end."""
    solution = oc.solve(oc.problems.get("double_integrator_min_energy").build(), "indirect", steps=10)
    check(solution)
    assert_close(solution.cost, 6.0, rtol=1e-12)
    t = solution.times
    assert_close(solution.costates, torch.stack([torch.full_like(t, -12.0), 12 * t - 6], -1), rtol=1e-9, atol=1e-9)
    assert_close(solution.states[-1], [1.0, 0.0], atol=1e-12)
    middle = 0.5 * (t[1:] + t[:-1])
    assert_close(solution.controls[:, 0], 6 - 12 * middle, rtol=1e-9, atol=1e-9)
    assert_close(solution.multipliers["terminal_constraint"], [-12.0, 6.0], rtol=1e-9)


def test_multipliers_are_those_of_the_other_solvers():
    problem = free_end(
        control_bounds=(-1.6, 2.0), parameter_bounds=(-1.0, 1.0), terminal_constraint=lambda t, x, p: x - 0.5 - 0.1 * p
    )
    ours = oc.solve(problem, "indirect", steps=6, start="casadi")
    check(ours)
    other = oc.solve(problem, "casadi", steps=20)
    assert set(ours.multipliers) == set(other.multipliers) == {"terminal_constraint"}
    assert_close(*(s.multipliers["terminal_constraint"] for s in (ours, other)), rtol=1e-4)
    assert oc.solve(scalar_lqr(), "indirect", steps=3).multipliers is None


def test_bounds_on_the_control():
    problem = swing(control_bounds=(-1.0, 1.0))
    solution = oc.solve(problem, "indirect", steps=30)
    check(solution)
    fine = [float(oc.solve(problem, steps=steps).cost) for steps in (60, 120)]
    assert abs(float(solution.cost) - fine[1]) < abs(fine[0] - fine[1])
    assert float(solution.controls.abs().max()) == 1.0


def test_static_parameters_and_a_free_end_time():
    solution = oc.solve(free_end(), "indirect", steps=20)
    check(solution)
    coarse, fine = (oc.solve(free_end(), steps=steps) for steps in (100, 200))
    for name in ("cost", "horizon", "parameters"):
        a, b, ours = (getattr(s, name).squeeze() for s in (coarse, fine, solution))
        # the other solvers' error is of second order in the step
        assert_close(ours, b + (b - a) / 3, rtol=1e-6)


def test_a_bound_on_a_parameter_and_on_the_end_time():
    solution = oc.solve(free_end(parameter_bounds=(-0.6, 0.6)), "indirect", steps=20)
    check(solution)
    assert float(solution.parameters) == -0.6
    short = pushed(lambda t, x, u: (x**2 + u**2).sum(-1), lambda t, x: 0.01 * t, horizon=oc.FreeHorizon(1.0, 0.5, 3.0))
    solution = oc.solve(short, "indirect", steps=20)
    check(solution)
    assert float(solution.horizon) == 0.5
    assert_close(solution.cost, math.tanh(0.5) + 0.005, rtol=1e-9)


def test_no_staged_control():
    problem = oc.OCP(
        lambda t, x, u, p: -p * x,
        lambda t, x, u, p: 0.1 * (p**2).sum(-1),
        lambda t, x, p: (x**2).sum(-1),
        initial_state=[1.0],
        horizon=1.0,
        parameters=[0.5],
    )
    ours, ddp = oc.solve(problem, "indirect", steps=20), oc.solve(problem, steps=20)
    check(ours)
    assert_close(ours.parameters, ddp.parameters, rtol=1e-6)
    assert ours.controls.shape == (20, 0)


def test_it_starts_from_ipopt_too():
    solution = oc.solve(scalar_lqr(), "indirect", steps=10, start="casadi")
    check(solution)
    assert_close(solution.cost, TANH, rtol=1e-12)


def test_a_batch_with_a_bad_problem():
    def cost(t, x, u):
        return (torch.exp(x**2) + u**2).sum(-1)

    start = torch.zeros(3, 6, 1)
    start[1] = 90.0
    problem = pushed(cost, initial_state=[[1.0], [0.7], [0.5]])
    solution = oc.solve(problem, "indirect", steps=6, initial_guess=start)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.status[1].startswith("given up: the cost of the first path is inf")
    assert math.isnan(float(solution.cost[1]))
    alone = oc.solve(pushed(cost, initial_state=[0.5]), "indirect", steps=6)
    assert_close(solution.cost[2], alone.cost, rtol=1e-12)
    assert solution.states.shape == (3, 7, 1)


@pytest.mark.parametrize("free", [False, True])
def test_data_of_each_problem_may_be_captured(free):
    target = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    horizon = oc.FreeHorizon(1.0, 0.5, 2.0) if free else 1.0
    both = pushed(lambda t, x, u: 1 + ((x - target) ** 2 + u**2).sum(-1), initial_state=[[1.0]] * 2, horizon=horizon)
    together = oc.solve(both, "indirect", steps=8)
    check(together)
    for row in range(2):
        alone = pushed(lambda t, x, u, row=row: 1 + ((x - target[row]) ** 2 + u**2).sum(-1), horizon=horizon)
        assert_close(together.cost[row], oc.solve(alone, "indirect", steps=8).cost, rtol=1e-9)


def test_the_mesh_limit():
    solution = oc.solve(swing(), "indirect", steps=10, max_nodes=12)
    assert not bool(solution.converged)
    assert "the mesh limit of 12 points was reached" in solution.status
    assert "raise max_nodes or loosen tolerance=" in solution.status
    assert float(solution.constraint_violation) > 1e-6


def test_the_iteration_limit():
    solution = oc.solve(swing(), "indirect", steps=10, max_iterations=1)
    assert not bool(solution.converged)
    assert solution.status.startswith("stopped after 1 Newton step: the iteration limit was reached")
    assert bool(torch.isfinite(solution.states).all())


def test_a_function_that_stops_being_a_number(monkeypatch):
    slopes = Conditions.slopes
    monkeypatch.setattr(
        Conditions, "slopes", lambda self, s, y, v: slopes(self, s, y, v) * np.where(s > 0.7, np.nan, 1.0)
    )
    solution = oc.solve(scalar_lqr(), "indirect", steps=10)
    assert not bool(solution.converged)
    assert "a function or its derivative is NaN or infinite on the way" in solution.status


def test_constraints_that_repeat_each_other():
    problem = pushed(lambda t, x, u: (u**2).sum(-1), terminal_constraint=lambda t, x: torch.cat([x, 2 * x], -1))
    solution = oc.solve(problem, "indirect", steps=10)
    if not bool(solution.converged):
        assert "the equations are singular" in solution.status
    else:
        assert_close(solution.cost, 1.0, rtol=1e-6)


def test_history_and_progress(capsys):
    solution = oc.solve(swing(), "indirect", steps=10, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert " residual " in lines[0]
    assert set(solution.history) == {"cost", "residual", "nodes"}
    assert solution.history["cost"].shape == (4,)
    assert float(solution.history["residual"][-1]) <= 1e-6


def test_a_control_in_which_h_is_linear_is_refused():
    problem = oc.problems.get("double_integrator_min_time").build()
    with pytest.raises(
        oc.ProblemError, match=r"the Hamiltonian is linear in control 0, .* use solver='casadi', or add"
    ):
        oc.solve(problem, "indirect", steps=20)


def test_refusals_name_what_can():
    along = scalar_lqr(path_constraint=lambda t, x, u: x - 2)
    with pytest.raises(oc.ProblemError, match=r"has path_constraint; .* use solver='ddp' or 'casadi', or a penalty"):
        oc.solve(along, "indirect")
    with pytest.raises(oc.ProblemError, match=r"in torch.float32; solver 'indirect' needs the digits of torch.float64"):
        oc.solve(scalar_lqr(dtype=torch.float32), "indirect")
    discrete = oc.StagedOCP(
        oc.Stage(lambda k, x, u: x + u, lambda k, x, u: (x**2 + u**2).sum(-1), 1), initial_state=[1.0], steps=3
    )
    with pytest.raises(oc.ProblemError, match=r"discrete from the start; solver 'indirect' needs .* solver='ddp'"):
        oc.solve(discrete, "indirect")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "ddpp"}, r"start is 'ddpp'; expected 'auto' or 'ddp' or 'casadi'; did you mean 'ddp'\?"),
        ({"max_iterations": 0}, "max_iterations of Indirect is 0; expected max_iterations >= 1, a whole number"),
        ({"max_nodes": 1}, "max_nodes of Indirect is 1; expected max_nodes >= 2, a whole number"),
        ({"tolerance": -1.0}, "tolerance of Indirect is -1.0; expected tolerance > 0 and finite"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(oc.ProblemError, match=message):
        Indirect(**options)


def test_a_mesh_at_its_limit_is_the_cause_even_without_a_residual():
    # as scipy leaves the path of a cost with a kink: finite, but its residual is no number
    problem = oc.transcribe(scalar_lqr(), 4)
    first = DDP(kernel="torch").solve(problem, read_guess(problem, None))
    path = Collocated(np.zeros(331), np.zeros((2, 331)), np.zeros(0), None, math.nan, 1)
    converged, status = _status(Indirect(max_nodes=500), Steps(10, Stopwatch(None)), path, "ddp", first)
    assert not converged
    assert "the mesh limit of 500 points was reached" in status
    assert "a kink in the functions" in status
