"""Every solver reaches the best known minimum from the registry's start, in float64, N as in the reference values."""

import math

import pytest
import torch

from ocnopt import problems
from ocnopt.solvers.solve import solve

CONSTRAINED = ("double_integrator_min_energy", "double_integrator_min_time", "brachistochrone")


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
@pytest.mark.parametrize("name", ["pendulum_swing_up", "pendulum_swing_up_u5", "cartpole_swing_up_soft"])
def test_discrete_values(name, solver):
    record = problems.control(name)
    solution = solve(record.build(), solver, steps=100)
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(record.discrete_values[100], rel=1e-6)


@pytest.mark.parametrize("solver", ["ddp", "casadi"])
def test_the_cartpole_from_a_line_over_the_whole_horizon(solver):
    states = torch.zeros(101, 4, dtype=torch.float64)
    states[:, 1] = torch.linspace(0, math.pi, 101, dtype=torch.float64)
    solution = solve(problems.control("cartpole_swing_up_soft").build(), solver, initial_guess={"states": states})
    assert float(solution.cost) == pytest.approx(2.6313393299, rel=1e-6)


def test_the_constant_start_leads_the_cartpole_to_its_second_minimum():
    record = problems.control("cartpole_swing_up_soft")
    controls = torch.full((100, 1), 0.1, dtype=torch.float64)
    solution = solve(record.build(), "casadi", steps=100, initial_guess=controls)
    assert float(solution.cost) == pytest.approx(3.87853097, rel=1e-6)


@pytest.mark.parametrize("name", ["scalar_lqr", "mimo_lqr_two_masses"])
def test_constant_controls_cost_a_little_more_than_the_continuous_optimum(name):
    record = problems.control(name)
    coarse, fine = (float(solve(record.build(), "ddp", steps=steps).cost) - record.optimal_cost for steps in (50, 100))
    assert 0 < fine < coarse
    # the error of constant controls falls with the square of the step
    assert coarse / fine == pytest.approx(4, rel=0.05)


def test_least_effort():
    record = problems.control("double_integrator_min_energy")
    for steps in (10, 50):
        solution = solve(record.build(), "casadi", steps=steps)
        assert float(solution.cost) == pytest.approx(record.discrete_values[steps], rel=1e-8)
        assert torch.allclose(solution.states[-1], torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("name", ["double_integrator_min_time", "brachistochrone"])
def test_least_time(name):
    record = problems.control(name)
    solution = solve(record.build(), "casadi", steps=record.steps)
    assert bool(solution.converged), solution.status
    assert float(solution.horizon) == pytest.approx(record.T_star, abs=1e-4)
    assert float(solution.cost) == pytest.approx(float(solution.horizon), rel=1e-12)


def test_the_car_parks_with_the_best_known_cost():
    record = problems.control("car_parking_tassa")
    solution = solve(record.build(), "casadi")
    assert bool(solution.converged), solution.status
    assert float(solution.cost) == pytest.approx(record.optimal_cost, rel=1e-6)


def test_the_car_in_100_steps():
    solution = solve(problems.control("car_parking_tassa").build(steps=100), "ddp")
    assert float(solution.cost) == pytest.approx(4.3564366222, rel=1e-6)
