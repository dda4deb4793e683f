"""Several starts, distinct minima, and saddles that are called so."""

import pytest
import torch

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon
from ocnopt.solvers import ddp
from ocnopt.solvers.solution import Guess, load_solution
from ocnopt.solvers.solve import prepare, solve
from ocnopt.solvers.starts import _SIZES, starts
from ocnopt.staged import Stage, StagedOCP

F64 = torch.float64


def wells(tilt=0.1, **options):
    """One step to the minimum of u^2 / 50 + (x^2 - 1)^2 + tilt x: one well at each side, a saddle (a hill) between."""
    given = {"initial_state": [0.0], "steps": 1} | options
    stage = Stage(lambda k, x, u: x + u, lambda k, x, u: 0.02 * (u**2).sum(-1), control_dim=1)
    return StagedOCP(stage, lambda x: ((x**2 - 1) ** 2 + tilt * x).sum(-1), **given)


def exact_wells(tilt=0.1):
    """Costs and places where 4x^3 + (0.04 - 4) x + tilt = 0, the hill left out."""
    import numpy as np

    roots = np.roots([4.0, 0.0, 0.04 - 4.0, tilt]).real
    costs = sorted((0.02 * x**2 + (x**2 - 1) ** 2 + tilt * x, x) for x in roots if 12 * x**2 + 0.04 - 4 > 0)
    return torch.tensor(costs, dtype=F64)


class TestRestarts:
    def test_the_lowest_minimum_is_kept_and_all_are_listed(self):
        guess = torch.full((1, 1), 0.7)
        alone = solve(wells(), initial_guess=guess)
        solution = solve(wells(), initial_guess=guess, restarts=7)
        exact = exact_wells()
        assert float(alone.cost) == pytest.approx(float(exact[1, 0]), rel=1e-9)
        assert float(solution.cost) == pytest.approx(float(exact[0, 0]), rel=1e-9)
        assert solution.minima["cost"].tolist() == pytest.approx(exact[:, 0].tolist(), rel=1e-9)
        assert solution.minima["states"][:, 1, 0].tolist() == pytest.approx(exact[:, 1].tolist(), rel=1e-6)
        assert int(solution.minima["starts"].sum()) == 8
        assert solution.status.endswith("; the best of 8 starts, which led to 2 different minima")
        assert solution.controls.shape == (1, 1)
        assert solution.gains.K.shape == (1, 1, 1)
        assert solution.costates.shape == (2, 1)
        other = solve(wells(), initial_guess={"controls": solution.minima["controls"][1]})
        assert float(other.cost) == pytest.approx(float(exact[1, 0]), rel=1e-9)

    def test_a_batch_keeps_the_best_of_each_problem(self):
        """Data of one problem each: their lower wells lie at different sides."""
        tilt = torch.tensor([[0.1], [-0.1]], dtype=F64)
        problem = wells(tilt, initial_state=[[0.0], [0.0]])
        solution = solve(problem, initial_guess=torch.full((2, 1, 1), 0.7), restarts=5)
        assert solution.cost.tolist() == pytest.approx([float(exact_wells()[0, 0])] * 2, rel=1e-9)
        assert (solution.states[:, 1, 0] < 0).tolist() == [True, False]
        assert solution.minima["cost"].shape[0] == 2
        assert len(solution.status) == 2

    def test_batches_and_one_after_another_agree(self):
        """Data as long as there are starts must not be taken for data of one start each."""
        target = torch.tensor([3.0, 0.0, 1.0], dtype=F64)
        cost = lambda x: ((x[..., 0] - target[0] - target[1] * target[2]) ** 2) ** 2  # noqa: E731
        stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
        apart = StagedOCP(stage, cost, initial_state=[0.0], steps=2, data=(target,))
        together = StagedOCP(stage, cost, initial_state=[0.0], steps=2)
        pair = [solve(problem, restarts=2) for problem in (apart, together)]
        assert float(pair[0].cost) == pytest.approx(float(pair[1].cost), rel=1e-9)

    def test_constraints_free_end_times_and_a_prepared_problem(self):
        """The shortest way of a double integrator, bang-bang: T = 2."""
        problem = OCP(
            lambda t, x, u: torch.stack([x[..., 1], u[..., 0]], dim=-1),
            lambda t, x, u: 1e-3 * (u**2).sum(-1),
            lambda t, x: 0.0 * t + x[..., 0] * 0 + t,
            initial_state=[0.0, 0.0],
            control_dim=1,
            horizon=FreeHorizon(3.0, 1.0, 5.0),
            control_bounds=(-1.0, 1.0),
            terminal_constraint=lambda t, x: x - torch.tensor([1.0, 0.0], dtype=F64),
        )
        single = solve(problem, steps=6)
        many = prepare(problem, steps=6, restarts=2, compile=False).solve()
        assert float(many.cost) == pytest.approx(float(single.cost), rel=1e-6)
        assert many.multipliers["terminal_constraint"].shape == (2,)
        assert many.minima["parameters"].shape[-1] == 1

    def test_the_seed_chooses_the_starts(self):
        problem, guess = wells(steps=5), Guess([torch.zeros(1, dtype=F64)] * 5, torch.zeros(0, dtype=F64))
        first, again, other = (starts(problem, guess, 2, seed) for seed in (0, 0, 1))
        assert all(bool((a == b).all()) for a, b in zip(first[1].controls, again[1].controls, strict=True))
        assert not bool((first[1].controls[0] == other[1].controls[0]).all())
        assert all(bool((u == 0).all()) for u in first[0].controls)

    def test_starts_stay_within_bounds(self):
        problem = wells(steps=5, control_bounds=(-0.5, 2.0))
        guess = Guess([torch.zeros(1, dtype=F64)] * 5, torch.zeros(0, dtype=F64))
        for one in starts(problem, guess, len(_SIZES), 0):
            assert all(-0.5 <= float(u) <= 2.0 for u in one.controls)

    def test_it_is_saved(self, tmp_path):
        solution = solve(wells(), initial_guess=torch.full((1, 1), 0.7), restarts=3)
        solution.save(tmp_path / "solution.pt")
        loaded = load_solution(tmp_path / "solution.pt")
        assert loaded.minima["cost"].tolist() == solution.minima["cost"].tolist()

    def test_a_time_limit_leaves_the_starts_that_were_done(self):
        tilt = torch.tensor([[0.1], [-0.1]], dtype=F64)
        problem = wells(tilt, initial_state=[[0.0], [0.0]])
        solution = solve(problem, initial_guess=torch.full((2, 1, 1), 0.7), restarts=5, time_limit=1e-9)
        assert not bool(solution.converged.any())
        assert "the time limit was reached" in solution.status[0]
        assert "the best of 1 starts, which led to 0 different minima" in solution.status[0]

    def test_shared_parameters_are_refused(self):
        problem = OCP(
            lambda t, x, u, p: p * x + u,
            lambda t, x, u, p: (x**2 + u**2).sum(-1),
            initial_state=[[1.0], [2.0]],
            control_dim=1,
            horizon=1.0,
            parameters=[0.0],
        )
        with pytest.raises(ProblemError, match="shared_parameters=True came with restarts=2"):
            solve(problem, steps=3, shared_parameters=True, restarts=2)


class TestSaddles:
    @pytest.mark.parametrize("kernel", ["torch", "lowered"])
    @pytest.mark.parametrize("curvature", ["auto", "exact"])
    def test_a_start_on_the_hill_is_a_saddle(self, kernel, curvature):
        solution = solve(wells(0.0), initial_guess=torch.zeros(1, 1), kernel=kernel, curvature=curvature, compile=False)
        assert bool(solution.converged)
        assert "to a saddle, from which the cost falls along some direction; start elsewhere" in solution.status

    def test_only_the_problems_at_one_say_so(self):
        problem = wells(0.0, initial_state=[[0.0], [0.0], [2.0]])
        solution = solve(problem, initial_guess=torch.tensor([[[0.0]], [[0.5]], [[-1.0]]], dtype=F64), compile=False)
        assert ["saddle" in sentence for sentence in solution.status] == [True, False, False]
        assert solution.saddle.tolist() == [True, False, False]

    def test_with_a_constraint(self):
        """Without control cost at x = 0 along the line, the other entry held by the constraint."""
        stage = Stage(lambda k, x, u: x + u, lambda k, x, u: 0.02 * (u**2).sum(-1), control_dim=2)
        problem = StagedOCP(
            stage,
            lambda x: (x[..., 0] ** 2 - 1) ** 2,
            initial_state=[0.0, 0.0],
            steps=1,
            terminal_constraint=lambda x: x[..., 1:] - 1.0,
        )
        saddle = solve(problem, initial_guess=torch.zeros(1, 2))
        assert bool(saddle.converged)
        assert "to a saddle" in saddle.status
        assert bool(saddle.saddle)
        assert "saddle" not in solve(problem, initial_guess=torch.full((1, 2), 0.5)).status

    def test_a_flat_minimum_is_none(self):
        """The second control does nothing."""
        stage = Stage(lambda k, x, u: x + u[..., :1], lambda k, x, u: (u[..., 0]) ** 2, control_dim=2)
        problem = StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=2)
        solution = solve(problem, initial_guess=torch.zeros(2, 2))
        assert bool(solution.converged)
        assert "saddle" not in solution.status

    def test_bounds_that_hold_the_control_make_none(self):
        solution = solve(wells(0.5, control_bounds=(0.0, 0.0)), initial_guess=torch.zeros(1, 1))
        assert bool(solution.converged)
        assert "saddle" not in solution.status

    @pytest.mark.parametrize("shape", [(1,), (2, 1)])
    def test_restarts_leave_it(self, shape, monkeypatch):
        """By the flag, whatever the status says."""
        monkeypatch.setattr(ddp, "sentence", lambda *told, **more: "converged")
        problem = wells(0.0, initial_state=torch.zeros(shape))
        solution = solve(problem, initial_guess=torch.zeros(*shape[:-1], 1, 1), restarts=3)
        assert not bool(solution.saddle.any())
        assert float(solution.cost.max()) == pytest.approx(float(exact_wells(0.0)[0, 0]), rel=1e-9)
