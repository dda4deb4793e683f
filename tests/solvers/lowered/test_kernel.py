"""The lowered kernel against the sweep and the rollout in torch, path by path, on one problem and on batches."""

import itertools
import math

import casadi
import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.differential.sweep import Direction
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.paths import Path, Widened, evaluate, walk
from ocnopt.solvers.lowered import arrays, kernel
from ocnopt.solvers.lowered.kernel import LoweredKernel
from ocnopt.solvers.lowered.limits import fits
from ocnopt.solvers.lowered.steps import minimise_box
from ocnopt.solvers.search import TorchKernel
from ocnopt.solvers.solution import Guess
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.lq import random_affine_quadratic
from tests.solvers.cases import swing
from tests.solvers.test_ddp_random import random_problem

STEPS = 8


def torch_direction(problem: StagedOCP, path: Path, mu: torch.Tensor, exact: bool) -> Direction:
    """The same direction by the torch kernel; a non-convex exact model at an open path is left as it is."""
    return TorchKernel(Widened(problem)).direction(path, mu, exact=exact)


def torch_roll_out(problem: StagedOCP, path: Path, direction: Direction, alphas: torch.Tensor) -> Path:
    """The same paths by the torch kernel."""
    return TorchKernel(Widened(problem)).roll_out(path, direction, alphas)


def assert_near(actual, expected, tolerance=1e-10):
    """Equal up to the tolerance, relative to the largest entry."""
    assert actual.shape == expected.shape
    if expected.numel():
        error = float((actual.double() - expected.double()).abs().max())
        assert error <= tolerance * (1 + float(expected.double().abs().max()))


def some_guess(problem: StagedOCP, spread: float = 0.3, row: int = 0) -> Guess:
    """Seeded controls and parameters within their bounds."""
    generator = torch.Generator().manual_seed(row)
    m, bounds = problem.groups[0].stage.control_dim, problem.control_bounds[0]
    noise = spread * torch.randn(problem.steps, *problem.batch_shape, m, generator=generator).double()
    controls = noise if bounds is None else noise.clamp(*bounds)
    return Guess(list(controls), problem.start_parameters())


def some_path(problem: StagedOCP, guess: Guess, *, infeasible: bool) -> Path:
    """The guess rolled out, or states beside every path."""
    wide = Widened(problem)
    first = torch.cat([problem.initial_state, guess.parameters], dim=-1)
    path = walk(wide, lambda k, x: guess.controls[k], first)
    if not infeasible:
        return path
    n = problem.state_dim
    generator = torch.Generator().manual_seed(5)
    states = path.states.clone()
    states[1:, ..., :n] += 0.1 * torch.randn(states[1:, ..., :n].shape, generator=generator).double()
    return evaluate(wide, states, path.controls)


def assert_agree(problem: StagedOCP, *, mus=(0.0, 2.0), seed: int = 0, tolerance: float = 1e-10) -> Direction:
    """Evaluate, direction and roll_out of both, on a path and beside every path, exact and Gauss-Newton."""
    guess = some_guess(problem, row=seed)
    kernel = LoweredKernel(problem, guess)
    for infeasible, exact, mu in itertools.product((True, False), (False, True), mus):
        path = some_path(problem, guess, infeasible=infeasible)
        assert_evaluated(kernel, path, tolerance)
        direction = assert_direction(problem, kernel, path, mu, exact, tolerance)
        assert_rolled_out(problem, kernel, path, direction, tolerance)
    return direction


def assert_evaluated(kernel: LoweredKernel, path: Path, tolerance: float) -> None:
    evaluated = kernel.evaluate(path.states, path.controls)
    assert_near(evaluated.cost, path.cost, tolerance)
    assert_near(evaluated.gaps, torch.zeros_like(evaluated.gaps) if path.gaps is None else path.gaps, tolerance)


def assert_direction(
    problem: StagedOCP, kernel: LoweredKernel, path: Path, mu: float, exact: bool, tolerance: float
) -> Direction:
    mus = torch.full(problem.batch_shape, mu, dtype=torch.float64)
    ours, right = kernel.direction(path, mus, exact=exact), torch_direction(problem, path, mus, exact)
    assert torch.equal(ours.solvable, right.solvable)
    for name, actual, expected in zip(Direction._fields, ours, right, strict=True):
        # what stands in a direction that is not solvable means nothing
        keep = [slice(None)] * (name in ("k", "K", "costates")) + [right.solvable]
        assert_near(actual[tuple(keep)], expected[tuple(keep)], tolerance)
    return right


def assert_rolled_out(
    problem: StagedOCP, kernel: LoweredKernel, path: Path, direction: Direction, tolerance: float
) -> None:
    # gains that keep every path where the numbers are small
    k, K = (part.nan_to_num().clamp(-1, 1) for part in direction[:2])
    small = direction._replace(k=k, K=K, dp=torch.full_like(direction.dp, 0.1))
    alphas = torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)
    mine, theirs = kernel.roll_out(path, small, alphas), torch_roll_out(problem, path, small, alphas)
    for actual, expected in zip(mine, theirs, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, tolerance)


def free_end(x=(1.0, 0.0)):
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) * (1 + 0.1 * t) + u[..., 0]], dim=-1),
        lambda t, x, u: 0.1 * (u**2).sum(-1) + (x**2).sum(-1),
        lambda t, x: 5 * (x**2).sum(-1) + 0.3 * t,
        initial_state=x,
        control_dim=1,
        horizon=FreeHorizon(1.0, 0.2, 3.0),
    )


def learned_mass(x=(1.0, 0.0)):
    return OCP(
        lambda t, x, u, p: torch.stack([x[..., 1], p[..., 0] * torch.sin(x[..., 0]) + p[..., 1] * u[..., 0]], dim=-1),
        lambda t, x, u, p: (u**2).sum(-1) + (x**2).sum(-1) + (p**2).sum(-1),
        lambda t, x, p: 5 * (x**2).sum(-1),
        initial_state=x,
        control_dim=1,
        horizon=1.0,
        parameters=torch.tensor([1.0, 0.5]),
        parameter_bounds=(-2.0, 2.0),
    )


CASES = {
    "pendulum": lambda: transcribe(problems.get("pendulum_swing_up").build(), STEPS),
    "pendulum with bounds": lambda: transcribe(problems.get("pendulum_swing_up_u5").build(torque_limit=0.3), STEPS),
    "car": lambda: problems.get("car_parking_tassa").build(steps=STEPS),
    "cartpole": lambda: transcribe(problems.get("cartpole_swing_up_soft").build(horizon=0.5), STEPS),
    "free end": lambda: transcribe(free_end(), STEPS),
    "parameters": lambda: transcribe(learned_mass(), STEPS, "midpoint"),
    "one-sided bound": lambda: transcribe(swing(control_bounds=(-float("inf"), 0.1)), STEPS),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name):
    assert_agree(CASES[name]())


@settings(max_examples=4, phases=[Phase.generate])
@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), m=st.integers(1, 4), q=st.integers(0, 2))
def test_agrees_on_affine_quadratic_problems(seed, n, m, q):
    problem = random_affine_quadratic(seed, 4, n, m, q).staged()
    assert bool(assert_agree(problem, mus=(0.0,), seed=seed).solvable)


@pytest.mark.parametrize("seed", [0, 2, 13, 35])
def test_agrees_on_random_problems(seed):
    """Static controls, free ends and active bounds on one or two controls, mostly not convex."""
    assert_agree(transcribe(random_problem(seed), STEPS, "midpoint"), mus=(0.0, 10.0), seed=seed)


def many_controls(x=(1.0, -0.5), m=4, steps=3, **options):
    """Controls that push against each other."""
    push = torch.randn(m, 2, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    return transcribe(
        OCP(
            lambda t, x, u: torch.sin(x) + (u[..., :, None] * push).sum(-2),
            lambda t, x, u: (x**2).sum(-1) + 0.1 * (u**2).sum(-1) + u.sum(-1) ** 2,
            initial_state=x,
            control_dim=m,
            horizon=1.0,
            **options,
        ),
        steps,
    )


def varying(m, steps=3):
    """Bounds of each step: some of them alike, one infinite."""
    lower, upper = (torch.linspace(a, b, steps * m).double().reshape(steps, m) for a, b in ((-0.2, -0.6), (0.5, 0.1)))
    lower[0, 0], upper[:, -1] = -torch.inf, 0.2
    return lower, upper


class TestBoxes:
    @pytest.mark.parametrize("m", [3, 4])
    def test_three_controls_or_more(self, m):
        assert_agree(many_controls(m=m, control_bounds=(-0.3, 0.2)))

    @pytest.mark.parametrize("m", [1, 2, 3])
    def test_bounds_that_vary_from_step_to_step(self, m):
        problem = many_controls(m=m, control_bounds=varying(m))
        assert fits(problem) is None
        assert_agree(problem)

    def test_bounds_that_vary_in_a_batch(self):
        problem = many_controls(torch.randn(3, 2).double(), m=2, control_bounds=(-0.3, 0.2))
        guess, (lower, upper) = some_guess(problem), varying(2)
        problem = many_controls(problem.initial_state, m=2, control_bounds=(lower[None], upper[None]))
        found, right = (
            each.direction(some_path(problem, guess, infeasible=True), torch.zeros(3).double(), exact=False)
            for each in (LoweredKernel(problem, guess), TorchKernel(Widened(problem)))
        )
        assert_near(found.K, right.K)

    @pytest.mark.parametrize("m", [3, 5])
    def test_the_minimum_is_that_of_all_active_sets(self, m):
        """Against the best of all 3^m faces that lies in the box."""
        random = np.random.default_rng(m)
        for _ in range(10):
            A = random.normal(size=(m, m))
            H, g, lower, upper = A @ A.T + 0.01 * np.eye(m), random.normal(size=m), -random.random(m), random.random(m)
            best = np.inf
            for face in itertools.product((-1, 0, 1), repeat=m):
                free, k = np.equal(face, 0), np.where(np.less(face, 0), lower, upper)
                k[free] = np.linalg.solve(H[np.ix_(free, free)], -(g + H[:, ~free] @ k[~free])[free])
                if ((k >= lower - 1e-12) & (k <= upper + 1e-12)).all():
                    best = min(best, g @ k + 0.5 * k @ H @ k)
            K, fine = minimise_box(
                *(casadi.SX(casadi.DM(v)) for v in (H, g)), (casadi.SX(casadi.DM(lower)), casadi.SX(casadi.DM(upper)))
            )
            k = casadi.evalf(K).full()[:, 0]
            assert float(casadi.evalf(fine)) == 1.0
            assert ((k >= lower) & (k <= upper)).all()
            assert g @ k + 0.5 * k @ H @ k <= best + 1e-10


BATCHES = {
    "pendulum": lambda x: transcribe(problems.get("pendulum_swing_up").build(initial_state=x), STEPS),
    "car": lambda x: problems.get("car_parking_tassa").build(initial_state=torch.cat([x, x], dim=-1), steps=STEPS),
    "free end": lambda x: transcribe(free_end(x), STEPS),
    "parameters": lambda x: transcribe(learned_mass(x), STEPS),
}


class TestBatch:
    @pytest.mark.parametrize("few", [0, 100])
    @pytest.mark.parametrize("name", BATCHES)
    def test_agrees_with_torch_on_arrays_and_one_by_one(self, name, few, monkeypatch):
        monkeypatch.setattr(kernel, "_FEW", few)
        assert_agree(BATCHES[name](torch.randn(2, 3, 2, dtype=torch.float64)))

    def test_chunks_are_the_whole(self, monkeypatch):
        """Lanes that do not fill the last chunk, and a batch of another size than the problem's own."""
        problem = BATCHES["pendulum"](torch.randn(7, 2, dtype=torch.float64))
        guess = some_guess(problem)
        ours, path = LoweredKernel(problem, guess), some_path(problem, guess, infeasible=True)
        wide = Path(*(part.repeat_interleave(30, dim=axis) for part, axis in zip(path[:4], (1, 1, 0, 1), strict=True)))
        mu = torch.rand(210, dtype=torch.float64)
        monkeypatch.setattr(kernel, "_FEW", 0)
        monkeypatch.setattr(arrays, "_WIDE", 128)
        pieces = ours.direction(wide, mu, exact=True)
        monkeypatch.setattr(kernel, "_FEW", 1000)
        for actual, expected in zip(pieces, ours.direction(wide, mu, exact=True), strict=True):
            assert_near(actual, expected, 1e-13)

    def test_one_problem_of_a_batch_that_is_not_finite_harms_no_other(self, monkeypatch):
        problem = BATCHES["pendulum"](torch.randn(3, 2, dtype=torch.float64))
        guess = some_guess(problem)
        ours, path = LoweredKernel(problem, guess), some_path(problem, guess, infeasible=False)
        mu = torch.ones(3, dtype=torch.float64)
        monkeypatch.setattr(kernel, "_FEW", 0)
        before = ours.direction(path, mu, exact=True)
        path.states[2:, 1] = math.nan
        after = ours.direction(path, mu, exact=True)
        assert not bool(after.solvable[1])
        assert torch.equal(after.K[:, [0, 2]], before.K[:, [0, 2]])
        assert torch.equal(after.solvable[[0, 2]], before.solvable[[0, 2]])


class TestWhatItCannotTake:
    def test_a_sequence_of_stages(self):
        stage = Stage(lambda k, x, u: x + u, control_dim=1)
        problem = StagedOCP([stage, stage], initial_state=[1.0])
        assert "a sequence of stages" in fits(problem)
        with pytest.raises(ProblemError, match=r"sequence of stages, not one stage.*use kernel='auto' or 'torch'"):
            LoweredKernel(problem, some_guess(problem))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"initial_state": torch.zeros(20)}, "20 states, controls and parameters, more than 16"),
            ({"initial_state": torch.zeros(3).float(), "dtype": torch.float32}, "torch.float32 on cpu, not"),
            ({"initial_state": torch.zeros(3), "control_bounds": (-1.0, 1.0)}, "bounds on 7 controls, more than 6"),
        ],
    )
    def test_sizes(self, options, reason):
        m = 7 if "control_bounds" in options else 0
        problem = StagedOCP(Stage(lambda k, x, u: 0.5 * x, control_dim=m), steps=2, **options)
        assert reason in fits(problem)

    def test_fits_says_nothing_about_a_small_problem(self):
        assert fits(CASES["car"]()) is None

    def test_captured_data_of_each_problem(self):
        target = torch.tensor([1.0, 2.0], dtype=torch.float64)
        problem = transcribe(
            OCP(
                lambda t, x, u: u,
                lambda t, x, u: (x[..., 0] - target) ** 2 + u[..., 0] ** 2,
                initial_state=torch.zeros(2, 1),
                control_dim=1,
                horizon=1.0,
            ),
            3,
        )
        with pytest.raises(ProblemError, match="tell the problems of the batch apart: they hold data of each"):
            LoweredKernel(problem, some_guess(problem))

    def test_a_function_that_tells_a_batch_from_one_problem(self):
        shift = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        dynamics = lambda t, x, u: u + (shift if x.ndim > 1 else 0.0)  # noqa: E731
        problem = transcribe(OCP(dynamics, initial_state=torch.zeros(2, 1), control_dim=1, horizon=1.0), 3)
        with pytest.raises(ProblemError, match="tell the problems of the batch apart"):
            LoweredKernel(problem, some_guess(problem))

    def test_the_first_problem_of_a_batch_is_lowered_as_a_batch(self):
        dynamics = lambda k, x, u: x * (3.0 if x.ndim > 1 else 2.0)  # noqa: E731
        problem = StagedOCP(Stage(dynamics, control_dim=1), initial_state=torch.ones(2, 1), steps=1)
        kernel = LoweredKernel(problem, some_guess(problem))
        path = kernel.evaluate(torch.ones(2, 2, 1).double(), torch.zeros(1, 2, 1).double())
        assert path.gaps.tolist() == [[[2.0], [2.0]]]

    def test_an_operator_without_a_rule_names_the_other_kernel(self):
        stage = Stage(lambda k, x, u: torch.erfc(x), control_dim=0)
        problem = StagedOCP(stage, initial_state=torch.zeros(2), steps=2)
        with pytest.raises(ProblemError, match=r"uses erfc.*\(kernel='torch' takes any torch code\)"):
            LoweredKernel(problem, some_guess(problem))

    def test_a_wide_network(self):
        W = torch.randn(40, 2, dtype=torch.float64)
        stage = Stage(lambda k, x, u: x + torch.tanh(x @ W.mT) @ W, control_dim=0)
        problem = StagedOCP(stage, initial_state=torch.zeros(2), steps=2)
        with pytest.raises(ProblemError, match="its step has wide matrix products"):
            LoweredKernel(problem, some_guess(problem))

    def test_too_many_operations(self):
        table = torch.randn(3000, 2, dtype=torch.float64)
        stage = Stage(lambda k, x, u: x + table[k], control_dim=0)
        problem = StagedOCP(stage, initial_state=torch.zeros(2), steps=3000)
        with pytest.raises(ProblemError, match=r"its step takes \d+ operations, more than 2500"):
            LoweredKernel(problem, some_guess(problem))
