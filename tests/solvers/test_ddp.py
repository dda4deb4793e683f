"""DDP on nonlinear problems: known minima, what it reports, infeasible starts, bounds, paths that explode."""

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
from ocnopt.ocp import OCP
from ocnopt.paths import rollout
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close
from tests.oracles.lq import random_affine_quadratic
from tests.solvers.cases import assert_converged, free_end, pushed, scalar_lqr, swing


@pytest.fixture(scope="module")
def solution():
    return solve(swing(control_bounds=(-1.0, 1.0)), steps=20)


class TestKnownMinima:
    """Curvature "auto" is compared with the same values for every solver, in tests/problems."""

    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton"])
    def test_pendulum(self, curvature):
        solution = solve(problems.control("pendulum_swing_up").build(), curvature=curvature)
        assert_converged(solution)
        assert_close(solution.cost, 2.8280299143, rtol=1e-9)

    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton"])
    def test_bounded_pendulum(self, curvature):
        solution = solve(problems.control("pendulum_swing_up_u5").build(), curvature=curvature)
        assert_converged(solution)
        assert_close(solution.cost, 4.7970766764, rtol=1e-9)
        assert float(solution.controls.abs().max()) == 5.0

    @pytest.mark.parametrize("curvature", ["exact", "gauss_newton"])
    def test_cartpole(self, curvature):
        solution = solve(problems.control("cartpole_swing_up_soft").build(), curvature=curvature)
        assert_converged(solution)
        assert_close(solution.cost, 2.6313393299, rtol=1e-9)

    def test_cartpole_from_a_small_constant_force(self):
        problem = problems.control("cartpole_swing_up_soft").build()
        solution = solve(problem, initial_guess=torch.full((100, 1), 0.1))
        assert_converged(solution)
        assert_close(solution.cost, 3.87853097, rtol=1e-8)


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
        assert_close(solution.states, path.states, rtol=1e-14, atol=1e-15)
        assert_close(solution.cost, path.cost, rtol=1e-14)

    def test_status(self, solution):
        assert solution.status == f"converged after {solution.iterations.item()} steps (lowered kernel)"
        assert solve(scalar_lqr(), steps=4).status == "converged after 1 step (lowered kernel)"

    def test_the_iteration_limit(self):
        solution = solve(swing([0.5, 0.0]), steps=20, max_iterations=2)
        assert not bool(solution.converged)
        assert solution.status.startswith(
            "stopped after 2 steps: the iteration limit was reached; the gradient is still "
        )

    def test_open_gaps_are_in_the_status(self):
        states = torch.zeros(101, 4)
        states[:, 1] = torch.linspace(0, math.pi, 101)
        guess = {"states": states, "controls": torch.zeros(100, 1)}
        solution = solve(problems.get("cartpole_swing_up_soft").build(), initial_guess=guess, max_iterations=1)
        assert float(solution.history["step"][1]) < 1
        assert float(solution.constraint_violation) > 0
        assert "gaps up to" in solution.status
        assert not bool(solution.converged)

    @pytest.mark.filterwarnings("ignore:.* hides part of itself from derivatives")
    def test_no_step_decreases_the_cost(self):
        """A cost whose derivative is wrong in torch: every direction leads uphill. CasADi knows no detach."""
        problem = pushed(lambda t, x, u: (u + u**2 - 2 * (u - u.detach())).sum(-1), initial_state=[0.0])
        solution = solve(problem, steps=4, initial_guess=-0.5 * torch.ones(4, 1), kernel="torch")
        assert not bool(solution.converged)
        assert "no step decreases the cost under the largest regularisation; the gradient is still " in solution.status

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
        assert_close(infeasible.states, path.states, rtol=1e-9, atol=1e-10)
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
        problem = free_end()
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

    def test_a_concave_control_at_its_bound_does_not_keep_a_free_one_from_converging(self):
        stage = Stage(
            lambda k, x, u: x + 0.2 * u,
            lambda k, x, u: 0.01 * (u**2).sum(-1) + torch.cosh(x[..., 1] - 0.3),
            control_dim=2,
        )
        options = {"initial_state": [0.1, 1.0], "steps": 5, "control_bounds": (-1.0, 1.0)}
        solution = solve(StagedOCP(stage, lambda x: -(x[..., 0] ** 2), **options))
        assert_converged(solution)
        assert_close(solution.controls[:, 0], torch.ones(5))
        assert -1 < float(solution.controls[3, 1]) < 0
        assert solution.iterations.item() < 20

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
        problem = pushed(
            lambda t, x, u: -torch.log(1 - x).sum(-1) + 0.01 * (u**2).sum(-1),
            lambda t, x: 100 * ((x - 0.999) ** 2).sum(-1),
            [0.0],
        )
        solution = solve(problem, steps=10)
        assert_converged(solution)
        assert bool(torch.isfinite(solution.cost))
        assert float(solution.states.max()) < 1
        assert float(solution.history["step"].min()) < 1


def test_solver_objects_are_frozen_records():
    assert DDP() == DDP("auto", 500, 1e-8, 0.0)
    assert len({DDP(), DDP(), DDP("exact")}) == 2
