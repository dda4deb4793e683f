"""DDP against exact answers: linear algebra where the problem is affine-quadratic, scipy and finite differences else."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.errors import NonFiniteError
from ocnopt.expansion import expand_path
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP, rollout, static_as_state, transcribe
from tests.oracles.compare import assert_close
from tests.oracles.lq import random_affine_quadratic


def swing(initial_state=(2.0, 0.0), **options):
    """A pendulum that wants to be upright, short and coarse."""
    settings = {"horizon": 1.5, "control_dim": 1} | options
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) + u[..., 0]], dim=-1),
        lambda t, x, u: 1 - torch.cos(x[..., 0]) + 0.1 * x[..., 1] ** 2 + 0.1 * u[..., 0] ** 2,
        lambda t, x: 5 * (1 - torch.cos(x[..., 0])) + x[..., 1] ** 2,
        initial_state=initial_state,
        **settings,
    )


def assert_converged(solution):
    assert bool(solution.converged.all()), solution.status
    assert float(solution.constraint_violation.max()) == 0.0


@pytest.fixture(scope="module")
def starts():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(64, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0])


@pytest.fixture(scope="module")
def solution():
    return solve(swing(control_bounds=(-1.0, 1.0)), steps=20)


class TestAffineQuadratic:
    @settings(max_examples=10)
    @given(seed=st.integers(0, 10_000), n=st.integers(1, 3), m=st.integers(1, 3), q=st.integers(0, 2))
    def test_one_iteration_is_the_solution(self, seed, n, m, q):
        lq = random_affine_quadratic(seed, 8, n, m, q)
        solution = solve(lq.staged())
        states, controls, parameters, cost = lq.solve()
        assert_converged(solution)
        assert solution.iterations.item() == 1
        assert_close(solution.cost, cost, rtol=1e-9, atol=1e-9)
        assert_close(solution.states, states, rtol=1e-7, atol=1e-8)
        assert_close(solution.controls, controls, rtol=1e-7, atol=1e-8)
        assert_close(solution.parameters, parameters, rtol=1e-7, atol=1e-8)

    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "auto"])
    def test_gains_and_costates_are_those_of_the_riccati_recursion(self, curvature):
        lq = random_affine_quadratic(3, 8, 3, 2)
        solution = solve(lq.staged(), curvature=curvature)
        K, P = lq.riccati()
        assert_close(solution.gains.K, K, rtol=1e-9, atol=1e-11)
        assert float(solution.gains.k.abs().max()) < 1e-9
        end = lq.E.numpy() @ solution.states[-1].numpy() + lq.e.numpy()
        assert_close(solution.costates[-1], end, rtol=1e-10)
        moved = solve(lq.staged(initial_state=lq.x0 + torch.tensor([0.1, -0.2, 0.3])))
        slope = P[0] @ np.array([0.1, -0.2, 0.3])
        assert_close(moved.costates[0] - solution.costates[0], slope, rtol=1e-7)

    def test_one_iteration_from_an_infeasible_start(self):
        lq = random_affine_quadratic(4, 8, 2, 2, 1)
        guess = {"states": torch.randn(9, 2), "controls": torch.randn(8, 2), "parameters": torch.randn(1)}
        solution = solve(lq.staged(), initial_guess=guess)
        assert_converged(solution)
        assert solution.iterations.item() == 1
        assert_close(solution.cost, lq.solve()[3], rtol=1e-9)

    def test_the_start_does_not_matter(self):
        lq = random_affine_quadratic(5, 8, 2, 2)
        solution = solve(lq.staged(), initial_guess=10 * torch.randn(8, 2))
        assert solution.iterations.item() == 1
        assert_close(solution.states, lq.solve()[0], rtol=1e-7, atol=1e-8)

    def test_a_batch_of_initial_states(self):
        lq = random_affine_quadratic(6, 8, 2, 2, 1)
        starts = torch.randn(4, 2).double()
        solution = solve(lq.staged(initial_state=starts))
        assert_converged(solution)
        assert solution.iterations.tolist() == [1] * 4
        for i, x0 in enumerate(starts):
            single = solve(lq.staged(initial_state=x0))
            assert_close(solution.states[i], single.states, rtol=1e-10, atol=1e-12)
            assert_close(solution.parameters[i], single.parameters, rtol=1e-10, atol=1e-12)

    def test_the_discrete_double_integrator(self):
        h = 0.1
        A = torch.tensor([[1.0, h], [0.0, 1.0]]).double()
        B = torch.tensor([h**2 / 2, h]).double()
        A[0, 1] = B[1] = h
        B[0] = h**2 / 2
        stage = Stage(
            lambda k, x, u: x @ A.mT + B * u, lambda k, x, u: (x**2).sum(-1) + 0.1 * (u**2).sum(-1), control_dim=1
        )
        solution = solve(StagedOCP(stage, lambda x: 10 * (x**2).sum(-1), initial_state=[1.0, 0.0], steps=50))
        assert_converged(solution)
        assert solution.iterations.item() == 1
        assert_close(solution.cost, 13.31743275051076, rtol=1e-11)
        assert_close(solution.gains.K[0], [[-2.58576128, -3.44345644]], rtol=1e-8)

    @pytest.mark.parametrize("name", ["scalar_lqr", "mimo_lqr_two_masses"])
    def test_the_stationary_riccati_equation(self, name):
        """With the stationary value as terminal cost, N steps cost what infinitely many do."""
        continuous = problems.control(name).build()
        model = transcribed_model(continuous, 20)
        n = continuous.state_dim
        A, B = model.fw.numpy()[:, :n], model.fw.numpy()[:, n:]
        H = model.lww.numpy()
        P = scipy.linalg.solve_discrete_are(A, B, H[:n, :n], H[n:, n:], s=H[:n, n:])
        K = -np.linalg.solve(H[n:, n:] + B.T @ P @ B, H[n:, :n] + B.T @ P @ A)
        value = torch.from_numpy(P)
        problem = OCP(
            continuous.dynamics,
            continuous.running_cost,
            lambda t, x: 0.5 * (x * (x @ value)).sum(-1),
            initial_state=continuous.initial_state,
            control_dim=continuous.control_dim,
            horizon=continuous.horizon,
        )
        solution = solve(problem, steps=20)
        assert_converged(solution)
        assert solution.iterations.item() == 1
        x0 = continuous.initial_state.numpy()
        assert_close(solution.cost, 0.5 * x0 @ P @ x0, rtol=1e-8)
        assert_close(solution.gains.K, np.tile(K, (20, 1, 1)), rtol=1e-8, atol=1e-10)
        assert_close(solution.costates, solution.states.numpy() @ P, rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("name", ["scalar_lqr", "mimo_lqr_two_masses"])
    def test_the_finite_riccati_recursion(self, name):
        continuous, steps = problems.control(name).build(), 30
        model = transcribed_model(continuous, steps)
        n = continuous.state_dim
        A, B, H = model.fw.numpy()[:, :n], model.fw.numpy()[:, n:], model.lww.numpy()
        P = np.zeros((n, n)) if continuous.terminal_cost is None else 2 * np.diag([10.0, 10.0, 1.0, 1.0])
        for _ in range(steps):
            Qux = H[n:, :n] + B.T @ P @ A
            P = H[:n, :n] + A.T @ P @ A - Qux.T @ np.linalg.solve(H[n:, n:] + B.T @ P @ B, Qux)
        x0 = continuous.initial_state.numpy()
        solution = solve(continuous, steps=steps)
        assert solution.iterations.item() == 1
        assert_close(solution.cost, 0.5 * x0 @ P @ x0, rtol=1e-8)

    def test_float32(self):
        lq = OCP(
            lambda t, x, u: u,
            lambda t, x, u: (x**2 + u**2).sum(-1),
            initial_state=[1.0],
            control_dim=1,
            horizon=1.0,
            dtype=torch.float32,
        )
        solution = solve(lq, steps=20)
        assert solution.states.dtype == torch.float32
        assert_converged(solution)
        assert solution.cost.item() == pytest.approx(math.tanh(1.0), rel=1e-3)


def transcribed_model(continuous, steps):
    """A step of the discrete problem as matrices."""
    staged = transcribe(continuous, steps)
    path = rollout(staged, [torch.zeros(continuous.control_dim).double()] * steps, staged.initial_state)
    return expand_path(staged, path.states, path.controls, second_order=False)[0]


class TestKnownMinima:
    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "auto"])
    def test_pendulum(self, curvature):
        solution = solve(problems.control("pendulum_swing_up").build(), curvature=curvature)
        assert_converged(solution)
        assert_close(solution.cost, 2.8280299143, rtol=1e-9)

    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "auto"])
    def test_bounded_pendulum(self, curvature):
        solution = solve(problems.control("pendulum_swing_up_u5").build(), curvature=curvature)
        assert_converged(solution)
        assert_close(solution.cost, 4.7970766764, rtol=1e-9)
        assert float(solution.controls.abs().max()) == 5.0

    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "auto"])
    def test_cartpole(self, curvature):
        solution = solve(problems.control("cartpole_swing_up_soft").build(), curvature=curvature)
        assert_converged(solution)
        assert_close(solution.cost, 2.6313393299, rtol=1e-9)

    def test_cartpole_from_a_small_constant_force(self):
        problem = problems.control("cartpole_swing_up_soft").build()
        solution = solve(problem, initial_guess=torch.full((100, 1), 0.1))
        assert_converged(solution)
        assert_close(solution.cost, 3.87853097, rtol=1e-8)


class TestStaticControls:
    def problem(self, **options):
        settings = {"initial_state": [1.0, -0.5], "parameters": [0.1, 0.2]} | options
        return OCP(
            lambda t, x, u, p: torch.stack(
                [x[..., 1] * p[..., 0], torch.sin(x[..., 0]) + u[..., 0] * p[..., 1]], dim=-1
            ),
            lambda t, x, u, p: ((x - 1) ** 2).sum(-1) + 0.1 * (u**2).sum(-1) + t * 0.05 * (p**2).sum(-1),
            lambda t, x, p: (x**2).sum(-1) + (p[..., 0] - 0.5) ** 2,
            control_dim=1,
            horizon=1.0,
            **settings,
        )

    def by_scipy(self, problem, steps, bounds=None):
        """Minimise the discrete cost over all controls and parameters at once."""
        staged = transcribe(problem, steps)
        q = staged.parameter_dim

        def cost(v):
            variables = torch.from_numpy(v).requires_grad_()
            path = rollout(staged, variables[q:].reshape(steps, -1).unbind(0), staged.initial_state, variables[:q])
            (gradient,) = torch.autograd.grad(path.cost, variables)
            return path.cost.item(), gradient.numpy()

        start = np.concatenate([staged.parameters.numpy(), np.zeros(steps * problem.control_dim)])
        options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-10}
        return scipy.optimize.minimize(cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)

    def test_against_scipy(self):
        ours, theirs = solve(self.problem(), steps=10), self.by_scipy(self.problem(), 10)
        assert_converged(ours)
        assert_close(ours.cost, theirs.fun, rtol=1e-9)
        assert_close(ours.parameters, theirs.x[:2], rtol=1e-4, atol=1e-5)

    def test_bounds_on_them(self):
        problem = self.problem(parameter_bounds=([-1.0, 0.0], [0.3, 0.4]))
        box = [(-1.0, 0.3), (0.0, 0.4)] + [(None, None)] * 10
        ours, theirs = solve(problem, steps=10), self.by_scipy(problem, 10, box)
        assert_converged(ours)
        assert_close(ours.cost, theirs.fun, rtol=1e-9)
        assert bool((ours.parameters <= torch.tensor([0.3, 0.4])).all())
        assert 0.3 in ours.parameters.tolist() or 0.4 in ours.parameters.tolist()

    def test_without_staged_controls(self):
        """The whole problem is a fit: x' = -p x through exp(-0.7) at t = 1."""
        fit = OCP(
            lambda t, x, u, p: -p * x,
            None,
            lambda t, x, p: (x[..., 0] - math.exp(-0.7)) ** 2,
            initial_state=[1.0],
            horizon=1.0,
            parameters=[2.0],
        )
        solution = solve(fit, steps=40)
        assert_converged(solution)
        assert_close(solution.parameters, [0.7], rtol=1e-7)
        assert solution.controls.shape == (40, 0)

    def test_each_problem_of_a_batch_has_its_own(self):
        starts = [[1.0, -0.5], [0.3, 0.2], [-1.0, 0.0]]
        together = solve(self.problem(initial_state=starts), steps=10)
        assert_converged(together)
        for i, x0 in enumerate(starts):
            alone = solve(self.problem(initial_state=x0), steps=10)
            assert_close(together.parameters[i], alone.parameters, rtol=1e-9)
            assert_close(together.cost[i], alone.cost, rtol=1e-12)
            assert together.iterations[i] == alone.iterations


class TestFreeHorizon:
    @pytest.mark.parametrize("t0", [0.0, 2.0])
    def test_a_closed_form(self, t0):
        """Minimise T + integral u^2 + w (x(T) - 1)^2, x' = u: at the minimum u = 1 and T = 1 - 1/w."""
        problem = OCP(
            lambda t, x, u: u,
            lambda t, x, u: 1 + (u**2).sum(-1),
            lambda t, x: 50 * (x[..., 0] - 1) ** 2,
            initial_state=[0.0],
            control_dim=1,
            horizon=FreeHorizon(t0 + 0.4, t0 + 0.1, t0 + 5.0, t0=t0),
        )
        solution = solve(problem, steps=7)
        assert_converged(solution)
        assert_close(solution.horizon, t0 + 1 - 1 / 50, rtol=1e-7)
        assert_close(solution.controls, torch.ones(7, 1), rtol=1e-7)
        assert_close(solution.cost, 2 - 1 / 50, rtol=1e-10)
        assert solution.parameters.shape == (0,)

    def fixed_or_free(self, horizon):
        return OCP(
            lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
            lambda t, x, u: 1 + 0.5 * u[..., 0] ** 2,
            lambda t, x: 20 * ((x[..., 0] - 1) ** 2 + x[..., 1] ** 2) + 0.1 * t**2,
            initial_state=[0.0, 0.0],
            control_dim=1,
            horizon=horizon,
        )

    def test_against_the_best_of_all_fixed_horizons(self):
        free = solve(self.fixed_or_free(FreeHorizon(1.0, 0.2, 8.0)), steps=15)
        assert_converged(free)

        def cost(end):
            return solve(self.fixed_or_free(float(end)), steps=15).cost.item()

        best = scipy.optimize.minimize_scalar(cost, bracket=(1.5, 2.0, 3.0), tol=1e-9)
        assert_close(free.cost, best.fun, rtol=1e-10)
        assert_close(free.horizon, best.x, rtol=1e-6)
        assert_close(free.times[-1], free.horizon, rtol=1e-14)

    def test_bounds_on_the_end(self):
        solution = solve(self.fixed_or_free(FreeHorizon(1.0, 0.2, 1.25)), steps=15)
        fixed = solve(self.fixed_or_free(1.25), steps=15)
        assert_converged(solution)
        assert solution.horizon.item() == 1.25
        assert_close(solution.cost, fixed.cost, rtol=1e-10)

    def test_against_ipopt(self):
        problem = self.fixed_or_free(FreeHorizon(1.0, 0.2, 8.0))
        ddp, casadi = solve(problem, steps=15), solve(problem, "casadi", steps=15)
        assert_close(ddp.cost, casadi.cost, rtol=1e-9)
        assert_close(ddp.horizon, casadi.horizon, rtol=1e-6)


class TestBatch:
    def test_64_problems_are_64_solves(self, starts):
        together = solve(swing(starts, control_bounds=(-3.0, 2.0)), steps=20)
        assert_converged(together)
        assert len(set(together.iterations.tolist())) > 3
        for i, x0 in enumerate(starts):
            alone = solve(swing(x0, control_bounds=(-3.0, 2.0)), steps=20)
            assert_close(together.cost[i], alone.cost, rtol=1e-12)
            assert_close(together.states[i], alone.states, rtol=1e-8, atol=1e-9)
            assert_close(together.gains.K[i], alone.gains.K, rtol=1e-6, atol=1e-7)
            assert together.iterations[i] == alone.iterations
            assert together.status[i] == alone.status

    def test_two_leading_axes(self, starts):
        flat = solve(swing(starts[:4]), steps=10)
        grid = solve(swing(starts[:4].reshape(2, 2, 2)), steps=10)
        assert_close(grid.states, flat.states.reshape(2, 2, 11, 2), rtol=1e-12)
        assert len(grid.status) == 4

    def test_a_batch_of_one(self, starts):
        one, alone = solve(swing(starts[:1]), steps=10), solve(swing(starts[0]), steps=10)
        assert_close(one.states[0], alone.states, rtol=1e-12)
        assert one.status == [alone.status]

    def test_captured_data_belongs_to_its_problem(self):
        target = torch.tensor([[0.5], [1.0], [-2.0]]).double()

        def problem(goal):
            return OCP(
                lambda t, x, u: torch.sin(x) + u,
                lambda t, x, u: ((x - goal) ** 2).sum(-1) + (u**2).sum(-1),
                initial_state=torch.zeros_like(goal),
                control_dim=1,
                horizon=1.0,
            )

        together = solve(problem(target), steps=10)
        for i in range(3):
            assert_close(together.states[i], solve(problem(target[i]), steps=10).states, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("m", [1, 2])
    @pytest.mark.parametrize("q", [0, 1])
    def test_one_that_is_not_finite_is_given_up_alone(self, m, q):
        def problem(x0):
            return OCP(
                lambda t, x, u, *p: x**3 + u.sum(-1, keepdim=True) + sum(p),
                lambda t, x, u, *p: (x**2).sum(-1) + (u**2).sum(-1) + sum((v**2).sum(-1) for v in p),
                initial_state=x0,
                control_dim=m,
                control_bounds=(-2.0, 2.0),
                parameters=[0.1] if q else None,
                horizon=1.0,
            )

        together = solve(problem([[0.5], [100.0], [-0.3]]), steps=20)
        assert together.converged.tolist() == [True, False, True]
        assert together.status[1] == "given up: the first path is not finite; pass another initial_guess"
        for i, x0 in ((0, [0.5]), (2, [-0.3])):
            alone = solve(problem(x0), steps=20)
            assert_close(together.cost[i], alone.cost, rtol=1e-12)
            assert_close(together.states[i], alone.states, rtol=1e-9)
            assert together.iterations[i] == alone.iterations


class TestNotFinite:
    def test_the_first_path_of_a_single_problem(self):
        problem = OCP(lambda t, x, u: x**3, None, lambda t, x: x.sum(-1), initial_state=[0.1, 100.0], horizon=1.0)
        with pytest.raises(
            NonFiniteError, match=r"dynamics led to inf in state component 1 at .*expected finite states: pass"
        ):
            solve(problem, steps=20)

    def test_its_cost(self):
        problem = OCP(
            lambda t, x, u: -torch.ones_like(x), lambda t, x, u: torch.log(x).sum(-1), initial_state=[0.5], horizon=1.0
        )
        with pytest.raises(
            NonFiniteError, match="the cost of the first path is nan; expected a finite number: pass initial"
        ):
            solve(problem, steps=4, integrator="euler")

    def test_a_guess_of_states_may_avoid_it(self):
        problem = OCP(
            lambda t, x, u: x**3 + u,
            lambda t, x, u: (x**2).sum(-1) + (u**2).sum(-1),
            initial_state=[2.0],
            control_dim=1,
            horizon=2.0,
        )
        with pytest.raises(NonFiniteError):
            solve(problem, steps=50, initial_guess=torch.zeros(50, 1))
        states = 2 * torch.exp(-3 * torch.linspace(0, 2, 51))[:, None]
        solution = solve(problem, steps=50, initial_guess={"states": states, "controls": -9 * states[:-1]})
        assert_converged(solution)

    def test_a_guess_of_states_from_which_a_step_is_not_finite(self):
        problem = OCP(
            lambda t, x, u: torch.sqrt(x) + u,
            lambda t, x, u: (u**2).sum(-1),
            initial_state=[1.0],
            control_dim=1,
            horizon=1.0,
        )
        with pytest.raises(NonFiniteError, match="state component 0"):
            solve(problem, steps=4, initial_guess={"states": torch.tensor([[1.0], [1.0], [-5.0], [1.0], [1.0]])})

    def test_a_candidate_of_the_line_search_is_only_rejected(self):
        problem = OCP(
            lambda t, x, u: u,
            lambda t, x, u: -torch.log(1 - x).sum(-1) + 0.01 * (u**2).sum(-1),
            lambda t, x: 100 * ((x - 0.999) ** 2).sum(-1),
            initial_state=[0.0],
            control_dim=1,
            horizon=1.0,
        )
        solution = solve(problem, steps=10)
        assert_converged(solution)
        assert bool(torch.isfinite(solution.cost))
        assert float(solution.states.max()) < 1
        assert float(solution.history["step"].min()) < 1


class TestRecord:
    def test_costates_are_the_derivatives_of_the_cost(self, solution):
        staged = solution.problem
        for k in (0, 7, 20):
            x = solution.states[k].clone().requires_grad_()
            cost = cost_from(staged, k, x, solution.controls)
            (slope,) = torch.autograd.grad(cost, x)
            assert_close(solution.costates[k], slope, rtol=1e-6, atol=1e-7)

    def test_the_first_costate_is_the_derivative_of_the_optimal_cost(self, solution):
        step, slopes = 1e-5, []
        for i in range(2):
            ends = [torch.tensor([2.0, 0.0]).double() + sign * step * torch.eye(2)[i] for sign in (1, -1)]
            up, down = (
                solve(swing(x0, control_bounds=(-1.0, 1.0)), steps=20, initial_guess=solution).cost for x0 in ends
            )
            slopes.append(float(up - down) / (2 * step))
        assert_close(solution.costates[0], slopes, rtol=1e-5)

    def test_gains_are_the_derivatives_of_the_optimal_controls(self):
        """du_0/dx_0 of the whole problem, solved again, is K_0 with exact curvature."""
        base, step = solve(swing(), steps=20, curvature="exact"), 1e-4
        columns = []
        for i in range(2):
            ends = [torch.tensor([2.0, 0.0]).double() + sign * step * torch.eye(2)[i] for sign in (1, -1)]
            up, down = (solve(swing(x0), steps=20, initial_guess=base).controls[0] for x0 in ends)
            columns.append((up - down) / (2 * step))
        assert_close(base.gains.K[0], torch.stack(columns, dim=-1), rtol=1e-5)

    def test_history(self, solution):
        cost, step, mu = (solution.history[key] for key in ("cost", "step", "regularisation"))
        assert len(cost) == len(step) == len(mu) >= solution.iterations.item() + 1
        assert cost[-1] == solution.cost
        assert bool((cost.diff() <= 1e-12).all())
        assert int((step > 0).sum()) == solution.iterations.item()
        assert mu[-1] == 0.0
        start = rollout(solution.problem, [torch.zeros(1).double()] * 20, solution.problem.initial_state).cost
        assert_close(cost[0], start)

    def test_bounds_hold_and_clamped_controls_do_not_respond(self, solution):
        clamped = solution.controls.abs() == 1.0
        assert 0 < int(clamped.sum()) < 20
        assert bool((solution.controls.abs() <= 1.0).all())
        assert float(solution.gains.K[clamped[:, 0]].abs().max()) == 0.0

    def test_the_path_follows_the_dynamics(self, solution):
        path = rollout(solution.problem, solution.controls.unbind(0), solution.problem.initial_state)
        assert_close(solution.states, torch.stack(path.states), rtol=1e-14, atol=1e-15)
        assert_close(solution.cost, path.cost, rtol=1e-14)

    def test_status(self, solution):
        assert solution.status == f"converged after {solution.iterations.item()} steps"
        lq = OCP(
            lambda t, x, u: u, lambda t, x, u: (u**2 + x**2).sum(-1), initial_state=[1.0], control_dim=1, horizon=1.0
        )
        assert solve(lq, steps=4).status == "converged after 1 step"

    def test_the_iteration_limit(self):
        solution = solve(swing([0.5, 0.0]), steps=20, max_iterations=2)
        assert not bool(solution.converged)
        assert solution.status.startswith(
            "stopped after 2 steps: the iteration limit was reached; raise max_iterations, or"
        )

    def test_open_gaps_are_in_the_status(self):
        states = torch.linspace(3.0, 0.0, 21)[:, None] * torch.tensor([1.0, 0.0])
        guess = {"states": states, "controls": torch.zeros(20, 1)}
        solution = solve(swing([3.0, 0.0], control_bounds=(-0.1, 0.1)), steps=20, initial_guess=guess, max_iterations=1)
        if float(solution.constraint_violation) > 0:
            assert "gaps up to" in solution.status
        assert not bool(solution.converged)

    def test_no_step_decreases_the_cost(self):
        """A cost whose derivative is wrong: every direction leads uphill."""
        problem = OCP(
            lambda t, x, u: u,
            lambda t, x, u: (u + u**2 - 2 * (u - u.detach())).sum(-1),
            initial_state=[0.0],
            control_dim=1,
            horizon=1.0,
        )
        solution = solve(problem, steps=4, initial_guess=-0.5 * torch.ones(4, 1))
        assert not bool(solution.converged)
        assert (
            "no step decreases the cost under the largest regularisation; look for a kink in the functions"
            in solution.status
        )

    def test_progress_is_shown_on_request(self, capsys):
        solve(swing(), steps=5, progress=True)
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert all(word in lines[0] for word in ("cost", "step", "mu"))
        solve(swing(), steps=5)
        assert capsys.readouterr().out == ""


def cost_from(staged, k, x, controls):
    """Cost of the rest of the path from x at step k with the given controls."""
    (group,) = staged.groups
    total = x.new_zeros(())
    for i in range(k, staged.steps):
        x, cost = staged.advance(group.stage, i, x, controls[i], staged.start_parameters())
        total = total + cost
    return total + staged.terminal(x, staged.start_parameters())


class TestInfeasibleStart:
    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "auto"])
    def test_gaps_close_and_the_minimum_is_the_same(self, curvature):
        states = torch.linspace(2.0, 0.0, 21)[:, None] * torch.tensor([1.0, 0.0])
        infeasible = solve(swing(), steps=20, initial_guess={"states": states}, curvature=curvature)
        assert_converged(infeasible)
        path = rollout(infeasible.problem, infeasible.controls.unbind(0), infeasible.problem.initial_state)
        assert_close(infeasible.states, torch.stack(path.states), rtol=1e-9, atol=1e-10)
        assert_close(infeasible.cost, solve(swing(), steps=20).cost, rtol=1e-9)

    def test_in_a_batch(self):
        starts = torch.tensor([[2.0, 0.0], [1.0, 0.5]]).double()
        states = torch.linspace(1.0, 0.0, 21)[:, None] * starts[:, None]
        together = solve(swing(starts), steps=20, initial_guess={"states": states})
        assert_converged(together)
        for i in range(2):
            alone = solve(swing(starts[i]), steps=20, initial_guess={"states": states[i]})
            assert_close(together.states[i], alone.states, rtol=1e-8, atol=1e-9)
            assert together.iterations[i] == alone.iterations

    def test_with_a_free_end_and_parameters(self):
        problem = OCP(
            lambda t, x, u, p: torch.sin(x) * p + u,
            lambda t, x, u, p: 1 + (x**2).sum(-1) + (u**2).sum(-1) + (p**2).sum(-1),
            lambda t, x, p: 20 * (x**2).sum(-1),
            initial_state=[1.5],
            control_dim=1,
            horizon=FreeHorizon(1.0, 0.2, 3.0),
            parameters=[0.5],
        )
        feasible = solve(problem, steps=10)
        states = torch.linspace(1.5, 0.0, 11)[:, None]
        infeasible = solve(problem, steps=10, initial_guess={"states": states, "horizon": 0.8, "parameters": [0.1]})
        assert_converged(feasible)
        assert_converged(infeasible)
        assert_close(infeasible.cost, feasible.cost, rtol=1e-9)
        assert_close(infeasible.horizon, feasible.horizon, rtol=1e-5)


class TestBounds:
    def test_a_bang_bang_optimum_is_recognised(self):
        """Every control at its bound, the gradient pushing outwards: optimal, though Q_uu is negative there."""
        stage = Stage(lambda k, x, u: x + 0.2 * u, lambda k, x, u: 0.01 * (u**2).sum(-1), 1)
        problem = StagedOCP(stage, lambda x: -(x**2).sum(-1), initial_state=[0.1], steps=5, control_bounds=(-1.0, 1.0))
        solution = solve(problem)
        assert solution.controls.flatten().tolist() == [1.0] * 5
        assert_converged(solution)

    @settings(max_examples=8)
    @given(seed=st.integers(0, 1000), m=st.integers(1, 3))
    def test_convex_problems_against_scipy(self, seed, m):
        lq = random_affine_quadratic(seed, 6, 2, m)
        problem = lq.staged(control_bounds=(-0.3, 0.4))
        ours = solve(problem)
        assert_converged(ours)

        def cost(v):
            variables = torch.from_numpy(v).requires_grad_()
            value = rollout(problem, variables.reshape(6, m).unbind(0), problem.initial_state).cost
            (gradient,) = torch.autograd.grad(value, variables)
            return value.item(), gradient.numpy()

        options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10}
        box = [(-0.3, 0.4)] * (6 * m)
        theirs = scipy.optimize.minimize(
            cost, np.zeros(6 * m), jac=True, method="L-BFGS-B", bounds=box, options=options
        )
        assert_close(ours.cost, theirs.fun, rtol=1e-8, atol=1e-9)
        assert_close(ours.controls.flatten(), theirs.x, rtol=1e-3, atol=1e-4)

    def test_one_side_only(self):
        solution = solve(swing(control_bounds=(-math.inf, 0.2)), steps=20)
        assert_converged(solution)
        assert float(solution.controls.max()) == pytest.approx(0.2, abs=1e-15)
        assert float(solution.controls.min()) < -0.5


class TestStages:
    def stages(self):
        grow = Stage(lambda k, x, u: torch.cat([torch.sin(x), u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1)
        mix = Stage(lambda k, x, u: x * x.flip(-1) + u, lambda k, x, u: (k + 1) * (u**2).sum(-1), 2)
        rest = Stage(lambda k, x, u: x.sum(-1, keepdim=True), None, 0)
        return [grow, mix, mix, rest, grow]

    def test_sizes_may_vary(self):
        problem = StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5])
        solution = solve(problem, initial_guess=[torch.full((m,), 0.3) for m in (1, 2, 2, 0, 1)])
        assert_converged(solution)
        assert [x.shape[-1] for x in solution.states] == [1, 2, 2, 2, 1, 2]
        assert [u.shape[-1] for u in solution.controls] == [1, 2, 2, 0, 1]
        assert [tuple(K.shape) for K in solution.gains.K] == [(1, 1), (2, 2), (2, 2), (0, 2), (1, 1)]
        assert [p.shape[-1] for p in solution.costates] == [1, 2, 2, 2, 1, 2]
        sizes = [1, 2, 2, 0, 1]

        def cost(v):
            variables = torch.from_numpy(v).requires_grad_()
            value = rollout(problem, variables.split(sizes), problem.initial_state).cost
            (gradient,) = torch.autograd.grad(value, variables)
            return value.item(), gradient.numpy()

        start = torch.cat(list(solution.controls)).numpy() + 0.01
        theirs = scipy.optimize.minimize(cost, start, jac=True, options={"gtol": 1e-9})
        assert_close(solution.cost, theirs.fun, rtol=1e-9)

    def test_a_batch_of_them(self):
        starts = torch.tensor([[0.5], [-0.3], [1.0]]).double()
        together = solve(StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=starts))
        for i in range(3):
            alone = solve(StagedOCP(self.stages(), lambda x: ((x - 1) ** 2).sum(-1), initial_state=starts[i]))
            assert_close(together.cost[i], alone.cost, rtol=1e-12)

    def test_the_same_stage_listed_or_repeated(self):
        stage = Stage(lambda k, x, u: torch.sin(x) + u, lambda k, x, u: (x**2).sum(-1) + (u**2).sum(-1), 1)
        listed = solve(StagedOCP([stage] * 6, initial_state=[2.0]))
        repeated = solve(StagedOCP(stage, initial_state=[2.0], steps=6))
        assert_close(listed.states, repeated.states, rtol=1e-12)
        assert listed.iterations == repeated.iterations

    def test_static_controls_of_a_discrete_problem(self):
        stage = Stage(lambda k, x, u, p: x + p * u, lambda k, x, u, p: (u**2).sum(-1), 1)
        problem = StagedOCP(
            stage,
            lambda x, p: (x[..., 0] - 3) ** 2 + 0.1 * (p[..., 0] - 1) ** 4,
            initial_state=torch.zeros(2, 1),
            steps=4,
            parameters=[1.0],
        )
        solution = solve(problem, initial_guess=torch.full((4, 1), 0.5))
        assert_converged(solution)
        p, u = solution.parameters, solution.controls
        path = rollout(problem, u.unbind(-2), problem.initial_state, p)
        assert_close(solution.cost, path.cost)
        assert float(p.min()) > 1.0
        assert static_as_state(problem).parameter_dim == 0


def test_solver_objects_are_frozen_records():
    assert DDP() == DDP("auto", 500, 1e-8, 0.0)
    assert len({DDP(), DDP(), DDP("exact")}) == 2
