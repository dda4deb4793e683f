"""Captured tensors as inputs: what is refused, what is seen while others stand in for them."""

import pytest
import torch

from ocnopt.captured import belongs_to_each, given_rows, substituted
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP
from ocnopt.paths import Widened, rows_stand_alone
from ocnopt.staged import Stage, StagedOCP, transcribe

F64 = torch.float64


def regulator(data, target, **changes):
    def cost(t, x, u):
        return ((x - target) ** 2 + u**2).sum(-1)

    given = {"initial_state": [1.0, 0.0], "control_dim": 2, "horizon": 1.0, "data": data}
    return OCP(lambda t, x, u: u, cost, **{**given, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: v, r"data is Tensor; expected a tuple"),
        (lambda v: 3.0, r"data is float; expected a tuple"),
        (lambda v: (v, 1.0), r"data\[1\] is float; expected a tensor"),
        (lambda v: (v.float(),), r"data\[0\] is torch.float32 on cpu; expected torch.float64"),
        (lambda v: (v * torch.nan,), r"data\[0\] of shape \(2,\) is not finite"),
        (lambda v: (v, v), r"data\[1\] came twice"),
        (lambda v: (v.clone(),), r"data\[0\] of shape \(2,\) is read by none of the functions"),
        (lambda v: (v, v[:1]), r"data\[1\] of shape \(1,\) is read by none of the functions"),
    ],
)
def test_data_that_are_none_are_refused(make, message):
    target = torch.zeros(2, dtype=F64)
    with pytest.raises(ProblemError, match=message):
        regulator(make(target), target)


def test_data_are_kept_themselves_and_survive_the_transcription():
    target = torch.zeros(2, dtype=F64)
    problem = regulator((target,), target)
    assert problem.data[0] is target
    assert transcribe(problem, 3).data[0] is target


def test_a_stage_may_read_data_too():
    gain = torch.tensor(2.0, dtype=F64)
    stage = Stage(lambda k, x, u: gain * x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
    problem = StagedOCP(stage, lambda x: (x**2).sum(-1), initial_state=[1.0], steps=2, data=(gain,))
    assert problem.data[0] is gain
    other = torch.tensor(1.0, dtype=F64)
    with pytest.raises(ProblemError, match="read by none"):
        StagedOCP(stage, initial_state=[1.0], steps=2, data=(other,))


@pytest.mark.parametrize(
    "read",
    [
        lambda v: v * 2,
        lambda v: 2 * v,
        lambda v: v[0] + 0,
        lambda v: torch.stack([v, v])[0],
        lambda v: torch.nn.functional.linear(torch.eye(2, dtype=F64), v[None])[:, 0],
        lambda v: torch.func.vmap(lambda a: a * v.sum())(torch.ones(3, dtype=F64)),
        lambda v: torch.func.grad(lambda a: (a * v).sum())(torch.ones(2, dtype=F64)),
        lambda v: sum(v),
        lambda v: torch.cat((v, v), dim=0),
    ],
)
def test_operations_see_what_stands_in(read):
    here, there = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([5.0, -3.0], dtype=F64)
    with substituted([here], [there]):
        seen = read(here)
    torch.testing.assert_close(seen, read(there))
    torch.testing.assert_close(here, torch.tensor([1.0, 2.0], dtype=F64))


@pytest.mark.parametrize(
    ("shape", "batch", "each"), [((3,), (3,), True), ((3, 2), (3,), True), ((2, 3), (3,), False), ((3,), (), False)]
)
def test_leading_axes_of_the_batch_are_one_value_a_problem(shape, batch, each):
    assert belongs_to_each(torch.zeros(shape), batch) is each


def test_rows_of_what_a_step_is_given():
    shared, own = torch.tensor([1.0, 2.0], dtype=F64), torch.arange(6, dtype=F64).reshape(3, 2)
    cost = lambda t, x, u: ((x - own) ** 2 * shared).sum(-1)  # noqa: E731
    problem = OCP(lambda t, x, u: -x, cost, initial_state=torch.zeros(3, 2), horizon=1.0, data=(shared, own))
    staged = transcribe(problem, 4)
    rows = given_rows(staged)
    assert rows.shape == (5, 3, 4)
    torch.testing.assert_close(rows[2], torch.cat([shared.expand(3, 2), own], dim=-1))
    table = torch.arange(15, dtype=F64).reshape(5, 3, 1)
    rows = given_rows(staged.altered(step_data=table))
    torch.testing.assert_close(rows[..., :1], table)
    assert given_rows(transcribe(regulator((), torch.zeros(2, dtype=F64)), 4)).shape == (5, 1, 0)


def test_data_of_each_problem_leave_rows_alone_and_other_captures_do_not():
    own = torch.arange(6, dtype=F64).reshape(3, 2)
    cost = lambda t, x, u: ((x - own) ** 2).sum(-1)  # noqa: E731
    make = lambda data: OCP(lambda t, x, u: -x, cost, initial_state=torch.zeros(3, 2), horizon=1.0, data=data)  # noqa: E731
    assert rows_stand_alone(Widened(transcribe(make((own,)), 4)))
    assert not rows_stand_alone(Widened(transcribe(make(()), 4)))


def test_a_vector_for_all_that_looks_like_one_value_a_problem_is_noticed():
    weights = torch.ones(3, dtype=F64)  # over the last axis, in a batch of three
    cost = lambda t, x, u: (weights * x**2).sum(-1)  # noqa: E731
    problem = OCP(lambda t, x, u: -x, cost, initial_state=torch.ones(3, 3), horizon=1.0, data=(weights,))
    assert not rows_stand_alone(Widened(transcribe(problem, 4)))


def test_bounds_that_read_data_are_refused():
    """They are a table made once: a later change of the data would not reach it."""
    top = torch.tensor([2.0], dtype=F64)
    problem = lambda bounds: OCP(  # noqa: E731
        lambda t, x, u: top * u, initial_state=[0.0], control_dim=1, horizon=1.0, control_bounds=bounds, data=(top,)
    )
    with pytest.raises(ProblemError, match=r"control_bounds\(t = 0\) reads data\[0\], but bounds are read once"):
        transcribe(problem(lambda t: (-top, top * (1 + t))), 3)
    assert transcribe(problem(lambda t: (-1.0, 1.0)), 3).control_bounds[0] is not None
    with pytest.raises(ProblemError, match=r"control_bounds\[1\] requires grad, but no gradient reaches bounds"):
        problem((-1.0, top.clone().requires_grad_()))
