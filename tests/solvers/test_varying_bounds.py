"""Bounds on the controls that vary from step to step: every solver keeps them, and those that know them show them."""

import math

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.ddp import DDP
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.solvers.cases import swing

F64 = torch.float64
STEPS = 12
UPPER = torch.linspace(0.2, 1.3, STEPS, dtype=F64)[:, None]
LOWER = -1.2 - 2.0 * torch.sin(torch.arange(STEPS, dtype=F64))[:, None].abs()


def test_the_solvers_agree():
    problem = swing(control_bounds=(LOWER, UPPER))
    reference = solve(problem, "casadi", steps=STEPS)
    solution = solve(problem, steps=STEPS)
    assert bool(solution.converged), solution.status
    torch.testing.assert_close(solution.cost, reference.cost, rtol=1e-7, atol=0)
    torch.testing.assert_close(solution.controls, reference.controls, rtol=0, atol=1e-5)
    assert float(solution.constraint_violation) == 0.0
    at_bound = (solution.controls <= LOWER) | (solution.controls >= UPPER)
    assert 2 < int(at_bound.sum()) < STEPS


def test_a_function_of_time_is_asked_where_each_step_begins():
    problem = swing(control_bounds=lambda t: (-1.0, 0.2 + t / 2))
    begins = torch.arange(STEPS, dtype=F64)[:, None] * 1.5 / STEPS
    given, table = solve(problem, steps=STEPS), solve(swing(control_bounds=(-1.0, 0.2 + begins / 2)), steps=STEPS)
    torch.testing.assert_close(given.controls, table.controls)
    torch.testing.assert_close(given.control_bounds[1], 0.2 + begins / 2)


def test_a_batch_policy_rollout_and_picture(tmp_path):
    problem = swing([[2.0, 0.0], [1.0, 0.5]], control_bounds=(LOWER, UPPER))
    solution = solve(problem, steps=STEPS)
    assert bool(solution.converged.all()), solution.status
    far = torch.full((2, 2), 50.0, dtype=F64)
    for k in (0, 5, STEPS - 1):
        u = solution.policy(solution.times[..., k], far)
        assert bool(((u == LOWER[k]) | (u == UPPER[k])).all())
    closed = solution.rollout(problem.initial_state + 0.3)
    assert float(closed.constraint_violation.max()) == 0.0
    solution.plot(tmp_path / "picture.png")


def test_rows_for_a_sequence_of_stages():
    stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), 1)
    bounds = ([[-1.0], [0.0]], [[0.25], [0.4]])
    for problem in (
        StagedOCP([stage, stage], lambda x: 9 * (x[..., 0] - 1) ** 2, initial_state=[0.0], control_bounds=bounds),
        StagedOCP(stage, lambda x: 9 * (x[..., 0] - 1) ** 2, initial_state=[0.0], steps=2, control_bounds=bounds),
    ):
        assert [tuple(upper.tolist()) for _, upper in problem.step_bounds] == [(0.25,), (0.4,)]
        for solver in ("ddp", "casadi"):
            solution = solve(problem, solver)
            torch.testing.assert_close(solution.controls[:, 0], torch.tensor([0.25, 0.4], dtype=F64), atol=1e-7, rtol=0)
            assert solution.control_bounds[0].shape == (2, 1)


def test_with_constraints():
    problem = swing(control_bounds=(-5 + 0 * UPPER, 2 * UPPER), terminal_constraint=lambda t, x: x[..., :1] - 1.6)
    solution, reference = solve(problem, steps=STEPS), solve(problem, "casadi", steps=STEPS)
    torch.testing.assert_close(solution.cost, reference.cost, rtol=1e-6, atol=0)
    multiplier = solution.multipliers["terminal_constraint"]
    torch.testing.assert_close(multiplier, reference.multipliers["terminal_constraint"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((LOWER[:5], UPPER[:5]), "control_bounds have 5 rows for 12 steps"),
        ((LOWER, UPPER[:5]), "control_bounds have 12 and 5 rows"),
        ((UPPER, LOWER), r"exceeds upper .* at entry \(0, 0\)"),
        (lambda t: (0.0, -1.0), r"control_bounds\(t = 0\): lower 0.0 exceeds upper -1.0"),
        (lambda t: None, r"control_bounds\(t = 0\) is \(\); expected a pair"),
        (lambda t: (-1.0, 1.0 if t < 1 else math.nan), "holds NaN"),
    ],
)
def test_bounds_that_do_not_fit(bounds, message):
    with pytest.raises(ProblemError, match=message):
        transcribe(swing(control_bounds=bounds), STEPS)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("indirect", {"state_bounds": (-9.0, 9.0)}, "the problem has state_bounds; .* does not find its multipliers"),
        ("indirect", {"control_bounds": (LOWER, UPPER)}, "control_bounds that vary in time"),
        ("shooting", {"state_bounds": (-9.0, 9.0)}, "the problem has state_bounds; solver 'shooting'"),
    ],
)
def test_solvers_that_cannot_say_so(solver, options, message):
    with pytest.raises(ProblemError, match=message):
        solve(swing(**options), solver, steps=STEPS)


def test_shooting_keeps_them():
    problem = swing(control_bounds=(LOWER, UPPER))
    torch.testing.assert_close(
        solve(problem, "shooting", steps=STEPS).cost, solve(problem, "casadi", steps=STEPS).cost, rtol=1e-6, atol=0
    )


def test_a_function_of_time_needs_a_fixed_end():
    problem = OCP(
        lambda t, x, u: u,
        terminal_cost=lambda t, x: t + (x**2).sum(-1),
        initial_state=[1.0],
        control_dim=1,
        horizon=FreeHorizon(1.0, 0.5, 2.0),
        control_bounds=lambda t: (-t - 1, 1.0),
    )
    with pytest.raises(ProblemError, match="a function of time, but the end time is free"):
        solve(problem, steps=3)


@pytest.mark.parametrize("steps", [5, [0.0, 0.5, 1.0]])
def test_a_prepared_problem_refuses_new_bounds_from_a_function_of_time(steps):
    most = torch.tensor(1.0)

    def cost(t, x, u):
        return (x**2 + u**2).sum(-1)

    problem = OCP(
        lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0, control_bounds=lambda t: (-most, most)
    )
    prepared = prepare(problem, DDP(kernel="torch", compile=False), steps=steps)
    assert bool(prepared.solve().converged)
    most.fill_(0.1)
    with pytest.raises(ProblemError, match="control_bounds is no longer what it was .* prepare again"):
        prepared.solve()
