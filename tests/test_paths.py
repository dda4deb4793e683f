"""Paths of a discrete problem: given controls, broken paths, varying sizes, problems of a batch that stand alone."""

import pytest
import torch

from ocnopt.ocp import OCP
from ocnopt.paths import Widened, evaluate, rollout, rows_stand_alone, walk
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close
from tests.test_staged import price, slope


class TestPaths:
    @pytest.fixture
    def problem(self):
        return transcribe(OCP(slope, price, initial_state=torch.rand(3, 2), control_dim=1, horizon=1.0), 4)

    def test_given_controls_are_a_policy(self, problem):
        controls = list(torch.rand(4, 3, 1).double())
        given_, policy = (rollout(problem, way, problem.initial_state) for way in (controls, lambda k, x: controls[k]))
        assert_close(given_.cost, policy.cost, rtol=0.0)

    def test_evaluating_a_broken_path_finds_the_gaps_that_a_walk_was_given(self, problem):
        wide = Widened(problem)
        controls, gaps = torch.rand(4, 3, 1).double(), torch.rand(4, 3, 2).double()
        path = walk(wide, lambda k, x: controls[k], problem.initial_state, gaps)
        found = evaluate(wide, path.states, controls)
        assert_close(found.gaps, gaps, rtol=1e-12)
        assert_close(found.cost, path.cost, rtol=1e-13)

    def test_smaller_states_and_controls_are_followed_by_zeros(self):
        grow = Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1)
        rest = Stage(lambda k, x, u: x.sum(-1, keepdim=True), None, 0)
        wide = Widened(StagedOCP([grow, rest], initial_state=[2.0], control_bounds=(-1.0, 3.0)))
        path = walk(wide, lambda k, x: torch.tensor([[3.0], [0.0]]).double()[k], torch.tensor([2.0, 0.0]).double())
        assert_close(path.states, [[2.0, 0.0], [2.0, 3.0], [5.0, 0.0]])
        assert [x.tolist() for x in wide.split(path.states)[0]] == [[2.0], [2.0, 3.0], [5.0]]
        assert [u.tolist() for u in wide.cut(path.controls, wide.control_sizes)] == [[3.0], []]
        assert_close(evaluate(wide, path.states, path.controls).gaps, torch.zeros(2, 2))
        assert wide.control_bounds[0].tolist() == [[-1.0], [0.0]]

    @pytest.mark.parametrize(
        ("stage", "alone"),
        [
            (lambda data: Stage(lambda k, x, u: x * 2.0, lambda k, x, u: x.sum(-1)), True),
            (lambda data: Stage(lambda k, x, u: x * data[0], None), True),
            (lambda data: Stage(lambda k, x, u: x * data, None), False),
            (lambda data: Stage(lambda k, x, u: x, lambda k, x, u: (x * data).sum(-1)), False),
            (lambda data: Stage(lambda k, x, u: x * data[: x.shape[-2]], None), False),
        ],
    )
    def test_whether_a_problem_of_a_batch_stands_alone(self, stage, alone):
        data = torch.tensor([[1.0], [2.0], [3.0]]).double()
        problem = StagedOCP(stage(data), initial_state=torch.ones(3, 2), steps=2)
        assert rows_stand_alone(Widened(problem)) == alone

    def test_the_data_of_a_terminal_cost_count_too(self):
        data = torch.rand(2, 2, 3).double()
        problem = StagedOCP(
            Stage(lambda k, x, u: x), lambda x: (x * data).sum(-1), initial_state=torch.ones(2, 2, 3), steps=2
        )
        assert not rows_stand_alone(Widened(problem))
