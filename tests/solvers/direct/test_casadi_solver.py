"""The "casadi" solver against closed forms, Riccati recursions and known minima."""

import math

import pytest
import torch
from torch.func import hessian, jacrev

from ocnopt.errors import NonFiniteError
from ocnopt.ocp import OCP, FreeHorizon, Horizon
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.solvers.cases import scalar_lqr

F64 = torch.float64
METHODS = ("multiple_shooting", "collocation")


def stack(*parts):
    return torch.stack(torch.broadcast_tensors(*parts), dim=-1)


def two_masses():
    A = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -0.2, 0.1], [1, -2, 0.1, -0.2]], dtype=F64)
    B = torch.tensor([[0, 0], [0, 0], [1, 0], [0, 1]], dtype=F64)
    Q, R, Qf = (torch.tensor(d, dtype=F64) for d in ([1, 2, 0.1, 0.1], [0.5, 0.2], [10.0, 10.0, 1.0, 1.0]))
    return OCP(
        lambda t, x, u: x @ A.T + u @ B.T,
        lambda t, x, u: (Q * x**2).sum(-1) + (R * u**2).sum(-1),
        lambda t, x: (Qf * x**2).sum(-1),
        initial_state=[1.0, -0.5, 0.0, 0.5],
        control_dim=2,
        horizon=4.0,
    )


def pendulum(**options):
    return OCP(
        lambda t, x, u: stack(x[..., 1], 9.81 * torch.sin(x[..., 0]) - 0.1 * x[..., 1] + u[..., 0]),
        lambda t, x, u: 1 - torch.cos(x[..., 0]) + 0.1 * x[..., 1] ** 2 + 0.01 * u[..., 0] ** 2,
        lambda t, x: 100 * (1 - torch.cos(x[..., 0])) + 10 * x[..., 1] ** 2,
        initial_state=[math.pi, 0.0],
        control_dim=1,
        horizon=4.0,
        **options,
    )


def minimum_time():
    goal = torch.tensor([1.0, 0.0], dtype=F64)
    return OCP(
        lambda t, x, u: stack(x[..., 1], u[..., 0]),
        terminal_cost=lambda t, x: t,
        terminal_constraint=lambda t, x: x - goal,
        initial_state=[0.0, 0.0],
        control_dim=1,
        control_bounds=(-1.0, 1.0),
        horizon=FreeHorizon(1.0, 0.1, 10.0),
    )


def brachistochrone():
    goal = torch.tensor([10.0, 5.0], dtype=F64)
    return OCP(
        lambda t, x, u: stack(
            x[..., 2] * torch.sin(u[..., 0]), x[..., 2] * torch.cos(u[..., 0]), 9.80665 * torch.cos(u[..., 0])
        ),
        terminal_cost=lambda t, x: t,
        terminal_constraint=lambda t, x: x[..., :2] - goal,
        initial_state=[0.0, 0.0, 0.0],
        control_dim=1,
        horizon=FreeHorizon(1.0, 0.1, 10.0),
    )


def bryson_denham(**options):
    goal = torch.tensor([0.0, -1.0], dtype=F64)
    return OCP(
        lambda t, x, u: stack(x[..., 1], u[..., 0]),
        lambda t, x, u: 0.5 * u[..., 0] ** 2,
        terminal_constraint=lambda t, x: x - goal,
        path_constraint=lambda t, x, u: x[..., :1] - 1 / 9,
        initial_state=[0.0, 1.0],
        control_dim=1,
        horizon=1.0,
        **options,
    )


def parking():
    """Tassa, Mansard and Todorov, ICRA 2014."""
    d, h = 2.0, 0.03

    def step(k, x, u):
        (w, a), f = u.unbind(-1), h * x[..., 3]
        b = d + f * torch.cos(w) - torch.sqrt(d**2 - (f * torch.sin(w)) ** 2)
        turn = torch.asin(torch.sin(w) * f / d)
        return x + stack(b * torch.cos(x[..., 2]), b * torch.sin(x[..., 2]), turn, h * a)

    def smooth(z, p):
        return torch.sqrt(z**2 + p**2) - p

    def cost(k, x, u):
        steering = 0.01 * (u[..., 0] ** 2 + 0.01 * u[..., 1] ** 2)
        return steering + 0.001 * (smooth(x[..., 0], 0.1) + smooth(x[..., 1], 0.1))

    def end(x):
        near = 0.1 * smooth(x[..., 0], 0.01) + 0.1 * smooth(x[..., 1], 0.01)
        return near + smooth(x[..., 2], 0.01) + 0.3 * smooth(x[..., 3], 1.0)

    bounds = ([-0.5, -2.0], [0.5, 2.0])
    start = [1.0, 1.0, 1.5 * math.pi, 0.0]
    return StagedOCP(Stage(step, cost, 2), end, initial_state=start, steps=500, control_bounds=bounds)


def riccati(staged):
    """Cost and first control of a linear-quadratic discrete problem, by its own matrices."""
    n, m = staged.state_dim, staged.groups[0].stage.control_dim
    zero, p = torch.zeros(n + m, dtype=F64), torch.zeros(0, dtype=F64)

    def at(part):
        return lambda z: staged.advance(staged.groups[0].stage, torch.tensor(0.0, dtype=F64), z[:n], z[n:], p)[part]

    F, C = jacrev(at(0))(zero), hessian(at(1))(zero)
    V = hessian(lambda x: staged.terminal(x, p))(zero[:n])
    for _ in range(staged.steps):
        Q = C + F.T @ V @ F
        K = torch.linalg.solve(Q[n:, n:], Q[n:, :n])
        V = Q[:n, :n] - Q[n:, :n].T @ K
    x0 = staged.initial_state
    return 0.5 * x0 @ V @ x0, -K @ x0, V @ x0


@pytest.mark.parametrize("problem", [scalar_lqr(), two_masses()], ids=["scalar", "two masses"])
def test_lqr_is_the_riccati_recursion_in_one_iteration(problem):
    solution = solve(problem, "casadi", steps=50)
    cost, control, costate = riccati(transcribe(problem, 50))
    assert solution.iterations == 1
    torch.testing.assert_close(solution.cost, cost, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.controls[0], control, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(solution.costates[0], costate, rtol=1e-8, atol=1e-8)


def test_collocation_of_the_lqr_meets_the_continuous_value():
    solution = solve(scalar_lqr(), "casadi", steps=200, method="collocation")
    assert float(solution.cost) == pytest.approx(math.tanh(1), abs=2e-6)  # constant controls cost O(1/N**2) more


def test_pendulum_meets_the_discrete_reference():
    start = torch.full((100, 1), 0.1, dtype=F64)
    solution = solve(pendulum(), "casadi", initial_guess=start)
    assert float(solution.cost) == pytest.approx(2.8280299143, rel=1e-9)
    assert solution.converged
    assert solution.states.shape == (101, 2)
    assert solution.controls.shape == (100, 1)
    assert solution.gains is None
    bounded = solve(pendulum(control_bounds=(-5.0, 5.0)), "casadi", initial_guess=start)
    assert float(bounded.cost) == pytest.approx(4.7970766764, rel=1e-8)
    assert float(bounded.controls.abs().max()) <= 5.0
    near = solve(pendulum(), "casadi", initial_guess=solution, method="collocation")
    assert float(near.cost) == pytest.approx(float(solution.cost), rel=1e-5)


def test_costates_are_the_gradient_of_the_cost_to_go():
    solution = solve(pendulum(), "casadi", steps=40, initial_guess=torch.full((40, 1), 0.1, dtype=F64))
    end = solution.states[-1]
    expected = torch.stack([100 * torch.sin(end[0]), 20 * end[1]])
    torch.testing.assert_close(solution.costates[-1], expected, rtol=1e-7, atol=1e-7)
    staged = transcribe(pendulum(), 40)
    stage, p = staged.groups[0].stage, torch.zeros(0, dtype=F64)
    for k in range(39, -1, -1):
        x, u = solution.states[k].requires_grad_(), solution.controls[k]
        x_next, cost = staged.advance(stage, torch.tensor(float(k), dtype=F64), x, u, p)
        (expected,) = torch.autograd.grad(cost + x_next @ solution.costates[k + 1], x)
        torch.testing.assert_close(solution.costates[k], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_minimum_time_from_the_default_start(method):
    solution = solve(minimum_time(), "casadi", steps=50, method=method)
    assert float(solution.horizon) == pytest.approx(2.0, abs=1e-6)
    assert float(solution.times[-1]) == float(solution.horizon)
    assert solution.parameters.shape == (0,)
    assert solution.constraint_violation < 1e-9
    assert float(solution.controls.abs().max()) <= 1.0


@pytest.mark.parametrize("method", METHODS)
def test_brachistochrone_from_the_default_start(method):
    solution = solve(brachistochrone(), "casadi", steps=100, method=method)
    assert float(solution.horizon) == pytest.approx(1.801603122453081, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_path_constraints_hold_at_the_nodes(method):
    solution = solve(bryson_denham(), "casadi", steps=60, method=method)
    assert solution.converged
    assert float(solution.states[:, 0].max()) <= 1 / 9 + 1e-9
    assert float(solution.cost) == pytest.approx(4.0, rel=5e-3)


def test_parking_reaches_a_known_minimum():
    solution = solve(parking(), "casadi")
    known = (1.4361004746, 1.6450210, 1.9051672, 1.9740308, 2.0272238, 2.8203421)
    assert min(abs(float(solution.cost) - value) for value in known) < 1e-6
    assert solution.converged


@pytest.mark.parametrize("method", METHODS)
def test_static_parameters_and_their_bounds(method):
    def problem(upper):
        return OCP(
            lambda t, x, u, p: p[..., :1] + 0 * x,
            terminal_cost=lambda t, x, p: (x[..., 0] - 3) ** 2 + p[..., 0] ** 2,
            initial_state=[0.0],
            horizon=1.0,
            parameters=[0.2],
            parameter_bounds=(-1.0, upper),
        )

    free, bounded = (solve(problem(upper), "casadi", steps=5, method=method) for upper in (10.0, 1.0))
    torch.testing.assert_close(free.parameters, torch.tensor([1.5], dtype=F64))
    torch.testing.assert_close(bounded.parameters, torch.tensor([1.0], dtype=F64))
    assert free.controls.shape == (5, 0)


@pytest.mark.parametrize("method", METHODS)
def test_free_horizon_without_terminal_constraint(method):
    # x' = 1 from 0: minimise (x(T) - 2)^2 + T, so T = 3/2.
    problem = OCP(
        lambda t, x, u: torch.ones_like(x),
        terminal_cost=lambda t, x: (x[..., 0] - 2) ** 2 + t - 1,
        initial_state=[0.0],
        horizon=FreeHorizon(1.5, 1.2, 9.0, t0=1.0),
    )
    solution = solve(problem, "casadi", steps=4, method=method)
    assert float(solution.horizon) == pytest.approx(2.5, abs=1e-8)
    torch.testing.assert_close(solution.times, torch.linspace(1.0, 2.5, 5, dtype=F64))


@pytest.mark.parametrize("method", METHODS)
def test_time_varying_problems(method):
    problem = OCP(
        lambda t, x, u: u + torch.cos(t)[..., None],
        lambda t, x, u: (u**2).sum(-1) + (x[..., 0] - torch.sin(t)) ** 2,
        initial_state=[0.0],
        control_dim=1,
        horizon=Horizon(0.0, 2.0),
    )
    solution = solve(problem, "casadi", steps=20, method=method)
    assert float(solution.cost) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(solution.states[:, 0], torch.sin(solution.times), rtol=0, atol=1e-5)


def test_a_batch_gives_the_answers_of_single_problems():
    goals = torch.tensor([[1.0], [2.0], [-1.0]], dtype=F64)
    starts = torch.tensor([[0.0], [0.5], [1.0]], dtype=F64)

    def problem(goal, start):
        return OCP(
            lambda t, x, u: torch.sin(x) + u,
            lambda t, x, u: (u**2).sum(-1),
            lambda t, x: 10 * ((x - goal) ** 2).sum(-1) + 0.1 * t,
            initial_state=start,
            control_dim=1,
            horizon=FreeHorizon(1.0, 0.5, 3.0),
        )

    together = solve(problem(goals, starts), "casadi", steps=10)
    assert together.cost.shape == together.horizon.shape == (3,)
    assert together.states.shape == (3, 11, 1)
    assert together.costates.shape == (3, 11, 1)
    assert together.history["cost"].shape[1:] == (3,)
    assert len(together.status) == 3
    for i in range(3):
        alone = solve(problem(goals[i], starts[i]), "casadi", steps=10)
        for name in ("cost", "horizon", "states", "controls", "costates", "times"):
            torch.testing.assert_close(getattr(together, name)[i], getattr(alone, name), rtol=1e-8, atol=1e-8)


def test_one_impossible_problem_of_a_batch_harms_no_other():
    goals = torch.tensor([[0.5], [5.0]], dtype=F64)
    problem = OCP(
        lambda t, x, u: u,
        lambda t, x, u: (u**2).sum(-1),
        terminal_constraint=lambda t, x: x - goals,
        initial_state=torch.zeros(2, 1, dtype=F64),
        control_dim=1,
        control_bounds=(-1.0, 1.0),
        horizon=1.0,
    )
    solution = solve(problem, "casadi", steps=10, restarts=1)
    assert solution.converged.tolist() == [True, False]
    assert float(solution.cost[0]) == pytest.approx(0.25, abs=1e-8)
    assert "no feasible path" in solution.status[1]
    assert "1 restart(s) from seeded perturbations" in solution.status[1]
    assert "largest violation" in solution.status[1]
    assert solution.constraint_violation[0] < 1e-9 < solution.constraint_violation[1]


def test_an_exhausted_solver_says_so():
    guess = torch.full((100, 1), 0.1, dtype=F64)
    solution = solve(pendulum(), "casadi", max_iterations=3, initial_guess=guess)
    assert not solution.converged
    assert "max_iterations= reached; raise it" in solution.status
    assert solution.iterations == 3
    assert solution.history["cost"].shape == (4,)


def test_a_start_that_leads_to_infinity_is_replaced_by_a_flat_one():
    problem = OCP(
        lambda t, x, u: torch.exp(x) + u,
        lambda t, x, u: (u**2).sum(-1),
        lambda t, x: (x**2).sum(-1),
        initial_state=[3.0],
        control_dim=1,
        horizon=2.0,
    )
    solution = solve(problem, "casadi", steps=50, initial_guess=torch.zeros(50, 1, dtype=F64))
    assert solution.converged
    assert "restart" not in solution.status


def test_a_failed_start_is_perturbed_and_the_status_says_so():
    # x' = u^2 has no derivative in u at the default start u = 0, where the goal x(1) = 1 looks out of reach.
    problem = OCP(
        lambda t, x, u: u**2,
        lambda t, x, u: (u**2).sum(-1),
        terminal_constraint=lambda t, x: x - 1,
        initial_state=[0.0],
        control_dim=1,
        horizon=1.0,
    )
    solution = solve(problem, "casadi", steps=5)
    assert solution.converged
    assert float(solution.cost) == pytest.approx(1.0, abs=1e-8)
    assert "restart(s) from seeded perturbations" in solution.status
    assert not solve(problem, "casadi", steps=5, restarts=0).converged


def test_no_finite_path_is_named():
    problem = OCP(
        lambda t, x, u: u - 30 * torch.sqrt(x),
        terminal_cost=lambda t, x: (x**2).sum(-1),
        initial_state=[1.0],
        control_dim=1,
        control_bounds=(-1e-3, 1e-3),
        horizon=10.0,
    )
    with pytest.raises(NonFiniteError, match=r"NaN or infinite on the way.*at the start: dynamics\[0\] at step"):
        solve(problem, "casadi", steps=5, restarts=1, initial_guess=torch.zeros(5, 1, dtype=F64))


def test_an_infeasible_start_from_states():
    states = torch.linspace(math.pi, 0, 41, dtype=F64)[:, None] * torch.tensor([1.0, 0.0], dtype=F64)
    solution = solve(pendulum(), "casadi", steps=40, initial_guess={"states": states})
    assert solution.converged
    assert solution.constraint_violation < 1e-9
