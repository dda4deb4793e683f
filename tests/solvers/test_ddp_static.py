"""DDP over static controls and a free end time, against scipy, closed forms and IPOPT."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch

from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.paths import rollout
from ocnopt.solvers.solve import solve
from ocnopt.staged import transcribe
from tests.oracles.compare import assert_close
from tests.solvers.cases import assert_converged


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
        free = solve(self.fixed_or_free(FreeHorizon(1.0, 0.2, 8.0)), steps=6)
        assert_converged(free)

        def cost(end):
            return solve(self.fixed_or_free(float(end)), steps=6, kernel="torch").cost.item()

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

    def test_damped_at_the_minimum_it_ends_there(self):
        """Stiff: an implicit step that is differentiated differs from the one rolled out by rounding."""

        def problem(horizon):
            return OCP(
                lambda t, x, u: torch.stack([x[..., 1], -1000 * (x[..., 1] - u[..., 0])], dim=-1),
                lambda t, x, u: (u**2).sum(-1) + 1.0,
                lambda t, x: 100 * ((x[..., 0] - 1) ** 2 + x[..., 1] ** 2),
                initial_state=[0.0, 0.0],
                control_dim=1,
                horizon=horizon,
            )

        options = {"steps": 10, "integrator": "implicit_euler", "kernel": "torch"}
        free = solve(problem(FreeHorizon(1.0, 0.2, 5.0)), **options)
        assert_converged(free)
        assert_close(solve(problem(float(free.horizon)), **options).cost, free.cost, rtol=1e-10)
