"""A solution as a record: its shapes, its policy, closed-loop rollouts, files."""

import dataclasses
import inspect
import math

import pytest
import torch

import ocnopt as oc
from ocnopt.ocp import OCP, FreeHorizon, Horizon
from ocnopt.paths import rollout
from ocnopt.solvers.solution import Solution, load_solution
from ocnopt.solvers.solve import solve
from ocnopt.staged import Stage, StagedOCP
from tests.oracles.compare import assert_close

STEPS = 8


def swing(**options):
    settings = {"initial_state": [0.8, 0.1], "control_dim": 1, "horizon": Horizon(0.5, 2.0)} | options
    return OCP(
        lambda t, x, u, *p: torch.stack(
            [x[..., 1], u[..., 0] - torch.sin(x[..., 0]) + sum(v[..., 0] for v in p)], dim=-1
        ),
        lambda t, x, u, *p: (x**2).sum(-1) + 0.1 * (u**2).sum(-1) + sum((v**2).sum(-1) for v in p),
        lambda t, x, *p: t + 3 * (x**2).sum(-1),
        **settings,
    )


CASES = {
    "single": {},
    "bounded": {"control_bounds": (-0.5, 0.5)},
    "batch": {"initial_state": torch.tensor([[0.8, 0.1], [-0.5, 0.3], [0.1, 0.0]])},
    "grid": {"initial_state": torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0))},
    "parameters": {"parameters": [0.2]},
    "free": {
        "initial_state": [[0.8, 0.1], [-1.5, 0.3]],
        "horizon": FreeHorizon(2.0, 1.0, 4.0, t0=0.5),
        "parameters": [0.2],
    },
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def solution(request):
    return solve(swing(**CASES[request.param]), steps=STEPS)


def test_shapes_are_those_of_the_contract(solution):
    problem = solution.problem.origin.problem
    batch, q = problem.batch_shape, problem.parameter_dim
    assert bool(solution.converged.all())
    expected = {
        "times": (*batch, STEPS + 1),
        "states": (*batch, STEPS + 1, 2),
        "controls": (*batch, STEPS, 1),
        "parameters": (*batch, q),
        "horizon": batch,
        "cost": batch,
        "converged": batch,
        "iterations": batch,
        "costates": (*batch, STEPS + 1, 2),
        "constraint_violation": batch,
    }
    assert {name: tuple(getattr(solution, name).shape) for name in expected} == expected
    assert tuple(solution.gains.k.shape) == (*batch, STEPS, 1)
    assert tuple(solution.gains.K.shape) == (*batch, STEPS, 1, 2)
    assert isinstance(solution.status, list if batch else str)
    assert {key: tuple(value.shape[1:]) for key, value in solution.history.items()} == dict.fromkeys(
        ("cost", "step", "regularisation"), batch
    )
    assert (solution.converged.dtype, solution.iterations.dtype) == (torch.bool, torch.int64)


def test_times_run_from_start_to_end(solution):
    assert_close(solution.times[..., 0], torch.full_like(solution.horizon, 0.5))
    assert_close(solution.times[..., -1], solution.horizon)
    gaps = solution.times.diff(dim=-1)
    assert_close(gaps, gaps[..., :1].expand_as(gaps), rtol=1e-12)


def test_a_solution_is_frozen(solution):
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.cost = 0.0


class TestPolicy:
    def test_at_the_nodes_it_is_the_solution(self, solution):
        for k in range(STEPS):
            u = solution.policy(solution.times[..., k], solution.states[..., k, :])
            assert_close(u, solution.controls[..., k, :], rtol=1e-14)

    def test_off_the_path_it_feeds_back(self, solution):
        k, dx = 3, torch.tensor([1e-3, -2e-3]).double()
        u = solution.policy(solution.times[..., k], solution.states[..., k, :] + dx)
        expected = solution.controls[..., k, :] + solution.gains.K[..., k, :, :] @ dx
        if solution.control_bounds is not None:
            expected = expected.clamp(*solution.control_bounds)
        assert_close(u, expected, rtol=1e-12)

    def test_between_nodes_the_nominal_state_is_linear(self, solution):
        k, share = 2, 0.25
        t = (1 - share) * solution.times[..., k] + share * solution.times[..., k + 1]
        x = (1 - share) * solution.states[..., k, :] + share * solution.states[..., k + 1, :]
        assert_close(solution.policy(t, x), solution.controls[..., k, :], rtol=1e-12)

    def test_the_end_belongs_to_the_last_step(self, solution):
        u = solution.policy(solution.times[..., -1], solution.states[..., -1, :])
        assert_close(u, solution.controls[..., -1, :], rtol=1e-12)

    def test_without_gains_it_is_open_loop(self, solution):
        open_loop = dataclasses.replace(solution, gains=None)
        u = open_loop.policy(solution.times[..., 3], solution.states[..., 3, :] + 1.0)
        assert_close(u, solution.controls[..., 3, :])

    def test_bounds_hold_everywhere(self):
        solution = solve(swing(**CASES["bounded"]), steps=STEPS)
        far = torch.tensor([10.0, 10.0]).double()
        assert float(solution.policy(0.6, far).abs()) == 0.5

    def test_one_time_serves_a_batch(self):
        solution = solve(swing(**CASES["batch"]), steps=STEPS)
        x = solution.states[:, 2]
        t = float(solution.times[0, 2])
        assert_close(solution.policy(t, x), solution.controls[:, 2])
        for i in range(3):
            assert_close(solution.policy(t, x + 0.1)[i], solution.policy(torch.full((3,), t), x + 0.1)[i])

    def test_a_state_of_another_size(self, solution):
        with pytest.raises(oc.ProblemError, match=r"policy got a state of shape \(3,\); expected \(..., 2\)"):
            solution.policy(1.0, torch.zeros(3))

    def test_a_state_of_another_batch(self):
        solution = solve(swing(**CASES["batch"]), steps=STEPS)
        with pytest.raises(oc.ProblemError, match=r"of shape \(4, 2\); expected \(..., 2\) .*fit the batch \(3,\)"):
            solution.policy(1.0, torch.zeros(4, 2))
        assert solution.policy(1.0, torch.zeros(5, 3, 2)).shape == (5, 3, 1)

    def test_a_state_of_plain_numbers(self):
        solution = solve(swing(), steps=STEPS)
        unwrapped = inspect.unwrap(type(solution).policy)
        expected = solution.policy(0.3, torch.tensor([0.1, 0.2], dtype=torch.float64))
        assert_close(unwrapped(solution, 0.3, [0.1, 0.2]), expected, rtol=0.0)
        with pytest.raises(oc.ProblemError, match="the state of a policy is str; expected numbers or a tensor"):
            unwrapped(solution, 0.3, "here")
        with pytest.raises(oc.ProblemError, match="the time of a policy is str; expected numbers or a tensor"):
            unwrapped(solution, "now", [0.1, 0.2])

    def test_a_time_that_is_none(self, solution):
        with pytest.raises(oc.ProblemError, match="policy got the time nan; expected numbers: look for what made"):
            solution.policy(math.nan, solution.states[..., 0, :])

    def test_too_many_times(self, solution):
        with pytest.raises(
            oc.ProblemError, match=r"policy got times of shape \(7,\); expected one number, or one for each"
        ):
            solution.policy(torch.zeros(7), solution.states[..., 0, :])


class TestRollout:
    def test_from_the_same_state_it_is_the_same_path(self, solution):
        again = solution.rollout(solution.states[..., 0, :])
        assert_close(again.states, solution.states, rtol=1e-12, atol=1e-13)
        assert_close(again.controls, solution.controls, rtol=1e-12, atol=1e-13)
        assert_close(again.cost, solution.cost, rtol=1e-12)

    def test_from_another_state_it_is_a_closed_loop_path_of_the_problem(self, solution):
        start = solution.states[..., 0, :] + 0.05
        moved = solution.rollout(start)
        controls = moved.controls.unbind(-2)
        p = moved.parameters
        if solution.problem.origin.free:
            p = torch.cat([p, moved.horizon[..., None]], dim=-1)
        path = rollout(solution.problem, controls, start, p)
        assert_close(moved.states, path.states.movedim(0, -2), rtol=1e-14)
        assert_close(moved.cost, path.cost, rtol=1e-14)
        feedback = solution.policy(solution.times[..., 4], moved.states[..., 4, :])
        assert_close(moved.controls[..., 4, :], feedback, rtol=1e-14)

    def test_it_claims_nothing(self, solution):
        moved = solution.rollout(solution.states[..., 0, :])
        assert not bool(moved.converged.any())
        assert moved.status == "closed-loop rollout of a policy; nothing was optimised"
        assert int(moved.iterations.sum()) == 0

    def test_a_disturbance_that_writes_into_the_state_changes_nothing(self, solution):
        still = solution.rollout(solution.states[..., 0, :])

        def writes(t, x):
            x.mul_(2.0)
            return torch.zeros_like(x)

        assert_close(solution.rollout(solution.states[..., 0, :], writes).states, still.states, 0)

    def test_a_disturbance_moves_the_state_after_each_step(self, solution):
        push = torch.tensor([0.0, 0.01]).double()
        seen = []

        def disturbance(t, x):
            seen.append(t)
            return push * t[..., None]

        moved = solution.rollout(solution.states[..., 0, :], disturbance)
        assert_close(torch.stack(seen, dim=-1), solution.times[..., 1:])
        first = solution.states[..., 1, :] + push * solution.times[..., 1, None]
        assert_close(moved.states[..., 1, :], first, rtol=1e-12)

    @pytest.mark.parametrize(
        ("returned", "came"),
        [(None, "NoneType"), (0.1, "float"), (torch.ones(3), r"shape \(3,\)"), (torch.ones(7, 2), r"shape \(7, 2\)")],
    )
    def test_a_disturbance_of_another_shape(self, solution, returned, came):
        with pytest.raises(
            oc.ProblemError, match=rf"disturbance\(t, x\) returned {came}; expected shape \(.*2,?\), what"
        ):
            inspect.unwrap(type(solution).rollout)(solution, solution.states[..., 0, :], lambda t, x: returned)

    def test_one_disturbance_serves_a_batch(self, solution):
        start, push = solution.states[..., 0, :], torch.tensor([0.0, 0.01])
        one, each = (solution.rollout(start, f) for f in (lambda t, x: push, lambda t, x: push.to(x).expand(x.shape)))
        assert_close(one.states, each.states, rtol=0.0)

    def test_what_is_no_disturbance(self, solution):
        with pytest.raises(oc.ProblemError, match="disturbance is float; expected a function"):
            inspect.unwrap(type(solution).rollout)(solution, solution.states[..., 0, :], 0.1)

    def test_a_start_that_is_none(self, solution):
        with pytest.raises(oc.ProblemError, match="the initial state of a rollout is str; expected numbers"):
            inspect.unwrap(type(solution).rollout)(solution, "here")

    @pytest.mark.parametrize("shape", [(3,), (7, 2), (2, 1)])
    def test_a_start_of_another_shape(self, solution, shape):
        with pytest.raises(oc.ProblemError, match=r"rollout got an initial state of shape .*; expected .*\(2,\)"):
            solution.rollout(torch.zeros(shape))

    def test_feedback_beats_open_loop(self):
        solution = solve(swing(), steps=STEPS)
        start = solution.states[0] + torch.tensor([0.2, -0.2]).double()
        closed = solution.rollout(start)
        free = dataclasses.replace(solution, gains=None).rollout(start)
        best = solve(swing(initial_state=start), steps=STEPS)
        assert best.cost < closed.cost < free.cost

    def test_one_state_serves_a_batch(self):
        solution = solve(swing(**CASES["batch"]), steps=STEPS)
        assert solution.rollout(torch.zeros(2)).states.shape == (3, STEPS + 1, 2)

    def test_sizes_that_vary_have_no_policy_in_time(self):
        stages = [
            Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
            Stage(lambda k, x, u: x, None, 0),
        ]
        solution = solve(StagedOCP(stages, lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5]))
        with pytest.raises(
            oc.ProblemError, match="sizes vary from stage to stage here; expected one state and one control"
        ):
            solution.policy(0.0, torch.zeros(1))


class TestFiles:
    def test_round_trip(self, solution, tmp_path):
        path = tmp_path / "solution.pt"
        solution.save(path)
        loaded = load_solution(path, solution.problem)
        for field in dataclasses.fields(Solution):
            ours, theirs = getattr(loaded, field.name), getattr(solution, field.name)
            if isinstance(theirs, torch.Tensor):
                assert_close(ours, theirs, rtol=0.0)
                assert ours.dtype == theirs.dtype
        assert loaded.status == solution.status
        assert (loaded.wall_time, loaded.build_time) == (solution.wall_time, solution.build_time)
        for key, values in solution.history.items():
            assert_close(loaded.history[key], values, rtol=0.0)
        assert_close(loaded.gains.K, solution.gains.K, rtol=0.0)
        x = solution.states[..., 3, :] + 0.1
        assert_close(loaded.policy(solution.times[..., 3], x), solution.policy(solution.times[..., 3], x), rtol=0.0)
        assert_close(loaded.rollout(x).states, solution.rollout(x).states, rtol=0.0)

    def test_sizes_that_vary_round_trip(self, tmp_path):
        stages = [
            Stage(lambda k, x, u: torch.cat([x, u], dim=-1), lambda k, x, u: (u**2).sum(-1), 1),
            Stage(lambda k, x, u: x, None, 0),
        ]
        solution = solve(StagedOCP(stages, lambda x: ((x - 1) ** 2).sum(-1), initial_state=[0.5]))
        solution.save(tmp_path / "solution.pt")
        loaded = load_solution(tmp_path / "solution.pt")
        assert [x.tolist() for x in loaded.states] == [x.tolist() for x in solution.states]
        assert [K.tolist() for K in loaded.gains.K] == [K.tolist() for K in solution.gains.K]

    def test_without_the_problem_there_is_no_rollout(self, solution, tmp_path):
        solution.save(tmp_path / "solution.pt")
        loaded = load_solution(tmp_path / "solution.pt")
        assert (
            loaded.policy(solution.times[..., 0], solution.states[..., 0, :]).shape
            == solution.controls[..., 0, :].shape
        )
        with pytest.raises(
            oc.ProblemError, match=r"no problem to run; load it with oc.load_solution\(path, problem=...\)"
        ):
            loaded.rollout(solution.states[..., 0, :])

    def test_a_folder_that_does_not_exist(self, solution, tmp_path):
        with pytest.raises(
            oc.DataError, match="solution.pt lies in no folder; expected one that exists: create .*nowhere first"
        ):
            solution.save(tmp_path / "nowhere" / "solution.pt")

    def test_missing(self, tmp_path):
        with pytest.raises(oc.DataError, match=r"nothing.pt does not exist; expected a file written by Solution.save"):
            load_solution(tmp_path / "nothing.pt")

    @pytest.mark.parametrize("content", [b"", b"not a solution at all", b"PK\x03\x04broken"])
    def test_corrupt(self, tmp_path, content):
        path = tmp_path / "solution.pt"
        path.write_bytes(content)
        with pytest.raises(
            oc.DataError, match=r"solution.pt is no saved solution \(.*\); expected a file written by Sol"
        ):
            load_solution(path)

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_truncated(self, tmp_path, share):
        path = tmp_path / "solution.pt"
        solve(swing(), steps=2).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: math.floor(share * len(content))])
        with pytest.raises(oc.DataError, match="is no saved solution"):
            load_solution(path)

    @pytest.mark.parametrize(
        "content", [{"cost": torch.ones(1)}, [1, 2], {"format": 2, "gains": None, "colour": "red"}]
    )
    def test_another_kind_of_file(self, tmp_path, content):
        torch.save(content, tmp_path / "solution.pt")
        with pytest.raises(oc.DataError, match="is no saved solution"):
            load_solution(tmp_path / "solution.pt")

    def test_another_format(self, tmp_path):
        torch.save({"format": 99}, tmp_path / "solution.pt")
        with pytest.raises(oc.DataError, match="has another format than 2; expected a file written by this version"):
            load_solution(tmp_path / "solution.pt")

    def test_a_file_cannot_run_code(self, tmp_path):
        torch.save({"format": 2, "run": math.sin}, tmp_path / "solution.pt")
        with pytest.raises(oc.DataError, match="is no saved solution"):
            load_solution(tmp_path / "solution.pt")


def test_a_problem_that_was_discrete_counts_steps():
    stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (x**2).sum(-1) + (u**2).sum(-1), 1)
    solution = solve(StagedOCP(stage, initial_state=[1.0], steps=4))
    assert_close(solution.times, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert solution.horizon.item() == 4.0
    again = solution.rollout(torch.ones(1))
    assert_close(again.states, solution.states, rtol=1e-12)
