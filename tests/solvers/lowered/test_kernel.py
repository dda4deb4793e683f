"""The lowered kernel against the sweep and the rollout in torch, path by path, on one problem and on batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers import ddp
from ocnopt.solvers.lowered.kernel import Direction, LoweredKernel, Path
from ocnopt.solvers.solution import Guess
from ocnopt.staged import StagedOCP, rollout, static_as_state, transcribe
from tests.oracles.lq import random_affine_quadratic
from tests.solvers.cases import swing
from tests.solvers.test_ddp_random import random_problem

STEPS = 8


def torch_direction(problem: StagedOCP, path: Path, mu: torch.Tensor, exact: bool) -> Direction:
    """The same direction by the torch code; a non-convex exact model at an open path is left as it is."""
    gaps = None if path.gaps is None else list(path.gaps)
    iterate = ddp.Iterate(list(path.states), list(path.controls), path.cost, gaps, torch.zeros_like(path.cost))
    wide = static_as_state(problem)
    models = ddp.expand_path(wide, iterate.states, iterate.controls, second_order=exact)
    direction = ddp.find_direction(problem, iterate, models, ddp.expand_terminal(wide, iterate.states[-1]), mu)
    return Direction(*(torch.stack(part) for part in direction[:3]), *direction[3:])


def torch_roll_out(problem: StagedOCP, path: Path, direction: Direction, alphas: torch.Tensor) -> Path:
    """The same paths by the torch code."""
    gaps = None if path.gaps is None else list(path.gaps)
    iterate = ddp.Iterate(list(path.states), list(path.controls), path.cost, gaps, torch.zeros_like(path.cost))
    lists = ddp.Direction(*(list(part) for part in direction[:3]), *direction[3:])
    trial, _ = ddp._try(static_as_state(problem), iterate, lists, alphas)
    left = None if trial.gaps is None else torch.stack(trial.gaps)
    return Path(torch.stack(trial.states), torch.stack(trial.controls), trial.cost, left)


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
    wide = static_as_state(problem)
    first = torch.cat([problem.initial_state, guess.parameters], dim=-1)
    path = rollout(wide, guess.controls, first)
    states, controls = torch.stack(path.states), torch.stack(guess.controls)
    if not infeasible:
        return Path(states, controls, path.cost, None)
    n = problem.state_dim
    generator = torch.Generator().manual_seed(5)
    states[1:, ..., :n] += 0.1 * torch.randn(states[1:, ..., :n].shape, generator=generator).double()
    gaps, cost = ddp.shoot(wide, list(states), guess.controls, wide.start_parameters())
    return Path(states, controls, cost, torch.stack(gaps))


def assert_agree(problem: StagedOCP, *, infeasible: bool, mu: float, exact: bool, seed: int = 0, tolerance=1e-10):
    """Evaluate, direction and roll_out of both."""
    guess = some_guess(problem, row=seed)
    kernel, path = LoweredKernel(problem, guess), some_path(problem, guess, infeasible=infeasible)
    evaluated = kernel.evaluate(path.states, path.controls)
    assert_near(evaluated.cost, path.cost)
    assert_near(evaluated.gaps, torch.zeros_like(evaluated.gaps) if path.gaps is None else path.gaps)
    mus = torch.full(problem.batch_shape, mu, dtype=torch.float64)
    ours, right = kernel.direction(path, mus, exact=exact), torch_direction(problem, path, mus, exact)
    assert torch.equal(ours.solvable, right.solvable)
    for name, actual, expected in zip(Direction._fields, ours, right, strict=True):
        # what stands in a direction that is not solvable means nothing
        axis = {"k": 1, "K": 1, "costates": 1}.get(name, 0)
        keep = [slice(None)] * axis + [right.solvable]
        assert_near(actual[tuple(keep)], expected[tuple(keep)], tolerance)
    # a damped step stays where the numbers are small
    small = right._replace(
        k=right.k.nan_to_num().clamp(-1, 1), K=right.K.nan_to_num().clamp(-1, 1), dp=0.1 * torch.ones_like(right.dp)
    )
    alphas = torch.tensor([1.0, 0.5, 0.01], dtype=torch.float64)
    mine, theirs = kernel.roll_out(path, small, alphas), torch_roll_out(problem, path, small, alphas)
    for actual, expected in zip(mine, theirs, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert_near(actual, expected, tolerance)
    return ours


def free_end(batch=()):
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], torch.sin(x[..., 0]) * (1 + 0.1 * t) + u[..., 0]], dim=-1),
        lambda t, x, u: 0.1 * (u**2).sum(-1) + (x**2).sum(-1),
        lambda t, x: 5 * (x**2).sum(-1) + 0.3 * t,
        initial_state=torch.tensor([1.0, 0.0]).expand(*batch, 2),
        control_dim=1,
        horizon=FreeHorizon(1.0, 0.2, 3.0),
    )


def learned_mass(batch=()):
    return OCP(
        lambda t, x, u, p: torch.stack([x[..., 1], p[..., 0] * torch.sin(x[..., 0]) + p[..., 1] * u[..., 0]], dim=-1),
        lambda t, x, u, p: (u**2).sum(-1) + (x**2).sum(-1) + (p**2).sum(-1),
        lambda t, x, p: 5 * (x**2).sum(-1),
        initial_state=torch.tensor([1.0, 0.0]).expand(*batch, 2),
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


@pytest.mark.parametrize("infeasible", [False, True])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mu", [0.0, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name, mu, exact, infeasible):
    assert_agree(CASES[name](), infeasible=infeasible, mu=mu, exact=exact)


@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 4), m=st.integers(1, 4), q=st.integers(0, 2), open_=st.booleans())
def test_agrees_on_affine_quadratic_problems(seed, n, m, q, open_):
    problem = random_affine_quadratic(seed, 5, n, m, q).staged()
    assert bool(assert_agree(problem, infeasible=open_, mu=0.0, exact=True, seed=seed).solvable)


@pytest.mark.parametrize("seed", range(12))
def test_agrees_on_random_problems(seed):
    """Static controls, free ends and active bounds on one or two controls, mostly not convex."""
    problem = transcribe(random_problem(seed), STEPS, "midpoint")
    for mu in (0.0, 1.0, 30.0):
        assert_agree(problem, infeasible=seed % 2 == 0, mu=mu, exact=seed % 3 > 0, seed=seed)
