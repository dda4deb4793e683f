"""DDP with constraints: costs, violations and multipliers are IPOPT's, or those of dense linear algebra."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP
from ocnopt.solvers.augmented import Multipliers, augment, no_multipliers
from ocnopt.solvers.solution import load_solution
from ocnopt.solvers.solve import prepare, solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.constrained_lq import random_constrained_lq

F64 = torch.float64
KERNELS = ("torch", "lowered")
INFINITE = math.inf


def mass(initial_state=(0.0, 1.0), **options):
    """A mass that is to come back to zero with its velocity reversed, with the least integral of u^2 / 2."""
    given = {"terminal_constraint": lambda t, x: torch.stack([x[..., 0], x[..., 1] + 1], dim=-1)} | options
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
        lambda t, x, u: 0.5 * u[..., 0] ** 2,
        initial_state=initial_state,
        control_dim=1,
        horizon=1.0,
        **given,
    )


def below(limit):
    return lambda t, x, u: x[..., :1] - limit


def swing(**options):
    """A pendulum from hanging to standing, at rest."""
    return OCP(
        lambda t, x, u: torch.stack([x[..., 1], u[..., 0] - torch.sin(x[..., 0])], dim=-1),
        lambda t, x, u: 0.5 * u[..., 0] ** 2,
        initial_state=[0.0, 0.0],
        control_dim=1,
        horizon=4.0,
        terminal_constraint=lambda t, x: torch.stack([x[..., 0] - math.pi, x[..., 1]], dim=-1),
        **options,
    )


CASES = {
    "minimum energy": (lambda: problems.get("double_integrator_min_energy").build(), 10),
    # with an even number of steps no control lies between its bounds, and the multipliers are not unique
    "minimum time": (lambda: problems.get("double_integrator_min_time").build(), 15),
    # Bryson and Denham 1963
    "path": (lambda: mass(path_constraint=below(1 / 9)), 20),
    "state bounds": (lambda: mass(state_bounds=([-INFINITE, -INFINITE], [1 / 9, INFINITE])), 20),
    "control and velocity": (
        lambda: swing(path_constraint=lambda t, x, u: torch.stack([x[..., 1] - 1.5, u[..., 0] - 1.1], dim=-1)),
        20,
    ),
    "power": (lambda: swing(path_constraint=lambda t, x, u: (x[..., 1] * u[..., 0])[..., None] - 1.0), 20),
    "both bounds": (lambda: swing(state_bounds=(-2.0, [4.0, 1.4]), control_bounds=(-1.1, 1.1)), 20),
    "batch": (
        lambda: mass([[0.0, 1.0], [0.02, 1.0], [0.0, 0.5], [-0.1, 1.0]], path_constraint=below(1 / 9)),
        10,
    ),
}


def assert_same(solution, reference):
    assert bool(solution.converged.all()), solution.status
    assert float(solution.constraint_violation.max()) <= 1e-8
    torch.testing.assert_close(solution.cost, reference.cost, rtol=1e-6, atol=1e-8)
    assert solution.multipliers.keys() == reference.multipliers.keys()
    for name, value in solution.multipliers.items():
        torch.testing.assert_close(value, reference.multipliers[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_ddp_and_ipopt_agree(name):
    build, steps = CASES[name]
    reference = solve(build(), "casadi", steps=steps)
    for kernel in KERNELS:
        assert_same(solve(build(), steps=steps, kernel=kernel), reference)


def test_minimum_energy_by_its_formula():
    solution = solve(problems.get("double_integrator_min_energy").build(), steps=10)
    assert float(solution.cost) == pytest.approx(6 / (1 - 10**-2), rel=1e-7)
    # the costate of a double integrator falls in a straight line: 12, and -6 at the end, both times that factor
    torch.testing.assert_close(
        solution.multipliers["terminal_constraint"], torch.tensor([-12.0, 6.0], dtype=F64) / 0.99, rtol=1e-6, atol=0
    )


def test_multipliers_of_a_path_constraint_and_its_state_bound():
    path = solve(mass(path_constraint=below(1 / 9)), steps=10)
    bound = solve(mass(state_bounds=(-10.0, [1 / 9, INFINITE])), steps=10)
    torch.testing.assert_close(path.multipliers["path_constraint"], bound.multipliers["state_bounds"][:, :1])
    assert float(path.multipliers["path_constraint"].min()) >= 0
    flipped = solve(
        mass(
            [0.0, -1.0],
            terminal_constraint=lambda t, x: x - x.new_tensor([0.0, 1.0]),
            state_bounds=([-1 / 9, -INFINITE], 10.0),
        ),
        steps=10,
    )
    torch.testing.assert_close(flipped.multipliers["state_bounds"], -bound.multipliers["state_bounds"])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(2, 6), st.integers(1, 6), st.integers(1, 3)),
    bounded=st.booleans(),
    paths=st.integers(0, 2),
    ends=st.integers(0, 1),
    kernel=st.sampled_from(KERNELS),
)
def test_linear_quadratic_problems(seed, sizes, bounded, paths, ends, kernel):
    problem = random_constrained_lq(seed, *sizes, bounded=bounded, paths=paths, ends=ends)
    U, cost, end, path = problem.solve()
    if bounded and sizes[2] > 2:
        kernel = "torch"
    solution = solve(problem.staged(), kernel=kernel)
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(cost, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(solution.controls, torch.from_numpy(U), rtol=1e-5, atol=1e-5)
    found = solution.multipliers or {}
    for name, value in {"terminal_constraint": end, "path_constraint": path}.items():
        if value.size:
            torch.testing.assert_close(found[name], torch.from_numpy(value), rtol=1e-4, atol=1e-4)
    if not found:
        assert paths == ends == 0


@pytest.mark.parametrize(
    ("problem", "named"),
    [
        (mass(control_bounds=(-1.0, 1.0)), r"terminal_constraint\[1\] at the end is off by"),
        (
            mass(path_constraint=lambda t, x, u: torch.stack([x[..., 0] - 1 / 9, 0.05 - x[..., 0]], dim=-1)),
            r"path_constraint\[1\] at step 0 is off by",
        ),
        (mass(state_bounds=([0.03, -INFINITE], [0.05, INFINITE])), "state_bounds"),
    ],
)
def test_constraints_that_cannot_be_met_are_named(problem, named):
    solution = solve(problem, steps=10, kernel="torch")
    assert not bool(solution.converged)
    assert "the constraints cannot be met near this path" in solution.status
    assert re.search(named, solution.status), solution.status


def test_each_problem_of_a_batch_ends_by_itself():
    solution = solve(mass([[0.0, 1.0], [5.0, 1.0]], control_bounds=(-9.0, 9.0)), steps=10)
    assert solution.converged.tolist() == [True, False]
    assert "cannot be met" in solution.status[1]
    alone = solve(mass([0.0, 1.0], control_bounds=(-9.0, 9.0)), steps=10)
    torch.testing.assert_close(solution.cost[0], alone.cost)


def test_a_prepared_solver_serves_other_states():
    prepared = prepare(mass(path_constraint=below(1 / 9)), steps=10)
    for start in ([0.0, 1.0], [0.02, 0.8]):
        fresh = solve(mass(start, path_constraint=below(1 / 9)), steps=10)
        torch.testing.assert_close(prepared.solve(start).cost, fresh.cost)


def test_stages_of_several_sizes():
    stages = [
        Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
        Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), 2),
    ]
    problem = StagedOCP(
        stages,
        initial_state=[1.0],
        path_constraint=lambda k, x, u: u[..., :1] - (0.3 if k == 0 else 5.0),
        terminal_constraint=lambda x: x - 2.0,
        state_bounds=(-3.0, 3.0),
    )
    solution, reference = solve(problem), solve(problem, "casadi")
    assert_same(solution, reference)
    assert float(solution.multipliers["path_constraint"][0]) > 0


def test_data_and_given_rows_reach_the_constraints():
    target = torch.tensor([0.5], dtype=F64)
    problem = StagedOCP(
        Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), 1),
        initial_state=[0.0],
        steps=2,
        terminal_constraint=lambda x: x - target,
        data=(target,),
    )
    for kernel in KERNELS:
        prepared = prepare(problem, kernel=kernel)
        for value in (0.5, 1.0):
            target.fill_(value)
            assert float(prepared.solve().cost) == pytest.approx(value**2 / 2, rel=1e-6)


def test_the_augmented_lagrangian_is_its_formula():
    problem = transcribe(mass(path_constraint=below(0.1), state_bounds=(-1.0, 2.0)), 3, "euler")
    zero = no_multipliers(problem)
    assert [tuple(v.shape) for v in zero] == [(2,), (4, 1), (4, 2)]
    mu = Multipliers(torch.tensor([1.0, -2.0]).double(), torch.full((4, 1), 0.3).double(), zero.state)
    free = augment(problem, mu, torch.tensor(4.0).double())
    x, p = torch.tensor([0.2, 3.0], dtype=F64), problem.start_parameters()
    end = 1.0 * 0.2 + 2 * 0.2**2 - 2.0 * 4.0 + 2 * 4.0**2
    path, bound = 0.3 * 0.1 + 2 * 0.1**2, 2 * 1.0**2
    assert float(free.terminal(x, p)) == pytest.approx(end + path + bound)
    stage = free.groups[0].stage
    assert float(free.advance(stage, 1, x, x.new_zeros(1), p)[1]) == pytest.approx(path + bound)
    # the first state is given: nothing can be done about its bounds
    assert float(free.advance(stage, 0, x, x.new_zeros(1), p)[1]) == pytest.approx(path)


def test_multipliers_are_saved(tmp_path):
    solution = solve(mass(), steps=5)
    solution.save(tmp_path / "solution.pt")
    read = load_solution(tmp_path / "solution.pt")
    torch.testing.assert_close(read.multipliers["terminal_constraint"], solution.multipliers["terminal_constraint"])
    assert dataclasses.replace(read, multipliers=None).multipliers is None


def test_limits_end_the_outer_loop():
    short = solve(mass(), steps=5, max_outer=2)
    assert not bool(short.converged)
    assert "max_outer rounds were not enough" in short.status
    few = solve(mass(), steps=5, max_iterations=2)
    assert "the iteration limit was reached" in few.status
    late = solve(mass(), steps=5, time_limit=1e-9)
    assert "the time limit was reached" in late.status
    assert bool(torch.isfinite(late.cost))


def test_bounds_of_states_that_do_not_fit():
    with pytest.raises(ProblemError, match=r"state_bounds\[0\]"):
        mass(state_bounds=([0.0, 0.0, 0.0], 1.0))
    stages = [Stage(lambda k, x, u: torch.cat([x, u], dim=-1), None, 1), Stage(lambda k, x, u: x, None, 1)]
    with pytest.raises(ProblemError, match="size of the state varies from 1 to 2; expected a pair of scalars"):
        StagedOCP(stages, initial_state=[0.0], state_bounds=([0.0, -1.0], 1.0))
