"""Whole solves by DDP's two kernels: the same sweeps, the same minimum."""

import inspect
from dataclasses import fields

import casadi
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP
from ocnopt.paths import Widened
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.lowered import arrays, compiled
from ocnopt.solvers.lowered import kernel as lowered_kernel
from ocnopt.solvers.lowered.compiled import find_compiler
from ocnopt.solvers.lowered.kernel import LoweredKernel
from ocnopt.solvers.lowered.steps import Fold
from ocnopt.solvers.search import TorchKernel
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.lq import random_affine_quadratic
from tests.solvers.cases import assert_converged, free_end, pushed, swing

# Kernels that are lowered, and whether they are compiled.
LOWERED = {"lowered": False} if find_compiler() is None else {"lowered": False, "compiled": True}
NAMES = ("scalar_lqr", "mimo_lqr_two_masses", "pendulum_swing_up", "pendulum_swing_up_u5", "cartpole_swing_up_soft")


def near(actual, expected, tolerance):
    """Relative to the largest entry."""
    assert actual.shape == expected.shape
    if expected.numel():
        assert float((actual - expected).abs().max()) <= tolerance * (1 + float(expected.abs().max()))


def assert_agree(problem, kernels=tuple(LOWERED), **options):
    """Cost, states and gains of the kernels at the minimum."""
    right = solve(problem, kernel="torch", **options)
    others = {kernel: solve(problem, kernel="lowered", compile=LOWERED[kernel], **options) for kernel in kernels}
    for kernel, found in {"torch": right, **others}.items():
        assert_converged(found)
        statuses = found.status if isinstance(found.status, list) else [found.status]
        assert all(status.endswith(f"({kernel} kernel)") for status in statuses)
        near(found.cost, right.cost, 1e-12)
        near(found.states, right.states, 1e-9)
        near(found.controls, right.controls, 1e-8)
        near(found.parameters, right.parameters, 1e-8)
        near(found.gains.K, right.gains.K, 1e-6)
        near(found.costates, right.costates, 1e-7)
        assert bool(((found.iterations - right.iterations).abs() <= 1).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_problems_of_the_library(name):
    assert_agree(problems.control(name).build(), steps=40 if "cartpole" in name else 25, tolerance=1e-10)


def test_the_car_a_few_steps_on():
    """From the same start both take the same steps; the whole way, 136 of them, is left to the benchmarks."""
    problem = problems.control("car_parking_tassa").build(steps=50)
    torch_, lowered = (solve(problem, max_iterations=4, kernel=kernel) for kernel in ("torch", "lowered"))
    near(lowered.cost, torch_.cost, 1e-9)
    near(lowered.states, torch_.states, 1e-6)


@settings(max_examples=7)
@given(seed=st.integers(0, 1000), n=st.integers(1, 4), m=st.integers(1, 2), q=st.integers(0, 2))
def test_linear_quadratic_problems(seed, n, m, q):
    assert_agree(random_affine_quadratic(seed, 8, n, m, q).staged(), ("lowered",))


@pytest.mark.parametrize(("n", "m", "q"), [(1, 2, 1), (4, 1, 2), (3, 2, 0)])
def test_linear_quadratic_problems_compiled(n, m, q):
    """Few: the compiler works on each for a second."""
    assert_agree(random_affine_quadratic(0, 8, n, m, q).staged())


@pytest.mark.parametrize("shape", [(3,), (2, 2)])
def test_batches(shape):
    starts = torch.tensor([2.0, 0.0]).double() + 0.3 * torch.randn(*shape, 2, dtype=torch.float64)
    assert_agree(swing(starts, control_bounds=(-1.0, 1.0)), steps=12, tolerance=1e-10)


def test_a_free_end_and_parameters_within_bounds():
    problem = free_end(parameter_bounds=(0.1, 1.0))
    assert_agree(problem, steps=10, tolerance=1e-10)
    states = torch.linspace(1.5, 0.0, 11)[:, None]
    assert_agree(
        problem, steps=10, initial_guess={"states": states, "horizon": 0.8, "parameters": [0.3]}, tolerance=1e-10
    )


@pytest.mark.parametrize("name", ["torch", "lowered"])
def test_other_controls_along_the_same_states_are_another_path(name):
    problem = transcribe(swing(), 6)
    guess = read_guess(problem, None)
    states = torch.linspace(0.0, 1.0, 7, dtype=torch.float64)[:, None] * torch.ones(2, dtype=torch.float64)

    def make():
        return TorchKernel(Widened(problem)) if name == "torch" else LoweredKernel(problem, guess)

    kernel, mu = make(), torch.zeros(()).double()
    for u in (0.0, 0.7):
        controls = torch.full((6, 1), u, dtype=torch.float64)
        path = kernel.evaluate(states, controls)
        found, right = (each.direction(path, mu, exact=False) for each in (kernel, make()))
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("operation", arrays._CALLS)
def test_numpy_calls_mean_what_casadi_means(operation):
    call = arrays._CALLS[operation]
    count = call.nin if isinstance(call, np.ufunc) else len(inspect.signature(call).parameters) - 1
    symbols = [casadi.SX.sym(name) for name in "xy"[:count]]
    made = (casadi.SX.unary, casadi.SX.binary)[count - 1](operation, *symbols)
    function = casadi.Function("one", symbols, [made])
    values = np.array([-5.0, -2.3, -0.7, 0.0, 0.4, 1.0, 2.5, 3.0])
    points = [grid.reshape(1, -1, 1) for grid in np.meshgrid(*[values] * count)]
    _, (found,) = arrays.Arrays(Fold("one", function, 0, (0,)), 1)([], points)
    right = [float(function(*point)) for point in np.concatenate(points, -1)[0]]
    # CasADi computes the inverse error function in single precision.
    np.testing.assert_allclose(found[0, :, 0], right, rtol=1e-4 if operation == casadi.OP_ERFINV else 1e-13)


class TestWhichKernel:
    def test_auto_takes_what_the_problem_allows(self, tmp_path, monkeypatch):
        monkeypatch.setattr(compiled, "_folder", lambda: tmp_path)  # where no other test has compiled this problem
        assert solve(swing(), steps=5).status.endswith("(lowered kernel)")
        data = torch.tensor([[1.0], [2.0]]).double()
        own = pushed(lambda t, x, u: ((x - data) ** 2 + u**2).sum(-1), initial_state=torch.zeros(2, 1))
        assert solve(own, steps=5).status[0].endswith("(torch kernel)")
        with pytest.raises(
            ProblemError, match="kernel='lowered' got a problem that it cannot take: its functions tell the"
        ):
            solve(own, steps=5, kernel="lowered")

    def test_an_operation_without_a_form_for_batches(self, monkeypatch):
        stage = Stage(lambda k, x, u: torch.sin(x) + u, lambda k, x, u: (x**2 + u**2).sum(-1), 1)
        problem = StagedOCP(stage, initial_state=torch.ones(3, 1), steps=2)
        monkeypatch.setattr(lowered_kernel, "_FEW", 2)
        monkeypatch.delitem(arrays._CALLS, casadi.OP_SIN)
        assert solve(problem).status[0].endswith("(torch kernel)")
        with pytest.raises(ProblemError, match="kernel='lowered' has no numpy form .* use kernel='torch'"):
            solve(problem, kernel="lowered")

    def test_no_controls_beside_a_matrix(self):
        B = torch.zeros(2, 0).double()
        stage = Stage(lambda k, x, u: 0.5 * x + (B @ u[..., None])[..., 0], lambda k, x, u: (x**2).sum(-1))
        problem = StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0, 1.0], steps=3)
        assert float(solve(problem, kernel="lowered").cost) == 2.65625

    def test_an_unknown_one(self):
        # past the type checks that run with the tests
        made = object.__new__(DDP)
        for field in fields(DDP):
            object.__setattr__(made, field.name, field.default)
        object.__setattr__(made, "kernel", "lowerd")
        with pytest.raises(
            ProblemError, match="kernel is 'lowerd'; expected 'auto' or 'torch' or 'lowered'; did you mean"
        ):
            made.__post_init__()


class TestWindow:
    """More problems than are worked on at a time."""

    @pytest.mark.parametrize("kernel", ["torch", *LOWERED])
    def test_every_problem_comes_back_in_its_place(self, monkeypatch, kernel):
        starts = torch.stack([torch.linspace(-2.0, 2.0, 13), torch.linspace(1.0, -1.0, 13)], dim=-1).double()
        options = {"kernel": "torch"} if kernel == "torch" else {"kernel": "lowered", "compile": LOWERED[kernel]}
        whole = solve(swing(starts), steps=8, **options)
        monkeypatch.setattr(TorchKernel if kernel == "torch" else LoweredKernel, "window", 4)
        by_parts = solve(swing(starts), steps=8, **options)
        assert_converged(by_parts)
        near(by_parts.states, whole.states, 1e-9)
        near(by_parts.gains.K, whole.gains.K, 1e-7)
        near(by_parts.costates, whole.costates, 1e-7)
        assert by_parts.status == whole.status
        assert by_parts.iterations.tolist() == whole.iterations.tolist()
        for name in ("cost", "step", "regularisation"):
            assert by_parts.history[name].shape == whole.history[name].shape
            near(by_parts.history[name], whole.history[name], 1e-9)

    def test_a_problem_that_cannot_begin_harms_no_other(self, monkeypatch):
        monkeypatch.setattr(TorchKernel, "window", 2)
        problem = OCP(
            lambda t, x, u: x**3 + u,
            lambda t, x, u: (x**2 + u**2).sum(-1),
            initial_state=torch.tensor([[0.1], [40.0], [0.2], [0.3]]).double(),
            control_dim=1,
            horizon=1.0,
        )
        solution = solve(problem, steps=8, kernel="torch")
        assert solution.converged.tolist() == [True, False, True, True]
        assert solution.status[1].startswith("given up: the first path is not finite")


class TestEnds:
    def test_a_cost_without_a_lower_bound(self):
        problem = pushed(lambda t, x, u: -(x**4).sum(-1) + 1e-3 * (u**2).sum(-1))
        solution = solve(problem, steps=5, kernel="torch", initial_guess=torch.ones(5, 1))
        assert not bool(solution.converged)
        assert "the cost falls without bound; bound the controls" in solution.status

    @pytest.mark.filterwarnings("ignore:.*derivative")
    def test_a_derivative_that_is_not_finite(self):
        problem = pushed(lambda t, x, u: (u**2).sum(-1) + (x[..., 0] - 1).abs().sqrt())
        solution = solve(problem, steps=4, kernel="torch", initial_guess=torch.zeros(4, 1))
        assert not bool(solution.converged)
        assert "a derivative is NaN or infinite; the last such is at step 3; look for a square root" in solution.status


class Rounded(torch.autograd.Function):
    """Rounds, and passes gradients as if it did not."""

    @staticmethod
    def forward(ctx, x):
        return torch.floor(x + 0.5)

    @staticmethod
    def backward(ctx, g):
        return g


class TestWhatLoweringMustNotChange:
    def problem(self, miss, start=1.0):
        return pushed(lambda t, x, u: 0.05 * (u**2).sum(-1), lambda t, x: miss(x[..., 0]), [start])

    @pytest.mark.filterwarnings("ignore:.* hides part of itself from derivatives")
    @pytest.mark.parametrize(
        "miss", [lambda x: (Rounded.apply(x) - 3) ** 2, lambda x: (x - 3) ** 2 * (x.detach() ** 2 + 1)]
    )
    def test_derivatives_of_the_users_own(self, miss):
        problem = self.problem(miss, start=0.1)
        assert solve(problem, steps=4).status.endswith("(torch kernel)")
        with pytest.raises(ProblemError, match="derivatives are not torch's: a part is detached, or has a backward"):
            solve(problem, steps=4, kernel="lowered")

    @pytest.mark.parametrize(
        "wall",
        [
            lambda x: torch.relu(torch.sqrt(x)),
            lambda x: torch.clamp(torch.log(x), min=-10),
            lambda x: torch.maximum(torch.sqrt(x), torch.zeros_like(x)),
            lambda x: torch.stack([torch.sqrt(x), 0 * x], dim=-1).amax(-1),
        ],
    )
    def test_a_nan_stays_one(self, wall):
        """Beyond x = 0 the cost is NaN: no step may end there."""
        for kernel in ("torch", "lowered"):
            solution = solve(self.problem(lambda x: (x + 1) ** 2 + wall(x)), steps=8, kernel=kernel)
            assert bool(torch.isfinite(solution.problem.terminal(solution.states[-1], solution.parameters)))
            assert float(solution.states[-1, 0]) >= 0.0

    def test_the_tail_of_a_sigmoid(self):
        problem = self.problem(lambda x: 10 * (x + 35) ** 2 - torch.log(torch.sigmoid(x)), start=0.0)
        torch_, lowered = (solve(problem, steps=8, kernel=kernel) for kernel in ("torch", "lowered"))
        near(lowered.cost, torch_.cost, 1e-10)


class TestGradientModes:
    def problem(self):
        return pushed(lambda t, x, u: (u**2).sum(-1), lambda t, x: ((x - 2) ** 2).sum(-1))

    @pytest.mark.parametrize("kernel", ["torch", "lowered"])
    def test_without_gradients_around_it(self, kernel):
        right = solve(self.problem(), steps=5)
        with torch.no_grad():
            near(solve(self.problem(), steps=5, kernel=kernel).cost, right.cost, 1e-12)

    def test_inference_mode_is_refused(self):
        problem = self.problem()
        guess = read_guess(transcribe(problem, 5), torch.ones(5, 1).double())
        with torch.inference_mode():
            with pytest.raises(ProblemError, match="inference_mode.* is on, where nothing has a derivative"):
                solve(problem, steps=5)
            with pytest.raises(ProblemError, match="inference_mode.* is on, where nothing has a derivative"):
                self.problem()
            with pytest.raises(ProblemError, match="inference_mode.* is on, where nothing has a derivative"):
                DDP().solve(transcribe(problem, 5), guess)


@pytest.mark.parametrize("kernel", ["torch", "lowered"])
def test_the_regularised_sweep_minimises_the_cost_of_moving_too(kernel):
    """Levenberg and Marquardt: the model plus mu/2 |x_k - xbar_k|^2 and mu/2 |u_k - ubar_k|^2 on every step."""
    generator, steps, mu = torch.Generator().manual_seed(3), 4, 0.7
    A, B, W = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((3, 3), (3, 2), (5, 5)))
    weight = W @ W.mT

    def cost(k, x, u):
        w = torch.cat([x - 1, u], dim=-1)
        return ((w @ weight) * w).sum(-1)

    stage = Stage(lambda k, x, u: x @ A.mT + u @ B.mT, cost, control_dim=2)
    start = [1.0, -2.0, 0.5]
    problem = StagedOCP(stage, lambda x: x.square().sum(-1), initial_state=start, steps=steps)
    ubar = torch.randn(steps, 2, generator=generator, dtype=torch.float64)

    def total(u, around=None):
        x, value = [problem.initial_state], u.new_zeros(())
        for k in range(steps):
            if around is not None:
                value = value + 0.5 * mu * ((x[k] - around[k]).square().sum() + (u[k] - ubar[k]).square().sum())
            value = value + cost(k, x[k], u[k])
            x.append(x[k] @ A.mT + u[k] @ B.mT)
        return value + x[-1].square().sum(), torch.stack(x)

    around = total(ubar)[1]
    gradient, hessian = (
        derivative(lambda u: total(u.reshape(steps, 2), around)[0], ubar.reshape(-1))
        for derivative in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
    )
    wanted = ubar - torch.linalg.solve(hessian, gradient).reshape(steps, 2)
    guess = read_guess(problem, {"controls": ubar})
    runs = TorchKernel(Widened(problem)) if kernel == "torch" else LoweredKernel(problem, guess, compile=False)
    path = runs.evaluate(around, ubar)
    direction = runs.direction(path, np.float64(mu), exact=True)
    moved = runs.roll_out(path, direction, torch.ones(1, dtype=torch.float64)).controls[:, 0]
    torch.testing.assert_close(moved, wanted, rtol=1e-10, atol=1e-10)
