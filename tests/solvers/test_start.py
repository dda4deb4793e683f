"""Starts that stand still, and guesses of what a problem does not have."""

import math
import warnings

import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers.guess import read_guess
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close
from tests.solvers.cases import pendulum, regulator


class TestStationaryStart:
    def test_it_is_left_with_a_warning_by_a_seeded_perturbation(self):
        staged = transcribe(pendulum(), 10)
        with pytest.warns(
            UserWarning, match=r"the start \(zero controls\) is a stationary point: .*Pass initial_guess="
        ):
            guess = read_guess(staged, None)
        with pytest.warns(UserWarning, match="stationary point"):
            again = read_guess(staged, None)
        controls = guess.controls
        assert_close(controls, again.controls, rtol=0.0)
        assert 0.01 < float(controls.abs().max()) < 1.0

    def test_the_solver_then_moves(self):
        with pytest.warns(UserWarning, match="stationary point"):
            solution = solve(pendulum(), steps=10)
        assert bool(solution.converged)
        assert solution.cost.item() < 1.0

    def test_in_a_batch_only_the_problems_that_stand_still_are_moved(self):
        staged = transcribe(pendulum([[0.0, 0.0], [0.5, 0.0]]), 10)
        with pytest.warns(UserWarning, match="stationary point in 1 of 2 problems"):
            controls = read_guess(staged, None).controls
        assert float(controls[:, 0].abs().min()) > 0
        assert float(controls[:, 1].abs().max()) == 0

    def test_bounds_hold(self):
        staged = transcribe(pendulum(control_bounds=(-0.01, 0.02)), 10)
        with pytest.warns(UserWarning, match="stationary point"):
            controls = read_guess(staged, None).controls
        assert bool(((controls >= -0.01) & (controls <= 0.02)).all())

    @pytest.mark.parametrize(
        "problem",
        [
            regulator(),
            pendulum([0.1, 0.0]),
            pendulum(control_bounds=(0.5, 1.0)),
            pendulum(terminal_constraint=lambda t, x: x - 1.0),
            OCP(lambda t, x, u: x, None, lambda t, x: x[..., 0], initial_state=[1.0], horizon=1.0),
        ],
    )
    def test_no_warning_elsewhere(self, problem):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            controls = read_guess(transcribe(problem, 5), None).controls
        expected = 0.0 if problem.control_bounds is None else 0.5
        assert_close(controls, torch.full_like(controls, expected))

    def test_a_path_that_is_not_finite_is_not_stationary(self):
        problem = OCP(
            lambda t, x, u: x**3 + u,
            None,
            lambda t, x: x.sum(-1),
            initial_state=[[100.0], [0.1]],
            control_dim=1,
            horizon=1.0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            controls = read_guess(transcribe(problem, 20), None).controls
        assert_close(controls, torch.zeros(20, 2, 1))

    def test_a_given_start_is_kept(self):
        guess = read_guess(transcribe(pendulum(), 5), torch.zeros(5, 1))
        assert_close(guess.controls, torch.zeros(5, 1))

    @pytest.mark.parametrize("given", [{"horizon": 1.5}, {"parameters": [0.5]}, {"horizon": 1.5, "parameters": [0.5]}])
    def test_a_partial_guess_leaves_it_too(self, given):
        problem = OCP(
            lambda t, x, u, p: torch.stack([x[..., 1], u[..., 0] - torch.sin(x[..., 0])], dim=-1),
            lambda t, x, u, p: 0.01 * (u**2).sum(-1),
            lambda t, x, p: 1 + torch.cos(x[..., 0]) + 0 * p[..., 0],
            initial_state=[0.0, 0.0],
            control_dim=1,
            horizon=FreeHorizon(2.0, 1.0, 3.0),
            parameters=[0.1],
        )
        with pytest.warns(UserWarning, match="stationary point"):
            solution = solve(problem, steps=10, initial_guess=given)
        assert solution.iterations > 0
        with pytest.warns(UserWarning, match="stationary point"):
            guess = read_guess(transcribe(problem, 10), given)
        assert_close(guess.parameters, [given.get("parameters", [0.1])[0], given.get("horizon", 2.0)])

    @pytest.mark.parametrize("kind", ["solution", "controls", "states"])
    def test_a_warm_start_at_an_optimum_stays_there(self, kind):
        problem = pendulum([math.pi, 0.0])
        with pytest.warns(UserWarning, match="stationary point"):
            solution = solve(problem, steps=10)
        still = {"controls": torch.zeros(10, 1), "states": solution.states.round(decimals=6)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            guess = read_guess(transcribe(problem, 10), solution if kind == "solution" else {kind: still[kind]})
        expected = solution.controls if kind == "solution" else torch.zeros(10, 1)
        assert_close(guess.controls, expected)


class TestGuessOfNothing:
    """What a problem does not have cannot be guessed."""

    def test_a_horizon_that_is_fixed(self):
        message = (
            "initial_guess has a horizon, but the problem's end time is fixed; expected none: leave it out, or free"
        )
        with pytest.raises(oc.ProblemError, match=message):
            solve(regulator(), initial_guess={"horizon": 2.0})
        stage = Stage(lambda k, x, u: x + u, control_dim=1)
        with pytest.raises(oc.ProblemError, match="the problem's end time is its number of steps; expected none"):
            solve(StagedOCP(stage, initial_state=[1.0], steps=3), initial_guess={"horizon": 2.0})

    def test_parameters_of_a_problem_without_any(self):
        for problem in (regulator(), regulator(horizon=FreeHorizon(1.0, 0.5, 2.0))):
            with pytest.raises(
                oc.ProblemError, match="initial_guess has parameters, but the problem has none; expected"
            ):
                solve(problem, initial_guess={"parameters": [2.0]})
        assert solve(regulator(), steps=3, initial_guess={"parameters": []}).converged

    def test_the_end_time_of_a_solution_is_no_guess(self):
        solution = solve(regulator(horizon=FreeHorizon(1.0, 0.5, 2.0)), steps=3)
        assert solve(regulator(), steps=3, initial_guess=solution).horizon == 1.0
