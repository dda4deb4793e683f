"""Discrete problems: transcription against hand-written steps, static controls as states, rollouts, every refusal."""

import dataclasses
import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt import checks
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon, Horizon
from ocnopt.paths import Widened, rollout, walk
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close


def slope(t, x, u):
    return torch.stack([x[..., 1], -torch.sin(x[..., 0]) * t + u[..., 0]], dim=-1)


def price(t, x, u):
    return t * (x**2).sum(-1) + u[..., 0] ** 2


def with_cost(t, y, u):
    """The state and the cost so far as one system."""
    return torch.cat([slope(t, y[..., :2], u), price(t, y[..., :2], u)[..., None]], dim=-1)


def euler(f, t, h, y):
    return y + h * f(t, y)


def midpoint(f, t, h, y):
    return y + h * f(t + h / 2, y + h / 2 * f(t, y))


def rk4(f, t, h, y):
    k1 = f(t, y)
    k2 = f(t + h / 2, y + h / 2 * k1)
    k3 = f(t + h / 2, y + h / 2 * k2)
    k4 = f(t + h, y + h * k3)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@pytest.mark.parametrize("step", [euler, midpoint, rk4])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_transcription_integrates_the_cost_with_the_same_stages(step, batch):
    problem = OCP(
        slope,
        price,
        lambda t, x: t * x[..., 0],
        initial_state=torch.rand(*batch, 2),
        control_dim=1,
        horizon=Horizon(0.5, 2.0),
    )
    staged = transcribe(problem, 5, integrator=step.__name__)
    controls = torch.rand(5, *batch, 1).double()
    path = rollout(staged, lambda k, x: controls[k], staged.initial_state)
    h, y = 0.3, torch.cat([staged.initial_state, torch.zeros(*batch, 1).double()], dim=-1)
    for k in range(5):
        y = step(partial(lambda u, t, y: with_cost(t, y, u), controls[k]), 0.5 + k * h, h, y)
        assert_close(path.states[k + 1], y[..., :2], rtol=1e-12)
    assert_close(path.cost, y[..., 2] + 2.0 * y[..., 0], rtol=1e-12)


def test_many_steps_at_once_are_each_step_alone():
    problem = OCP(
        slope,
        price,
        initial_state=[1.0, 0.5],
        control_dim=1,
        horizon=Horizon(0.1, 0.8),
        path_constraint=lambda t, x, u: (t * x[..., 0])[..., None],
    )
    staged = transcribe(problem, 7)
    (group,) = staged.groups
    x, u, p = torch.rand(7, 2).double(), torch.rand(7, 1).double(), staged.start_parameters()
    together = staged.advance(group.stage, torch.arange(7), x, u, p)
    constraints = staged.path_constraint(torch.arange(7), x, u)
    for k in range(7):
        assert_close(constraints[k], staged.path_constraint(k, x[k], u[k]), rtol=1e-14)
        alone = staged.advance(group.stage, k, x[k], u[k], p)
        assert_close(together[0][k], alone[0], rtol=1e-14)
        assert_close(together[1][k], alone[1], rtol=1e-14)


def test_a_free_end_time_becomes_the_last_static_control():
    problem = OCP(
        lambda t, x, u, p: p[..., :1] * x,
        None,
        lambda t, x, p: t + x[..., 0] + p[..., 0],
        initial_state=torch.ones(3, 1),
        horizon=FreeHorizon(2.0, 1.0, 3.0),
        parameters=[0.5],
    )
    staged = transcribe(problem, 50)
    assert (staged.steps, staged.parameter_dim, staged.state_dim) == (50, 2, 1)
    assert_close(staged.start_parameters(), [[0.5, 2.0]] * 3)
    p = torch.tensor([[0.5, 2.0], [0.25, 2.0], [0.5, 3.0]]).double()
    path = rollout(staged, lambda k, x: x.new_zeros(3, 0), staged.initial_state, p)
    growth = [math.exp(a * end) for a, end in p.tolist()]
    assert_close(path.states[-1][:, 0], growth, rtol=1e-7)
    assert_close(path.cost, [end + grown + a for (a, end), grown in zip(p.tolist(), growth, strict=True)], rtol=1e-7)


def test_constraints_of_a_transcribed_problem_see_the_time_of_the_node():
    problem = OCP(
        slope,
        initial_state=[1.0, 0.5],
        control_dim=1,
        horizon=Horizon(1.0, 3.0),
        path_constraint=lambda t, x, u: torch.stack([t + x[..., 0], u[..., 0]], dim=-1),
        terminal_constraint=lambda t, x: t * x,
    )
    staged = transcribe(problem, 4)
    x = problem.initial_state
    assert_close(staged.path_constraint(2, x, torch.ones(1).double()), [3.0, 1.0])
    assert_close(staged.terminal_constraint(x), [3.0, 1.5])
    unconstrained = transcribe(OCP(slope, initial_state=[1.0, 0.5], control_dim=1, horizon=1.0), 4)
    assert unconstrained.path_constraint is None
    assert unconstrained.terminal_constraint is None


def test_terminal_constraint_with_a_free_end():
    problem = OCP(
        slope,
        initial_state=[1.0, 0.5],
        control_dim=1,
        horizon=FreeHorizon(2.0, 1.0, 3.0),
        terminal_constraint=lambda t, x: t * x,
    )
    staged = transcribe(problem, 4)
    assert_close(staged.terminal_constraint(problem.initial_state, staged.start_parameters()), [2.0, 1.0])


def test_steps_of_numpy():
    problem = OCP(slope, initial_state=[1.0, 0.5], control_dim=1, horizon=1.0)
    staged = inspect.unwrap(transcribe)(problem, np.int64(4))
    alone = build(Stage(linear, control_dim=1), initial_state=[1.0], steps=np.int64(4))
    assert (staged.steps, alone.steps) == (4, 4)
    assert type(staged.steps) is type(alone.steps) is int
    assert type(checks.whole("control_dim of a Stage", np.int64(1), 0)) is int


@pytest.mark.parametrize("steps", [0, -3, True])
def test_steps(steps):
    problem = OCP(slope, initial_state=[1.0, 0.5], control_dim=1, horizon=1.0)
    with pytest.raises(ProblemError, match=f"steps is {steps!r}; expected an integer >= 1"):
        transcribe(problem, steps)


def test_unknown_integrator():
    problem = OCP(slope, initial_state=[1.0, 0.5], control_dim=1, horizon=1.0)
    with pytest.raises(
        ProblemError, match=r"integrator 'rk5' is unknown; expected one of euler, .*radau2; did you mean 'rk4'\?"
    ):
        transcribe(problem, 4, integrator="rk5")


def linear(k, x, u):
    return 0.9 * x + u


def square(k, x, u):
    return (x**2).sum(-1) + (u**2).sum(-1)


def build(*arguments, **options):
    """A StagedOCP from arguments of types that it does not ask for."""
    problem = object.__new__(StagedOCP)
    inspect.unwrap(StagedOCP.__init__)(problem, *arguments, **options)
    return problem


class TestStagedOCP:
    def test_attributes(self):
        stage = Stage(linear, square, control_dim=2)
        problem = StagedOCP(stage, initial_state=torch.ones(3, 2), steps=4, control_bounds=(-1, [1.0, 2.0]))
        assert (problem.steps, problem.state_dim, problem.parameter_dim, problem.batch_shape) == (4, 2, 0, (3,))
        assert problem.device == torch.device("cpu")
        assert len(problem.step_bounds) == 4
        assert_close(torch.stack(problem.step_bounds[2]), [[-1.0, -1.0], [1.0, 2.0]])
        assert problem.start_parameters().shape == (3, 0)

    def test_sizes_may_vary_from_stage_to_stage(self):
        up = Stage(lambda k, x, u: torch.cat([x, u], dim=-1), square, control_dim=1)
        down = Stage(lambda k, x, u: x[..., :1] + k, None, control_dim=0)
        problem = StagedOCP([up, up, down], lambda x: 10 * x[..., 0], initial_state=[[1.0], [2.0]])
        path = rollout(problem, lambda k, x: x.new_full((2, [1, 1, 0][k]), 3.0), problem.initial_state)
        assert [x.shape[-1] for x in path.states] == [1, 2, 3, 1]
        assert_close(path.states[-1], [[3.0], [4.0]])
        assert_close(path.cost, [10 + 19 + 30, 13 + 22 + 40])

    def test_one_stage_for_all_steps_gets_k_as_a_tensor(self):
        weights = torch.arange(5).double()
        stage = Stage(lambda k, x, u: x + weights[k][..., None], lambda k, x, u: weights[k])
        problem = StagedOCP(stage, initial_state=[1.0], steps=5)
        path = rollout(problem, lambda k, x: x.new_zeros(0), problem.initial_state)
        assert_close(path.states[:, 0], [1.0, 1.0, 2.0, 4.0, 7.0, 11.0])
        assert path.cost.item() == 10.0

    def test_stages_with_parameters(self):
        stage = Stage(lambda k, x, u, p: x + p, lambda k, x, u, p: p[..., 0])
        problem = StagedOCP(
            stage,
            lambda x, p: x[..., 0] * p[..., 0],
            initial_state=torch.ones(2, 1),
            steps=3,
            parameters=[2.0],
            parameter_bounds=(0, 5),
        )
        p = torch.tensor([[2.0], [3.0]]).double()
        path = rollout(problem, lambda k, x: x.new_zeros(2, 0), problem.initial_state, p)
        assert_close(path.cost, [6.0 + 14.0, 9.0 + 30.0])
        assert_close(torch.stack(problem.parameter_bounds), [[0.0], [5.0]])

    def test_dynamics_and_cost_may_share_work(self):
        joint = Stage(None, None, 1, lambda k, x, u, p: (linear(k, x, u), square(k, x, u)))
        apart = Stage(linear, square, 1)
        x0 = torch.rand(2, 1)
        paths = []
        for stage in (joint, apart):
            problem = StagedOCP(stage, initial_state=x0, steps=3)
            paths.append(rollout(problem, lambda k, x: 0.1 * x, problem.initial_state))
        assert_close(paths[0].cost, paths[1].cost)

    def test_the_next_state_may_be_moved(self):
        problem = StagedOCP(Stage(linear, square, 1), initial_state=[1.0], steps=2)
        path = rollout(problem, lambda k, x: x.new_zeros(1), problem.initial_state, after=lambda k, x: x + k + 1)
        assert_close(path.states[:, 0], [1.0, 1.9, 3.71])
        assert_close(path.cost, 1.0 + 1.9**2)

    @pytest.mark.parametrize("steps", [None, 0, "four", 2.5])
    def test_one_stage_needs_steps(self, steps):
        with pytest.raises(ProblemError, match=f"one Stage came with steps={steps}; expected steps=N >= 1"):
            build(Stage(linear), initial_state=[1.0], steps=steps)

    def test_a_sequence_needs_none(self):
        with pytest.raises(ProblemError, match="2 stages came with steps=3; expected no steps= beside a sequence"):
            StagedOCP([Stage(linear, control_dim=1)] * 2, initial_state=[1.0], steps=3)

    @pytest.mark.parametrize("stages", [[], linear, iter([Stage(linear, control_dim=1)])])
    def test_what_is_no_sequence_of_stages(self, stages):
        with pytest.raises(
            ProblemError, match=r"stages is \w+; expected one oc.Stage with steps=N, or one oc.Stage for each"
        ):
            build(stages, initial_state=[1.0])

    def test_replace_says_what_to_do(self):
        problem = OCP(slope, initial_state=[1.0, 0.5], control_dim=1, horizon=1.0)
        for staged in (StagedOCP(Stage(linear, control_dim=1), initial_state=[1.0], steps=2), transcribe(problem, 2)):
            with pytest.raises(
                ProblemError, match=r"dataclasses.replace knows none, so write oc.StagedOCP\(..\) again"
            ):
                dataclasses.replace(staged, initial_state=[2.0])

    def test_captured_inference_tensors(self):
        with torch.inference_mode():
            rate = torch.ones(1, dtype=torch.float64)
        with pytest.raises(
            ProblemError, match=r"stage 0's dynamics.* was made under torch.inference_mode\(\): make it"
        ):
            StagedOCP(Stage(lambda k, x, u: rate * x + u, control_dim=1), initial_state=[1.0], steps=2)

    @pytest.mark.parametrize("size", [-1, True])
    def test_control_dim(self, size):
        with pytest.raises(ProblemError, match=f"control_dim of a Stage is {size}; expected an integer >= 0"):
            Stage(linear, control_dim=size)

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            (Stage(None), "stage 0's dynamics is NoneType; expected a function"),
            (
                Stage(lambda x, u: x),
                r"stage 0's dynamics\(k, x, u\) failed when called with arguments of shapes \(\), \(2,\), \(0,\)",
            ),
            (Stage(lambda k, x, u: x[..., :1]), r"stage 0's dynamics returned shape \(1,\); expected \(2,\)"),
            (
                Stage(lambda k, x, u: x.float()),
                "stage 0's dynamics returned dtype torch.float32; expected torch.float64",
            ),
            (Stage(lambda k, x, u: x.log()), "stage 0's dynamics returned nan at entry"),
            (Stage(lambda k, x, u: x + torch.rand(2)), "stage 0's dynamics gives other values"),
            (Stage(lambda k, x, u: x + x.sum()), "stage 0's dynamics gives other values"),
            (
                Stage(lambda k, x, u: x, lambda k, x, u: x[..., :1]),
                r"stage 0's cost returned shape \(1,\); expected one number",
            ),
            (Stage(lambda k, x, u: x, lambda k, x, u: x.sum()), "stage 0's cost gives other values"),
            (Stage(lambda k, x, u: x, lambda k, x, u: x.log().sum(-1)), "stage 0's cost returned nan at entry"),
        ],
    )
    def test_wrong_stages(self, stage, message):
        with pytest.raises(ProblemError, match=message):
            StagedOCP(stage, initial_state=[-1.0, -2.0], steps=2)

    def test_the_wrong_stage_of_a_sequence_is_named(self):
        good, bad = Stage(linear, square, 1), Stage(linear, lambda k, x, u: x, 1)
        with pytest.raises(
            ProblemError, match=r"stage 1's cost returned shape \(3, 1\); expected one number per state, shape \(3,\)"
        ):
            StagedOCP([good, bad, good], initial_state=torch.ones(3, 1))

    def test_wrong_terminal_cost(self):
        with pytest.raises(ProblemError, match=r"terminal_cost returned shape \(1,\); expected one number per state"):
            StagedOCP(Stage(linear, control_dim=1), lambda x: x, initial_state=[1.0], steps=2)
        with pytest.raises(ProblemError, match=r"terminal_cost\(x, p\) failed .*takes \(x, p\)"):
            StagedOCP(Stage(lambda k, x, u, p: x), lambda x: 0.0, initial_state=[1.0], steps=2, parameters=[1.0])

    def test_wrong_bounds(self):
        with pytest.raises(ProblemError, match=r"control_bounds is .*; expected a pair"):
            StagedOCP(Stage(linear, control_dim=1), initial_state=[1.0], steps=2, control_bounds=3.0)


@given(
    batch=st.lists(st.integers(1, 3), max_size=2).map(tuple),
    n=st.integers(1, 3),
    q=st.integers(0, 2),
    free=st.booleans(),
)
def test_static_controls_as_states_change_no_path(batch, n, q, free):
    problem = OCP(
        lambda t, x, u, *p: -x * t[..., None] + u + sum(v.sum(-1, keepdim=True) for v in p),
        lambda t, x, u, *p: (x**2).sum(-1),
        lambda t, x, *p: t * x.sum(-1),
        initial_state=torch.rand(*batch, n),
        control_dim=1,
        horizon=FreeHorizon(1.0, 0.5, 2.0) if free else 1.0,
        parameters=torch.rand(q) if q else None,
    )
    staged = transcribe(problem, 3, "midpoint")
    wide = Widened(staged)
    count = q + int(free)
    assert (wide.n, wide.q) == (n + count, count)
    p = staged.start_parameters() + 0.1
    controls = torch.rand(3, *batch, 1).double()
    narrow_path = rollout(staged, lambda k, x: controls[k], staged.initial_state, p)
    wide_path = walk(wide, lambda k, x: controls[k], torch.cat([staged.initial_state, p], dim=-1))
    assert_close(wide_path.cost, narrow_path.cost)
    for z, x in zip(wide_path.states, narrow_path.states, strict=True):
        assert_close(z, torch.cat([x, p], dim=-1))


class TestConstraintsAreChecked:
    """A discrete problem's own constraints, at both ends of the path."""

    def make(self, **options):
        return StagedOCP(Stage(lambda k, x, u: x + u, control_dim=1), initial_state=[1.0], steps=3, **options)

    def test_what_is_no_function(self):
        for name in ("path_constraint", "terminal_constraint"):
            with pytest.raises(ProblemError, match=f"{name} is int; expected a function of plain torch code"):
                inspect.unwrap(StagedOCP.__init__)(
                    object.__new__(StagedOCP), Stage(lambda k, x, u: x), initial_state=[1.0], steps=3, **{name: 3}
                )

    def test_wrong_shapes(self):
        with pytest.raises(ProblemError, match=r"path_constraint returned shape \(\); expected \(\) and one last axis"):
            self.make(path_constraint=lambda k, x, u: x[..., 0])
        with pytest.raises(ProblemError, match=r"terminal_constraint returned shape \(\); expected \(\) and one last"):
            self.make(terminal_constraint=lambda x: x[..., 0])

    def test_wrong_arguments(self):
        with pytest.raises(ProblemError, match=r"path_constraint\(k, x, u\) failed when called"):
            self.make(path_constraint=lambda x: x)
        with pytest.raises(ProblemError, match=r"terminal_constraint\(x\) failed when called"):
            self.make(terminal_constraint=lambda k, x: x)

    def test_at_the_end_too(self):
        with pytest.raises(ProblemError, match="path_constraint returned inf at entry"):
            self.make(path_constraint=lambda k, x, u: x / (k - 3)[..., None])

    def test_sizes_that_vary(self):
        stages = [
            Stage(lambda k, x, u: torch.cat([x, u], dim=-1), control_dim=1),
            Stage(lambda k, x, u: x[..., :1], control_dim=2),
        ]
        seen = []

        def constraint(k, x, u):
            seen.append((k, x.shape[-1], u.shape[-1]))
            return x - 5

        StagedOCP(stages, initial_state=[0.5], path_constraint=constraint, terminal_constraint=lambda x: x - 1)
        assert set(seen) == {(0, 1, 1), (2, 1, 2)}

    def test_parameters_outside_their_bounds(self):
        stage = Stage(lambda k, x, u, p: x + p)
        with pytest.raises(
            ProblemError, match=r"parameters\[0\] is 2.0, outside its bounds \[0.0, 1.0\]; expected a start"
        ):
            StagedOCP(stage, initial_state=[1.0], steps=3, parameters=[2.0], parameter_bounds=(0.0, 1.0))
