"""Reading of bounds: which shapes mean what, and what is refused."""

import pytest
import torch

import ocnopt as oc
from ocnopt.errors import ProblemError
from ocnopt.solvers.alone import _row_of
from ocnopt.staged import Stage, StagedOCP, transcribe

F64, STEPS = torch.float64, 4


def problem(batch=(3,), **options):
    return oc.OCP(
        lambda t, x, u: u,
        lambda t, x, u: (u**2).sum(-1),
        initial_state=torch.zeros(*batch, 2, dtype=F64),
        control_dim=2,
        horizon=1.0,
        **options,
    )


def lower(*shape):
    return -1 - torch.arange(torch.Size(shape).numel(), dtype=F64).reshape(shape)


@pytest.mark.parametrize(
    ("batch", "shape", "read"),
    [
        ((3,), (), (2,)),
        ((3,), (2,), (2,)),
        ((3,), (1, 2), (2,)),
        ((3,), (STEPS, 2), (STEPS, 2)),
        ((3,), (STEPS, 1), (STEPS, 2)),
        ((STEPS,), (1, STEPS, 2), (STEPS, 2)),
        ((3,), (3, 1, 2), (STEPS, 3, 2)),
        ((3,), (3, STEPS, 2), (STEPS, 3, 2)),
        ((STEPS,), (STEPS, 1, 2), (STEPS, STEPS, 2)),
        ((5, 3), (3, 1, 2), (STEPS, 5, 3, 2)),
        ((5, 3), (5, 1, 1, 2), (STEPS, 5, 3, 2)),
        ((), (STEPS, 2), (STEPS, 2)),
    ],
)
def test_a_bound_broadcasts_to_the_controls_of_a_solution(batch, shape, read):
    given = lower(*shape)
    staged = transcribe(problem(batch, control_bounds=(given, 5.0)), STEPS)
    (pair,) = staged.control_bounds
    assert tuple(pair[0].shape) == read
    wanted = given.expand(*batch, STEPS, 2)
    for k, (low, _) in enumerate(staged.step_bounds):
        torch.testing.assert_close(low.expand(*batch, 2), wanted[..., k, :], rtol=0, atol=0)
    if batch:
        single = _row_of(staged, 1, whole=False)
        own = torch.stack([low for low, _ in single.step_bounds])
        torch.testing.assert_close(own, wanted.reshape(-1, STEPS, 2)[1], rtol=0, atol=0)


def test_states_have_a_row_for_each_node_and_parameters_none():
    table = lower(3, STEPS + 1, 2)
    p = {"parameters": [0.5], "parameter_bounds": (torch.tensor([[0.0], [0.6], [0.7]], dtype=F64), 0.9)}
    given = oc.OCP(lambda t, x, u, p: u, initial_state=torch.zeros(3, 2), control_dim=2, horizon=1.0, **p)
    staged = transcribe(given, STEPS)
    assert staged.start_parameters()[:, 0].tolist() == [0.5, 0.6, 0.7]
    torch.testing.assert_close(
        transcribe(problem(state_bounds=(table, 9.0)), STEPS).state_bounds[0], table.movedim(1, 0)
    )


def test_a_function_of_time_returns_a_row_for_each_problem():
    given = problem(
        control_bounds=lambda t: (-1.0 - t * torch.arange(3)[:, None], 1.0 if t < 0.5 else torch.ones(3, 1))
    )
    for steps in (STEPS, [0.0, 0.25, 0.5, 0.75, 1.0]):
        low = oc.transcribe(given, steps).control_bounds[0][0]
        assert low[:, :, 0].tolist() == [[-1 - t * i for i in range(3)] for t in (0.0, 0.25, 0.5, 0.75)]
    # as many steps as problems: what a function returns can mean one thing only
    assert transcribe(problem(control_bounds=lambda t: (-t - 1, 1.0)), 3).control_bounds[0][0].shape == (3, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"control_bounds": (lower(3, 2), 9.0)},
            r"control_bounds\[0\] has shape \(3, 2\), which may mean rows for steps",
        ),
        (
            {"control_bounds": (-99.0, -lower(3, 1))},
            r"\[1\] .* expected \(1, 3, 1\) for steps, \(3, 1, 1\) for problems",
        ),
        ({"state_bounds": (lower(3, 2), 9.0)}, r"state_bounds\[0\] has shape \(3, 2\), which may mean"),
        ({"control_bounds": (lower(2, 1, 2), 9.0)}, r"has shape \(2, 1, 2\); .* what broadcasts to \(3, N, 2\)"),
        ({"state_bounds": (lower(2, 1, 2), 9.0)}, r"has shape \(2, 1, 2\); .* what broadcasts to \(3, N \+ 1, 2\)"),
        ({"control_bounds": (lower(1, 3, 1, 2), 9.0)}, r"has shape \(1, 3, 1, 2\); expected a number"),
        ({"control_bounds": (lower(3, 5, 2), 9.0)}, "control_bounds have 5 rows for 4 steps"),
        ({"state_bounds": (lower(3, 4, 2), 9.0)}, "state_bounds have 4 rows for 5 nodes"),
        ({"control_bounds": (lower(3, 4, 2), -lower(5, 2))}, "control_bounds have 4 and 5 rows"),
        ({"control_bounds": (0.0, lower(3, 1, 2))}, r"lower 0.0 exceeds upper -1.0 at entry \(0, 0, 0\)"),
        ({"control_bounds": lambda t: (lower(2, 2), 9.0)}, r"control_bounds\(t = 0\)\[0\] has shape \(2, 2\)"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ProblemError, match=message):
        transcribe(problem(**options), STEPS)


def test_rows_that_may_be_problems_of_the_last_axis_are_refused():
    with pytest.raises(ProblemError, match=r"expected \(1, 1, 4, 2\) for steps, \(4, 1, 2\) for problems"):
        problem((2, 4), control_bounds=(lower(4, 2), 9.0))


def test_sizes_that_vary_take_one_pair_for_each_problem():
    stages = [Stage(lambda k, x, u: x + u, control_dim=2), Stage(lambda k, x, u: x[..., :1] + u, control_dim=1)]
    staged = StagedOCP(stages, initial_state=torch.zeros(3, 2), control_bounds=(lower(3, 1, 1), 9.0))
    assert [tuple(low.shape) for low, _ in staged.step_bounds] == [(3, 2), (3, 1)]
    assert staged.for_rows(2).step_bounds[1][0].tolist() == [-3.0]


def test_rates_take_bounds_of_each_problem():
    given = problem(control_bounds=(lower(3, 1, 2), 9.0))
    slow = oc.limit_rates(given, (lower(3, 1, 1), 2.0), initial_control=[0.0, 0.0])
    assert slow.state_bounds[0].shape == (3, 1, 4)
    assert transcribe(slow, STEPS).control_bounds[0][0].shape == (STEPS, 3, 2)
    with pytest.raises(ProblemError, match="control_bounds that vary in time"):
        oc.limit_rates(problem(control_bounds=(lower(3, 4, 2), 9.0)), (-1.0, 1.0), initial_control=[0.0, 0.0])
