"""DDP on affine-quadratic problems: one iteration, and the answers of linear algebra."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.linearise import expand_path
from ocnopt.ocp import OCP
from ocnopt.paths import Path, Widened, rollout
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close
from tests.oracles.lq import random_affine_quadratic
from tests.solvers.cases import assert_converged


class TestAffineQuadratic:
    @settings(max_examples=7)
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
        A, B = model.F[0].numpy()[1:, 1 : 1 + n], model.F[0].numpy()[1:, 1 + n :]
        H = model.L[0].numpy()[1:, 1:]
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
        A, B = model.F[0].numpy()[1:, 1 : 1 + n], model.F[0].numpy()[1:, 1 + n :]
        H = model.L[0].numpy()[1:, 1:]
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
    return expand_path(Widened(staged), Path(*path), exact=False)
