"""Library problems against the reference solutions and IPOPT: free end times, constraints, multipliers, random starts.

Costs from the library's starts are in tests/problems; longer runs (N = 500, ten random starts, the quadrotor in least
time) are measured by `python -m tests.benchmarks starts`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocnopt import problems
from ocnopt.solvers.solve import solve
from tests.benchmarks import starts
from tests.oracles.constrained_lq import random_constrained_lq


@pytest.mark.parametrize(("name", "start", "expected"), starts.LEFT)
def test_the_running_cost_at_the_left_node(name, start, expected):
    solution = starts.from_named_start(name, 100, start, left=True)
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("bryson_denham", 30),
        ("cartpole_swing_up_kelly", 30),
        ("planar_quadrotor_energy", 20),
        ("goddard_rocket", 30),
        ("brachistochrone", 20),
    ],
)
def test_constrained_problems_by_both_solvers(name, steps):
    ours, theirs = (solve(problems.control(name).build(), solver, steps=steps) for solver in ("ddp", "casadi"))
    for solution in (ours, theirs):
        assert bool(solution.converged), solution.status
        assert float(solution.constraint_violation) <= 1e-6
    assert float(ours.cost) == pytest.approx(float(theirs.cost), rel=1e-7)
    assert float(ours.horizon) == pytest.approx(float(theirs.horizon), abs=1e-6)
    for kind, value in theirs.multipliers.items():
        torch.testing.assert_close(ours.multipliers[kind], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "steps"), [("goddard_rocket", 50), ("brachistochrone", 50)])
def test_the_free_end_time_is_the_reference_s(name, steps):
    record = problems.control(name)
    solution = solve(record.build(), steps=steps)
    assert bool(solution.converged), solution.status
    assert float(solution.horizon) == pytest.approx(record.T_star, abs=1e-4)
    assert float(solution.cost) == pytest.approx(record.discrete_values[steps], rel=1e-8)


def test_least_time_of_a_quadrotor():
    """Singular pieces between bangs: with a stiffer first penalty DDP crept along until its limit."""
    record = problems.control("planar_quadrotor_min_time")
    ours, theirs = (solve(record.build(), solver, steps=20) for solver in ("ddp", "casadi"))
    assert bool(ours.converged), ours.status
    assert float(ours.horizon) == pytest.approx(float(theirs.horizon), abs=1e-7)
    assert float(ours.constraint_violation) <= 1e-8


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(2, 5), st.integers(1, 6), st.integers(1, 6)),
    bounded=st.booleans(),
    ends=st.integers(0, 3),
    solver=st.sampled_from(["ddp", "casadi"]),
)
def test_linear_quadratic_problems_of_many_controls_and_ends(seed, sizes, bounded, ends, solver):
    N, n, m = sizes
    ends = min(ends, n, (N - 1) * m)
    problem = random_constrained_lq(seed, N, n, m, bounded=bounded, paths=0, ends=ends)
    U, cost, end, _ = problem.solve()
    solution = solve(problem.staged(), solver)
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(cost, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(solution.controls, torch.from_numpy(U), rtol=1e-5, atol=1e-5)
    if ends:
        torch.testing.assert_close(
            solution.multipliers["terminal_constraint"], torch.from_numpy(end), rtol=1e-4, atol=1e-4
        )
