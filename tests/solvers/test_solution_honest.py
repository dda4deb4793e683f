"""What a solution says off its beaten track: at k h, outside the horizon, in rollouts that fail, of other problems."""

import dataclasses
import inspect

import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon, Horizon
from ocnopt.solvers.audit import audit
from ocnopt.solvers.solution import load_solution
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close


def drive(**options):
    settings = {"initial_state": [1.0], "control_dim": 1, "horizon": 3.0} | options
    return OCP(lambda t, x, u: torch.sin(x) + u, lambda t, x, u: (x**2).sum(-1) + (u**2).sum(-1), **settings)


class TestPolicyInTime:
    @pytest.mark.parametrize(("end", "steps"), [(3.0, 30), (0.7, 70), (1e-3, 49), (4e3, 100)])
    @pytest.mark.parametrize("start", [0.0, 10.0])
    def test_k_times_h_finds_step_k(self, end, steps, start):
        solution = solve(drive(horizon=Horizon(start, start + end)), steps=steps, max_iterations=1)
        solution = dataclasses.replace(solution, gains=None, controls=torch.arange(steps).double()[:, None])
        h = end / steps
        found = [round(float(solution.policy(start + k * h, solution.states[k]))) for k in range(steps)]
        assert found == list(range(steps))
        summed, found = start, []
        for k in range(steps):
            found.append(round(float(solution.policy(summed, solution.states[k]))))
            summed += h
        assert found[:10] == list(range(10))

    def test_a_moment_before_a_node_is_still_the_step_before(self):
        solution = solve(drive(), steps=30)
        assert_close(solution.policy(0.9 - 1e-9, solution.states[9]), solution.controls[8], rtol=1e-6)

    @pytest.mark.parametrize("free", [False, True])
    def test_outside_the_horizon_the_ends_hold(self, free):
        problem = drive(initial_state=[[1.0], [0.3]], horizon=FreeHorizon(1.0, 0.5, 2.0) if free else 1.0)
        solution = solve(problem, steps=5)
        x = torch.tensor([[0.4], [0.2]]).double()
        for late in (1e-3, 1.0, 1e6):
            end = solution.controls[:, -1] + (solution.gains.K[:, -1] @ (x - solution.states[:, -1])[..., None])[..., 0]
            assert_close(solution.policy(solution.horizon + late, x), end, rtol=1e-12)
            begin = solution.controls[:, 0] + (solution.gains.K[:, 0] @ (x - solution.states[:, 0])[..., None])[..., 0]
            assert_close(solution.policy(-late, x), begin, rtol=1e-12)


class TestRolloutViolation:
    def solved(self, **options):
        constraint = {"path_constraint": lambda t, x, u: x - 2.0, "terminal_constraint": lambda t, x: x - 0.5}
        return solve(drive(horizon=1.0, **(constraint | options)), "casadi", steps=8)

    def test_on_the_path_there_is_none(self):
        assert float(self.solved().rollout(torch.tensor([1.0])).constraint_violation) < 1e-8

    def test_terminal_and_path_constraints(self):
        rollout = self.solved().rollout(torch.tensor([3.0]))
        ends = max(float((rollout.states[-1] - 0.5).abs()), float(rollout.states.max()) - 2.0)
        assert_close(rollout.constraint_violation, ends, rtol=1e-12)
        path = self.solved(terminal_constraint=None).rollout(torch.tensor([3.0]))
        assert_close(path.constraint_violation, path.states.max() - 2.0, rtol=1e-12)

    def test_bounds_of_parameters(self):
        problem = OCP(
            lambda t, x, u, p: u + p,
            lambda t, x, u, p: (x**2).sum(-1) + (u**2).sum(-1) + (p[..., 0] - 3) ** 2,
            initial_state=[1.0],
            control_dim=1,
            horizon=1.0,
            parameters=[0.5],
            parameter_bounds=(0.0, 1.0),
        )
        solution = solve(problem, steps=4)
        assert float(solution.rollout(torch.ones(1)).constraint_violation) == 0.0
        moved = dataclasses.replace(solution, parameters=torch.tensor([4.0]).double())
        assert float(moved.rollout(torch.ones(1)).constraint_violation) == 3.0

    def test_sizes_that_vary_and_batches(self):
        stages = [
            Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
            Stage(lambda k, x, u: x[..., :1] + 2 * u, lambda k, x, u: 3 + 0 * u[..., 0], 1),
        ]
        problem = StagedOCP(
            stages,
            lambda x: x.sum(-1),
            initial_state=torch.ones(4, 1),
            control_bounds=(-1.0, 1.0),
            path_constraint=lambda k, x, u: x - 5.0 - k,
        )
        states = [torch.ones(4, 1).double(), torch.ones(4, 2).double(), 8 * torch.ones(4, 1).double()]
        controls = [torch.tensor([[0.0], [1.0], [2.5], [0.0]]).double(), torch.zeros(4, 1).double()]
        found = audit(problem, states, controls, problem.start_parameters())
        assert_close(found.cost, 11 + torch.tensor([0.0, 1.0, 6.25, 0.0]).double())
        assert_close(found.gaps, 7 + torch.tensor([1.0, 0.0, 1.5, 1.0]).double())
        assert_close(found.violation, [1.0, 1.0, 1.5, 1.0])


class TestRolloutToInfinity:
    def stiff(self, **options):
        problem = OCP(
            lambda t, x, u: -3000.0 * (x - u),
            lambda t, x, u: ((x - 1) ** 2).sum(-1) + 0.01 * (u**2).sum(-1),
            initial_state=[0.0],
            control_dim=1,
            horizon=1.0,
            **options,
        )
        return solve(problem, "casadi", steps=100, method="collocation")

    def test_a_stiff_plan_of_collocation(self):
        solution = self.stiff()
        message = r"left the finite numbers at t = 0\.\d+ \(node \d+ of 100\); expected finite states: take more steps"
        with pytest.raises(oc.NonFiniteError, match=message):
            solution.rollout(torch.ones(1))

    def test_in_a_batch_the_status_names_the_problem(self):
        problem = OCP(
            lambda t, x, u: x**3 + u,
            lambda t, x, u: (u**2).sum(-1) + x[..., 0],
            initial_state=[[0.1], [0.2]],
            control_dim=1,
            horizon=1.0,
        )
        rollout = solve(problem, steps=10).rollout(torch.tensor([[0.1], [100.0]]))
        assert rollout.status[0] == "closed-loop rollout of a policy; nothing was optimised"
        assert "left the finite numbers at t = 0." in rollout.status[1]


class TestFingerprint:
    @pytest.fixture
    def path(self, tmp_path):
        solve(drive(), steps=6).save(tmp_path / "solution.pt")
        return tmp_path / "solution.pt"

    def test_the_same_problem_built_again(self, path):
        assert load_solution(path, transcribe(drive(), 6)).rollout(torch.ones(1)).cost > 0

    def test_every_solver(self, tmp_path):
        problem = drive(horizon=FreeHorizon(1.0, 0.5, 2.0), control_bounds=(-1.0, 1.0), initial_state=[[1.0], [0.5]])
        for options in ({"solver": "ddp"}, {"solver": "casadi"}, {"solver": "casadi", "method": "collocation"}):
            solve(problem, steps=6, **options).save(tmp_path / "one.pt")
            assert load_solution(tmp_path / "one.pt", transcribe(problem, 6)).problem is not None

    @pytest.mark.parametrize(
        ("other", "what"),
        [
            (lambda: transcribe(drive(horizon=2.0), 6), "by its times"),
            (lambda: transcribe(drive(initial_state=[1.1]), 6), "by its initial state"),
            (lambda: transcribe(drive(control_bounds=(-9.0, 9.0)), 6), "by its bounds"),
            (lambda: transcribe(drive(terminal_cost=lambda t, x: x.sum(-1)), 6), "by its cost"),
            (lambda: transcribe(drive(terminal_constraint=lambda t, x: x + 9), 6), "by its constraints"),
            (lambda: transcribe(drive(), 6, "euler"), "by its cost"),
            (lambda: transcribe(drive(), 7), "of a problem of other sizes"),
            (
                lambda: transcribe(drive(initial_state=[1.0, 1.0]), 6),
                "of a problem of other sizes|by its initial state",
            ),
        ],
    )
    def test_another_problem(self, path, other, what):
        with pytest.raises(
            oc.DataError, match=rf"solution.pt holds the solution .*({what}).*; expected the problem it was"
        ):
            load_solution(path, other())

    def test_other_dynamics(self, tmp_path):
        def staged(speed):
            return StagedOCP(Stage(lambda k, x, u: x + speed * u, control_dim=1), initial_state=[1.0], steps=3)

        solve(staged(1.0), steps=3, initial_guess=torch.ones(3, 1)).save(tmp_path / "one.pt")
        with pytest.raises(oc.DataError, match="another problem, by its dynamics"):
            load_solution(tmp_path / "one.pt", staged(1.001))

    def test_saved_without_a_problem(self, path, tmp_path):
        load_solution(path).save(tmp_path / "again.pt")
        assert load_solution(tmp_path / "again.pt").cost > 0
        with pytest.raises(oc.DataError, match="saved by a solution without its problem, so nothing tells whether"):
            load_solution(tmp_path / "again.pt", transcribe(drive(), 6))

    def test_a_continuous_problem(self, path):
        with pytest.raises(oc.ProblemError, match=r"problem is OCP; expected the discrete one: oc.transcribe\(problem"):
            inspect.unwrap(load_solution)(path, drive())


class TestWriting:
    def test_a_path_that_is_a_folder(self, tmp_path):
        solution = solve(drive(), steps=3)
        (tmp_path / "one.png").mkdir()
        with pytest.raises(oc.DataError, match=r"cannot be written \(.*\); expected a file in a folder that you may"):
            solution.save(tmp_path)
        with pytest.raises(
            oc.DataError, match=r"cannot be written \(.*\); expected a picture whose ending names its f"
        ):
            solution.plot(tmp_path / "one.png")

    def test_an_unknown_kind_of_picture(self, tmp_path):
        with pytest.raises(
            oc.DataError, match=r"one.colour cannot be written \(.*colour.*\); expected a picture whose"
        ):
            solve(drive(), steps=3).plot(tmp_path / "one.colour")

    def test_a_picture_in_no_folder(self, tmp_path):
        with pytest.raises(oc.DataError, match="one.png lies in no folder; expected one that exists: create"):
            solve(drive(), steps=3).plot(tmp_path / "nowhere" / "one.png")


class TestPlot:
    def test_without_staged_controls(self, tmp_path):
        problem = OCP(lambda t, x, u: -x, None, lambda t, x: (x**2).sum(-1), initial_state=[1.0], horizon=1.0)
        figure = solve(problem, steps=3).plot(tmp_path / "one.png")
        # a state and the convergence of the cost, no empty panel for controls
        assert len(figure.axes) == 2
        assert (tmp_path / "one.png").stat().st_size > 0

    def test_the_last_control_is_drawn_to_the_end(self):
        solution = solve(drive(), steps=3)
        times, values = solution.plot().axes[1].lines[0].get_data()
        assert_close(torch.as_tensor(times), solution.times)
        assert_close(torch.as_tensor(values), torch.cat([solution.controls[:, 0], solution.controls[-1:, 0]]))
