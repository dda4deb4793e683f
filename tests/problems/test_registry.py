"""Names, records and the messages for names that do not exist."""

import importlib.util
from pathlib import Path

import pytest
import torch

from ocnopt import problems
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.staged import StagedOCP

CONTROL = problems.names("control")


# Every problem of the reference solutions that the library was checked against: best cost, and how far it is trusted.
REFERENCE = {
    "scalar_lqr": (0.7615941559557649, 1e-12),
    "hager_lq": (0.7615941559557649, 1e-12),
    "mimo_lqr_two_masses": (1.4799969151196526, 1e-11),
    "discrete_lqr_double_integrator": (13.31743275051076, 1e-11),
    "double_integrator_min_energy": (6.0, 1e-10),
    "double_integrator_min_time": (2.0, 1e-10),
    "brachistochrone": (1.801603122453081, 1e-10),
    "bryson_denham": (4.0, 1e-08),
    "pendulum_swing_up": (2.8278332512, 1e-09),
    "pendulum_swing_up_u5": (4.79617026, 1e-08),
    "cartpole_swing_up_kelly": (58.8076674576, 1e-08),
    "cartpole_swing_up_soft": (2.6277086651, 1e-09),
    "car_parking_tassa": (1.4361004746, 1e-07),
    "goddard_rocket": (-1.012836918317, 1e-09),
    "catalyst_mixing_T1": (-0.048055685861, 1e-10),
    "planar_quadrotor_energy": (1.230483402, 1e-09),
    "planar_quadrotor_min_time": (1.265249, 5e-07),
}
OWN = {"unicycle_parking", "neural_vector_field", "hanging_chain"}


def test_the_library_is_complete():
    assert set(CONTROL) == set(REFERENCE) | OWN
    assert problems.names("learning")[0] == "digits"
    assert problems.names() == (*CONTROL, *problems.names("learning"))


@pytest.mark.parametrize("name", REFERENCE)
def test_the_best_cost_is_the_reference_s(name):
    record, (cost, tolerance) = problems.control(name), REFERENCE[name]
    if name == "cartpole_swing_up_kelly":  # the reference holds the minimum that the source's start leads to
        assert record.other_minima[0] == cost > record.optimal_cost
    else:
        assert record.optimal_cost == pytest.approx(cost, abs=tolerance)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ProblemError, match="no problem is called 'pendulum_swingup'; did you mean 'pendulum_swing_up'"):
        problems.get("pendulum_swingup")


def test_an_unknown_kind():
    with pytest.raises(ProblemError, match="kind is 'discrete'; expected 'control' or 'learning'"):
        problems.names("discrete")


def test_a_problem_of_the_other_kind():
    with pytest.raises(ProblemError, match="'digits' is a learning problem; expected a control problem: train it"):
        problems.control("digits")
    with pytest.raises(ProblemError, match="'scalar_lqr' is a control problem; expected a learning problem: solve it"):
        problems.learning_task("scalar_lqr")


@pytest.mark.parametrize("name", CONTROL)
def test_a_record_is_complete(name):
    record = problems.control(name)
    problem = record.build()
    assert record.name == name
    assert record.kind == "control"
    assert record.summary
    assert record.source
    assert record.start
    assert record.tolerance > 0
    assert len(record.state_labels) == problem.state_dim
    control_dim = problem.control_dim if isinstance(problem, OCP) else problem.groups[0].stage.control_dim
    assert len(record.control_labels) == control_dim
    free = isinstance(problem, OCP) and isinstance(problem.horizon, FreeHorizon)
    assert (record.T_star is not None) == free


@pytest.mark.parametrize("name", CONTROL)
@pytest.mark.parametrize("steps", [3, 50])
def test_a_start_fits_the_number_of_steps(name, steps):
    record = problems.control(name)
    guess = record.initial_guess
    if guess is None:
        return
    n, m = record.build().state_dim, len(record.control_labels)
    shapes = {key: tuple(value.shape) for key, value in guess(steps).items()}
    assert shapes["controls"] == (steps, m)
    assert shapes.get("states", (steps + 1, n)) == (steps + 1, n)
    assert all(value.dtype == torch.float64 for value in guess(steps).values())


@pytest.mark.parametrize("name", CONTROL)
def test_a_problem_takes_a_batch_of_initial_states(name):
    record = problems.control(name)
    single = record.build()
    batch = record.build(initial_state=single.initial_state.expand(2, 3, -1))
    assert batch.batch_shape == (2, 3)
    assert isinstance(batch, OCP | StagedOCP)


def test_a_second_copy_of_the_package_is_refused():
    path = Path(problems.__file__)
    spec = importlib.util.spec_from_file_location("problems", path)
    with pytest.raises(ImportError, match="imported as 'problems'; expected 'ocnopt.problems'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
