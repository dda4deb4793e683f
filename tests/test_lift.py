"""The one form of a continuous problem: on unit time where T is free, every function of (t, x, u, p)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon, Horizon, lift
from ocnopt.paths import Widened, step_numbers
from ocnopt.staged import Stage, StagedOCP, transcribe
from tests.oracles.compare import assert_close

T0, T = 0.5, 2.0


def dynamics(t, x, u, p):
    return t[..., None] * x + u * p[..., :1]


def running_cost(t, x, u, p):
    return t * (x**2).sum(-1) + p[..., 1]


def terminal_cost(t, x, p):
    return t**2 + x[..., 0] * p[..., 0]


def make(horizon, **options):
    settings = {"initial_state": [1.0, 2.0], "control_dim": 2, "parameters": [3.0, 4.0]} | options
    return lift(OCP(dynamics, running_cost, terminal_cost, horizon=horizon, **settings))


@pytest.fixture
def free():
    return make(FreeHorizon(T, 1.0, 5.0, t0=T0), parameter_bounds=(0.0, [5.0, 6.0]))


@pytest.fixture
def fixed():
    return make(Horizon(T0, T))


def test_a_fixed_horizon_changes_nothing(fixed):
    x, u, p = torch.rand(4, 2).double(), torch.rand(4, 2).double(), fixed.parameters
    t = torch.rand(4).double()
    assert (fixed.t0, fixed.t1, fixed.free, fixed.parameter_dim) == (T0, T, False, 2)
    assert_close(fixed.dynamics(t, x, u, p), dynamics(t, x, u, p))
    assert_close(fixed.running_cost(t, x, u, p), running_cost(t, x, u, p))
    assert_close(fixed.terminal_cost(x, p), terminal_cost(torch.tensor(T).double(), x, p))
    assert fixed.parameter_bounds is None
    assert_close(fixed.times(3, p), [0.5, 1.0, 1.5, 2.0])


def test_a_free_end_time_is_the_last_parameter(free):
    assert (free.t0, free.t1, free.free, free.parameter_dim) == (0.0, 1.0, True, 3)
    assert_close(free.parameters, [3.0, 4.0, T])
    assert_close(torch.stack(free.parameter_bounds), [[0.0, 0.0, 1.0], [5.0, 6.0, 5.0]])
    user, end = free.split(free.parameters)
    assert_close(user, [3.0, 4.0])
    assert end.item() == T
    assert_close(free.times(3, free.parameters), [0.5, 1.0, 1.5, 2.0])


def test_on_unit_time_slopes_and_costs_are_stretched(free):
    x, u, p = torch.rand(4, 2).double(), torch.rand(4, 2).double(), free.parameters
    s = torch.rand(4).double()
    t, scale = T0 + (T - T0) * s, T - T0
    assert_close(free.dynamics(s, x, u, p), scale * dynamics(t, x, u, p[:2]))
    assert_close(free.running_cost(s, x, u, p), scale * running_cost(t, x, u, p[:2]))
    assert_close(free.terminal_cost(x, p), terminal_cost(torch.tensor(T).double(), x, p[:2]))


def test_each_problem_of_a_batch_has_its_own_end(free):
    p = torch.tensor([[3.0, 4.0, 2.0], [1.0, 0.0, 3.0]]).double()
    x, u = torch.rand(2, 2).double(), torch.rand(2, 2).double()
    for i in range(2):
        assert_close(free.dynamics(0.25, x, u, p)[i], free.dynamics(0.25, x[i], u[i], p[i]))
        assert_close(free.running_cost(0.25, x, u, p)[i], free.running_cost(0.25, x[i], u[i], p[i]))
        assert_close(free.terminal_cost(x, p)[i], free.terminal_cost(x[i], p[i]))
    assert_close(free.times(2, p), [[0.5, 1.25, 2.0], [0.5, 1.75, 3.0]])


def test_the_derivative_in_the_end_time_is_the_slope_there():
    problem = lift(OCP(lambda t, x, u: -x, initial_state=[1.0], horizon=FreeHorizon(1.5, 1.0, 2.0)))
    end = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    x, steps = problem.initial_state, 200
    for k in range(steps):
        middle = x + 0.5 / steps * problem.dynamics(k / steps, x, x.new_zeros(0), end)
        x = x + problem.dynamics((k + 0.5) / steps, middle, x.new_zeros(0), end) / steps
    (slope,) = torch.autograd.grad(x.sum(), end)
    assert_close(slope, [-math.exp(-1.5)], rtol=1e-4)


def test_what_is_missing_is_zero_or_empty():
    problem = lift(OCP(lambda t, x, u: x, initial_state=torch.ones(3, 2), horizon=1.0))
    x, u, p = problem.initial_state, torch.zeros(3, 0).double(), problem.parameters
    assert p.shape == (0,)
    assert_close(problem.running_cost(0.0, x, u, p), torch.zeros(3))
    assert_close(problem.terminal_cost(x, p), torch.zeros(3))
    assert problem.path_constraint(0.0, x, u, p).shape == (3, 0)
    assert problem.terminal_constraint(x, p).shape == (3, 0)


def test_constraints_see_the_users_time_and_parameters():
    problem = make(
        FreeHorizon(T, 1.0, 5.0, t0=T0),
        path_constraint=lambda t, x, u, p: torch.stack([t * x[..., 0], p[..., 1] + 0 * t], dim=-1),
        terminal_constraint=lambda t, x, p: (t * x[..., 0])[..., None] - p[..., :1],
    )
    x, u, p = problem.initial_state, torch.zeros(2).double(), problem.parameters
    assert_close(problem.path_constraint(1.0, x, u, p), [2.0, 4.0])
    assert_close(problem.path_constraint(0.0, x, u, p), [0.5, 4.0])
    assert_close(problem.terminal_constraint(x, p), [-1.0])


def test_the_end_time_without_user_parameters():
    problem = lift(
        OCP(lambda t, x, u: x, None, lambda t, x: t, initial_state=[1.0], horizon=FreeHorizon(2.0, 1.0, 3.0))
    )
    assert_close(problem.parameters, [2.0])
    assert_close(torch.stack(problem.parameter_bounds), [[1.0], [3.0]])
    assert_close(problem.terminal_cost(problem.initial_state, torch.tensor([2.5]).double()), 2.5)


def test_unbounded_parameters_get_infinite_bounds_beside_the_end_time():
    lower, upper = make(FreeHorizon(T, 1.0, 5.0)).parameter_bounds
    assert_close(lower, [-math.inf, -math.inf, 1.0])
    assert_close(upper, [math.inf, math.inf, 5.0])


@given(lead=st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_functions_written_for_one_vector_p_are_mapped_over_extra_axes(lead):
    problem = lift(
        OCP(
            lambda t, x, u, p: p[0] * x + p[1] * t[..., None],
            lambda t, x, u, p: p[1] * u[..., 0],
            lambda t, x, p: p[0] * t,
            initial_state=[1.0, 2.0],
            control_dim=1,
            horizon=FreeHorizon(2.0, 1.0, 3.0),
            parameters=[1.0, 2.0],
        )
    )
    x, u, p = (torch.rand(*lead, size).double() for size in (2, 1, 3))
    s = torch.rand(lead).double()
    t, end = s * p[..., -1], p[..., -1:]
    assert_close(problem.dynamics(s, x, u, p), end * (p[..., :1] * x + p[..., 1:2] * t[..., None]))
    assert_close(problem.running_cost(s, x, u, p), end[..., 0] * p[..., 1] * u[..., 0])
    assert_close(problem.terminal_cost(x, p), p[..., 0] * p[..., -1])


def test_in_a_batch_such_functions_are_refused():
    problem = lift(OCP(lambda t, x, u, p: p[0] * x, initial_state=torch.ones(3, 2), horizon=1.0, parameters=[1.0]))
    x, u = problem.initial_state, torch.zeros(3, 0).double()
    assert_close(problem.dynamics(0.0, x, u, problem.parameters), x)
    with pytest.raises(
        ProblemError, match=r"reads p as one vector \(q,\), but a batched solve .*index the last axis: p\[..., i\]"
    ):
        problem.dynamics(0.0, x, u, torch.ones(3, 1).double())


class TestWidened:
    """Static controls and T as states: the constraints, the bounds and the times of the problem come along."""

    def widened(self, horizon):
        return Widened(
            transcribe(
                OCP(
                    dynamics,
                    initial_state=[[1.0, 2.0], [3.0, 4.0]],
                    control_dim=2,
                    parameters=[3.0, 4.0],
                    horizon=horizon,
                    path_constraint=lambda t, x, u, p: torch.stack([t * x[..., 0], u[..., 1] * p[..., 1]], -1),
                    terminal_constraint=lambda t, x, p: (t * p[..., 0] * x[..., 1])[..., None],
                    parameter_bounds=(0.0, 9.0),
                ),
                4,
            )
        )

    @pytest.mark.parametrize("horizon", [Horizon(T0, T), FreeHorizon(T, 1.0, 5.0, t0=T0)])
    def test_they_are_those_of_the_problem(self, horizon):
        wide = self.widened(horizon)
        x, u, p = torch.rand(5, 2, 2).double(), torch.rand(4, 2, 2).double(), wide.problem.start_parameters()
        z, times = wide.join(x, p), torch.linspace(T0, T, 5).double()[:, None]
        assert_close(wide.times(z[0]).expand(2, 5), times.mT.expand(2, 5))
        (group,) = wide.groups
        on_the_way = wide.path_excess(group, step_numbers(group, 0, 4, z), z[:4], u)
        assert_close(on_the_way, torch.stack([times[:4] * x[:4, :, 0], 4.0 * u[..., 1]], -1))
        at_the_end = wide.path_excess(group, 4, z[4], u[3])
        assert_close(at_the_end, torch.stack([T * x[4, :, 0], 4.0 * u[3, :, 1]], -1))
        assert_close(wide.end_error(z[4]), (T * 3.0 * x[4, :, 1])[..., None])
        assert len(wide.parameter_bounds[0]) == wide.q == (3 if isinstance(horizon, FreeHorizon) else 2)

    def test_the_derivative_in_the_end_time(self):
        wide = self.widened(FreeHorizon(T, 1.0, 5.0, t0=T0))
        z = wide.join([torch.ones(2, 2).double()], wide.problem.start_parameters())[0].requires_grad_()
        (slope,) = torch.autograd.grad(wide.end_error(z).sum(), z)
        assert_close(slope[0], [0.0, T * 3.0, T, 0.0, 3.0])

    def test_sizes_that_vary(self):
        grow = Stage(lambda k, x, u: torch.cat([x, u], dim=-1), control_dim=1)
        hold = Stage(lambda k, x, u: x)
        problem = StagedOCP(
            [grow, hold],
            initial_state=[2.0],
            path_constraint=lambda k, x, u: k + x.sum(-1, keepdim=True),
            terminal_constraint=lambda x: x - 1,
        )
        wide = Widened(problem)
        z, u = wide.join([torch.full((n,), 2.0) for n in (1, 2, 2)], problem.start_parameters()), torch.ones(2, 1)
        found = [wide.path_excess(wide.groups[min(k, 1)], k, z[k], u[min(k, 1)]).tolist() for k in range(3)]
        assert found == [[2.0], [5.0], [6.0]]
        assert wide.end_error(z[2]).tolist() == [1.0, 1.0]

    def test_without_constraints_they_are_empty(self):
        wide = Widened(transcribe(OCP(lambda t, x, u: u, initial_state=[1.0], control_dim=1, horizon=1.0), 2))
        z, u = torch.ones(3, 1).double(), torch.ones(2, 1).double()
        assert wide.path_excess(wide.groups[0], 0, z[0], u[0]).shape == wide.end_error(z[2]).shape == (0,)
