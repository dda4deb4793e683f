"""Every solver reaches the best known minimum from the registry's start, in float64, N as in the reference values."""

import math

import pytest
import torch

from ocnopt import problems
from ocnopt.problems.classical import cartpole_swing_up_kelly
from ocnopt.solvers.solve import solve


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("pendulum_swing_up", 100),
        ("pendulum_swing_up_u5", 100),
        ("cartpole_swing_up_soft", 100),
        ("unicycle_parking", 50),
        ("neural_vector_field", 50),
        ("catalyst_mixing_T1", 50),
    ],
)
def test_discrete_values(name, steps, solver):
    record = problems.control(name)
    solution = solve(record.build(), solver, steps=steps)
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(record.discrete_values[steps], rel=1e-7)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("bryson_denham", 60),
        ("cartpole_swing_up_kelly", 60),
        ("planar_quadrotor_energy", 50),
        ("goddard_rocket", 50),
        ("hanging_chain", 40),
    ],
)
def test_discrete_values_by_ipopt(name, steps):
    """These have constraints at the end or along the path, or so many states that DDP takes minutes in torch."""
    record = problems.control(name)
    solution = solve(record.build(), "casadi", steps=steps)
    assert bool(solution.converged), solution.status
    assert float(solution.constraint_violation) < 1e-8
    assert float(solution.cost) == pytest.approx(record.discrete_values[steps], rel=1e-8)


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_the_discrete_regulator(solver):
    record = problems.control("discrete_lqr_double_integrator")
    solution = solve(record.build(), solver)
    assert float(solution.cost) == pytest.approx(record.optimal_cost, rel=1e-11)
    if solver == "ddp":
        first_gain = torch.tensor([[-2.58576128, -3.44345644]], dtype=torch.float64)
        torch.testing.assert_close(solution.gains.K[0], first_gain, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["planar_quadrotor_energy", "cartpole_swing_up_kelly", "unicycle_parking"])
def test_constant_controls_tend_to_the_continuous_optimum(name):
    """Their error falls with the square of the step: without its leading term, both give the best cost."""
    record = problems.control(name)
    coarse, fine = (float(solve(record.build(), "casadi", steps=steps).cost) for steps in (50, 100))
    assert (4 * fine - coarse) / 3 == pytest.approx(record.optimal_cost, rel=1e-4)


def test_the_source_s_start_leads_kelly_s_cartpole_to_the_reference_s_minimum():
    record = problems.control("cartpole_swing_up_kelly")
    costs = [
        float(solve(record.build(), "casadi", steps=steps, initial_guess=cartpole_swing_up_kelly.line).cost)
        for steps in (50, 100)
    ]
    assert (4 * costs[1] - costs[0]) / 3 == pytest.approx(record.other_minima[0], rel=1e-4)


@pytest.mark.parametrize("limit", [1 / 8, 1 / 5, 0.3])
def test_bryson_denham_in_each_of_its_cases(limit):
    expected = 4 / (9 * limit) if limit <= 1 / 6 else 2 + 6 * (1 - 4 * limit) ** 2 if limit <= 1 / 4 else 2.0
    problem = problems.control("bryson_denham").build(limit=limit)
    assert float(solve(problem, "casadi", steps=40).cost) == pytest.approx(expected, rel=4e-3)


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_the_cartpole_from_a_line_over_the_whole_horizon(solver):
    states = torch.zeros(101, 4, dtype=torch.float64)
    states[:, 1] = torch.linspace(0, math.pi, 101, dtype=torch.float64)
    solution = solve(problems.control("cartpole_swing_up_soft").build(), solver, initial_guess={"states": states})
    assert float(solution.cost) == pytest.approx(2.6313393299, rel=1e-7)


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_the_constant_start_leads_the_cartpole_to_its_second_minimum(solver):
    record = problems.control("cartpole_swing_up_soft")
    controls = torch.full((100, 1), 0.1, dtype=torch.float64)
    solution = solve(record.build(), solver, steps=100, initial_guess=controls)
    assert float(solution.cost) == pytest.approx(3.87853097, rel=1e-7)


@pytest.mark.parametrize("name", ["scalar_lqr", "hager_lq", "mimo_lqr_two_masses"])
def test_constant_controls_cost_a_little_more_than_the_continuous_optimum(name):
    record = problems.control(name)
    costs = [float(solve(record.build(), "ddp", steps=steps).cost) for steps in (50, 100)]
    assert costs == pytest.approx([record.discrete_values[steps] for steps in (50, 100)], rel=1e-11)
    coarse, fine = (cost - record.optimal_cost for cost in costs)
    assert 0 < fine < coarse
    # the error of constant controls falls with the square of the step
    assert coarse / fine == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_least_effort(solver):
    record = problems.control("double_integrator_min_energy")
    for steps in (10, 50):
        solution = solve(record.build(), solver, steps=steps)
        assert float(solution.cost) == pytest.approx(record.discrete_values[steps], rel=1e-7)
        assert torch.allclose(solution.states[-1], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("double_integrator_min_time", "ddp"),
        ("double_integrator_min_time", "casadi"),
        ("brachistochrone", "ddp"),
        ("brachistochrone", "casadi"),
        ("planar_quadrotor_min_time", "casadi"),
    ],
)
def test_least_time(name, solver):
    record = problems.control(name)
    solution = solve(record.build(), solver, steps=record.steps)
    assert bool(solution.converged), solution.status
    assert float(solution.horizon) == pytest.approx(record.T_star, abs=1e-4)
    assert float(solution.cost) == pytest.approx(float(solution.horizon), rel=1e-12)
    assert float(solution.cost) == pytest.approx(record.discrete_values[record.steps], rel=1e-7)


def test_the_car_parks_with_the_best_known_cost():
    record = problems.control("car_parking_tassa")
    solution = solve(record.build(), "casadi")
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(record.optimal_cost, rel=1e-6)


def test_the_car_in_100_steps():
    solution = solve(problems.control("car_parking_tassa").build(steps=100), "ddp")
    assert float(solution.cost) == pytest.approx(4.3564366222, rel=1e-7)
